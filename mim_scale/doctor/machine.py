"""What `mim-scale doctor` looks at on a machine: libraries, devices, memory, cores and the limits on them."""

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from mim_scale.doctor.finding import GIB, INSTALL, Finding, Level, gib, short
from mim_scale.training import host
from mim_scale.training.host import allowed_cores, cgroup, cpu_quota, memory_limit

SHM = Path("/dev/shm")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
"""Exact versions that the suite runs with; there in a checkout."""
TOLD = ("torch", "deepspeed", "ray", "mlflow", "numpy")
FILES, FILES_RAY = 1024, 4096
"""Files that a rank may have open: up to 256 volumes, and sockets; Ray's own processes need more."""
THREADS = 1024
"""Threads and processes that should still fit: libraries start one for each core, in each rank."""
SMALL_SHM = GIB


def versions() -> Iterator[Finding]:
    """Libraries against the ranges that the project states, and against the versions that its suite runs with."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in importlib.metadata.requires("mim-scale") or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    there = {one.name: installed(one.name) for one in needed}
    told = ", ".join(f"{name} {there.get(name)}" for name in TOLD if there.get(name))
    missing = [name for name, version in there.items() if version is None]
    outside = [
        f"{one.name} {version} (needed: {one.specifier})"
        for one in needed
        if (version := there[one.name]) is not None and not one.specifier.contains(version, prereleases=True)
    ]
    if missing:
        yield Finding("error", "versions", f"not installed: {', '.join(missing)}; nothing can be trained here", INSTALL)
    if outside:
        yield Finding("warning", "versions", f"outside the stated range: {', '.join(outside)}", INSTALL)
    tested = _tested()
    other = [
        f"{name} {version} (tested: {tested[name.lower()]})"
        for name, version in there.items()
        if version is not None and version.partition("+")[0] != tested.get(name.lower(), version).partition("+")[0]
    ]
    if other:
        yield Finding("note", "versions", f"not those of constraints.txt: {', '.join(other)}", INSTALL)
    level: Level = "note" if missing or outside else "ok"
    yield Finding(level, "versions", f"mim-scale {installed('mim-scale')}, python {platform.python_version()}, {told}")


def installed(name: str) -> str | None:
    """The version of a library; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested() -> dict[str, str]:
    if not CONSTRAINTS.is_file():
        return {}
    lines = [line.partition("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    return {name.strip().lower(): version.strip() for name, _, version in lines}


def devices(precision: str | None = None) -> Iterator[Finding]:
    """GPUs, whether this torch can use them, and what of their memory others hold.

    Args:
        precision: That of the config, `fp32` or `bf16`.
    """
    import torch

    if torch.cuda.is_available():
        yield from _gpus(precision)
        return
    there, built = visible_gpus(), torch.version.cuda or getattr(torch.version, "hip", None)
    if not there:
        yield Finding("ok", "devices", "no GPU: ranks compute on cores, one thread each")
    elif not built:
        yield Finding(
            "warning",
            "devices",
            f"{there} GPU(s), but torch {torch.__version__} was built without CUDA: training would use cores",
            "install a build of torch for CUDA: https://pytorch.org/get-started/locally",
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        yield Finding(
            "note",
            "devices",
            f"{there} GPU(s) hidden by CUDA_VISIBLE_DEVICES",
            "unset CUDA_VISIBLE_DEVICES to use them",
        )
    else:
        yield Finding(
            "warning",
            "devices",
            f"torch {torch.__version__} (CUDA {built}) can use none of {there} GPU(s): {_why_no_gpu()}",
            f"update the driver to one for CUDA {built}, or install torch for the driver's CUDA (see nvidia-smi)",
        )


def visible_gpus() -> int:
    """NVIDIA GPUs that the driver shows, whatever torch can do with them."""
    folder = host.PROC / "driver" / "nvidia" / "gpus"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def _why_no_gpu() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return short(error)
    return "the driver names none"


def _gpus(precision: str | None) -> Iterator[Finding]:
    import torch

    kernels = [(kind, int(number.rstrip("af")) // 10) for kind, number in _kernels(torch.cuda.get_arch_list())]
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        name = f"GPU {number} {gpu.name}, compute {gpu.major}.{gpu.minor}"
        # Machine code serves one generation, intermediate code (compute) later ones too.
        fits = [major == gpu.major or (kind == "compute" and major < gpu.major) for kind, major in kernels]
        if fits and not any(fits):
            yield Finding(
                "error",
                "devices",
                f"{name}: torch {torch.__version__} has no kernels for it",
                "install a build of torch that names this GPU's generation, or hide it by CUDA_VISIBLE_DEVICES",
            )
            continue
        free, total = torch.cuda.mem_get_info(number)
        told = f"{name}: {gib(free)} of {gib(total)} free"
        if free < 0.9 * total:
            yield Finding("warning", "devices", told, "end what else runs on it (see nvidia-smi)")
        else:
            yield Finding("ok", "devices", told)
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("error", "devices", "train.precision is bf16, which this GPU lacks", "set train.precision=fp32")


def _kernels(names: list[str]) -> list[tuple[str, str]]:
    """`sm_90` as ("sm", "90"); AMD's names are of another kind."""
    return [(kind, number) for kind, _, number in (name.partition("_") for name in names) if number]


def cores() -> Iterator[Finding]:
    """Cores that may be used, by affinity and by cgroup."""
    there, mine, quota = os.cpu_count() or 1, allowed_cores(), cpu_quota()
    told = f"{mine} of {there} cores"
    if quota is not None and quota < mine:
        yield Finding(
            "note",
            "cores",
            f"{told}, but the cgroup allows {quota:g}: libraries count all of them",
            "start no more ranks than that, and set data.workers by it",
        )
    else:
        yield Finding("ok", "cores", told)


def memory() -> Iterator[Finding]:
    """Memory that is free, and the cgroup's limit on it."""
    import psutil

    found, limit = psutil.virtual_memory(), memory_limit()
    told = f"{gib(found.available)} of {gib(found.total)} free"
    if limit is not None and limit < found.total:
        yield Finding(
            "note",
            "memory",
            f"{told}, but the cgroup allows {gib(limit)}: what takes more is killed (exit -9)",
            "ask the scheduler or the container for more where `mim-scale estimate` says so",
        )
    else:
        yield Finding("ok", "memory", told)


def shared_memory(needs_much: bool = False) -> Iterator[Finding]:
    """The room in /dev/shm, by which processes of a machine hand each other data.

    Args:
        needs_much: Whether NCCL or Ray will use it.
    """
    if not SHM.is_dir():
        yield Finding("warning", "/dev/shm", "there is none", f"mount a tmpfs at {SHM}")
        return
    found = shutil.disk_usage(SHM)
    told = f"{gib(found.free)} of {gib(found.total)} free"
    if found.free >= SMALL_SHM:
        yield Finding("ok", "/dev/shm", told)
        return
    level: Level = "warning" if needs_much else "note"
    why = "NCCL and Ray use it" if needs_much else "this run uses little of it"
    remedy = "docker run --shm-size 8g (or --ipc host); in Kubernetes an emptyDir with medium: Memory"
    yield Finding(level, "/dev/shm", f"{told}; {why}", remedy)


def limits(uses_ray: bool = False) -> Iterator[Finding]:
    """Open files, processes, and locked memory where there is a network that needs it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises its own as far as it may.
    allowed, needed = (hard, FILES_RAY) if uses_ray else (soft, FILES)
    told = f"{_limit(soft)} may be open, up to {_limit(hard)} on demand"
    if 0 <= allowed < needed:
        raised = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}, before the launcher is started"
        above = "have the hard limit raised: limits.conf, LimitNOFILE of slurmd, docker run --ulimit nofile"
        remedy = raised if hard < 0 or hard >= needed else above
        yield Finding("warning", "open files", f"{told}; a rank may need {needed}", remedy)
    else:
        yield Finding("ok", "open files", told)
    yield from _processes()
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if any((host.SYS / "class" / "infiniband").glob("*")) and locked >= 0:
        yield Finding(
            "warning",
            "locked memory",
            f"{gib(locked)}, and there is an InfiniBand card: NCCL must lock more",
            "ulimit -l unlimited: limits.conf, LimitMEMLOCK of slurmd, docker run --ulimit memlock=-1",
        )


def _processes() -> Iterator[Finding]:
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    # Of all threads of a user; root is not held to it.
    by_user = soft if soft >= 0 and os.geteuid() else None
    left = [
        int(most) - int(now)
        for most, now in zip(cgroup("pids", "pids.max"), cgroup("pids", "pids.current"), strict=False)
        if most.isdigit()
    ]
    left += [by_user] if by_user is not None else []
    if left and min(left) < THREADS:
        yield Finding(
            "warning",
            "processes",
            f"{min(left)} more processes and threads may start; a rank starts one or more for each core",
            "ulimit -u 65536, docker run --pids-limit -1, or podPidsLimit of the kubelet",
        )
    else:
        yield Finding("ok", "processes", f"{min(left)} more may start" if left else "no limit")


def _limit(number: int) -> str:
    return "any number" if number < 0 else str(number)
