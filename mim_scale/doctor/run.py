"""What `mim-scale doctor` looks at in a config: its store, its run folder, and whether it fits ranks and machine."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.doctor import disk as doctor_disk
from mim_scale.doctor.finding import Finding, gib
from mim_scale.errors import CheckpointError, OtherVersionError, StoreError
from mim_scale.training.host import PROC, free_memory, usable_cores

MANY_THREADS = 4
"""Readers and ranks for each core above which they hinder each other."""


@dataclass
class Facts:
    """What checks learn on one machine, for those after them and for comparison with other machines."""

    versions: dict[str, str | None] = field(default_factory=dict)
    fingerprint: str | None = None
    parameters: int | None = None

    @property
    def save_bytes(self) -> int:
        """Of a checkpoint; 0 where the model is not known."""
        if self.parameters is None:
            return 0
        from mim_scale.training.rank_memory import checkpoint_bytes

        return checkpoint_bytes(self.parameters)


def model(config: PretrainConfig, facts: Facts) -> Iterator[Finding]:
    """How many parameters are trained; nothing is computed, and no memory taken."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mim_scale.methods.build import build_method
    from mim_scale.training.engine import trained_parameters

    with FakeTensorMode():
        module = build_method(config, "none")
    facts.parameters = sum(parameter.numel() for parameter in trained_parameters(module).values())
    told = f"{config.method.name} on {config.model.backbone}, {facts.parameters:,} parameters"
    yield Finding("ok", "model", told)


def batch(config: PretrainConfig, world: int) -> Iterator[Finding]:
    """Whether the batch divides among the ranks, and the DeepSpeed settings go with it."""
    import torch

    from mim_scale.sampling.order import micro_batches
    from mim_scale.training.deepspeed_settings import deepspeed_config
    from mim_scale.training.ranks import Ranks

    train = config.train
    each = len(micro_batches(0, train.batch, train.micro_batch, 0, world))
    if train.engine == "deepspeed":
        deepspeed_config(config, Ranks(0, world, 0, torch.device("cpu")))
    many = f"{world} rank{'s' * (world > 1)}"
    yield Finding("ok", "batch", f"{train.batch} samples: {many} x {each} micro-batches of {train.micro_batch}")


def threads(config: PretrainConfig, ranks_here: int) -> Iterator[Finding]:
    """Readers and ranks of this machine against its cores."""
    cores = usable_cores()
    wanted = ranks_here * (config.data.workers + 1)
    told = f"{ranks_here} rank(s) here, each with {config.data.workers} workers, on {cores} cores"
    if wanted > MANY_THREADS * cores:
        yield Finding("warning", "workers", told, "lower data.workers, or start fewer ranks on this machine")
    elif wanted > cores:
        yield Finding("note", "workers", told, "lower data.workers where `mim-scale status` shows no wait for data")
    else:
        yield Finding("ok", "workers", told)


def memory(config: PretrainConfig, facts: Facts, world: int, ranks_here: int) -> Iterator[Finding]:
    """What ranks hold besides activations, and the copy that background saves write from, against what is free."""
    import torch

    from mim_scale.methods.cost import Cost
    from mim_scale.training.rank_memory import WORD, rank_memory

    if facts.parameters is None:
        return
    on_gpu = torch.cuda.is_available()
    words = facts.parameters * WORD
    # Activations take a trace of seconds: `mim-scale estimate` has them.
    cost = Cost(facts.parameters, 0, 0, 0, gradient_bytes=words, state_bytes=3 * words, batch_bytes=0, tensors=0)
    if config.train.zero_stage == "auto":
        # It goes as high as it must: what does not fit there does not fit.
        highest = config.train.model_copy(update={"zero_stage": 2 if config.train.compile else 3})
        config = config.model_copy(update={"train": highest})
    held = rank_memory(cost, config, world, world, is_on_host=not on_gpu)
    if on_gpu:
        infos = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
        told = f"a rank holds {gib(held.device)} besides activations"
        yield _room("room on GPU", told, held.device, *min(infos))
    needed, copies = ranks_here * (held.host if on_gpu else held.needed(True)), ranks_here * held.host_copy
    told = f"{ranks_here} rank(s) hold {gib(needed)} besides activations, {gib(copies)} of it to save from"
    yield _room("room in memory", told, needed, *free_memory())


def _room(name: str, told: str, needed: float, free: int, whole: int) -> Finding:
    told = f"{told}; {gib(free)} of {gib(whole)} are free"
    if needed <= free:
        return Finding("ok", name, told)
    remedy = "raise train.zero_stage, start fewer ranks here, set checkpoint.background=false, or take a smaller model"
    if needed <= whole:
        return Finding("warning", name, told, f"end what else runs here; else {remedy}")
    return Finding("error", name, told, remedy)


def store(config: PretrainConfig, facts: Facts) -> Iterator[Finding]:
    """Whether the store, or the pack, opens, and leaves something to train on."""
    from mim_scale.store.manifest import split_subjects
    from mim_scale.streaming.stream import open_dataset, refuse_short_pack

    dataset = open_dataset(config.data)
    facts.fingerprint = dataset.fingerprint
    rows, held = split_subjects(dataset.rows, config.seed, config.data.held_out_subjects)
    told = f"{dataset.path}: {len(rows)} volumes to train on, {len(held)} held out, dataset {dataset.fingerprint[:16]}"
    needed = range(config.train.steps * config.train.batch)
    refuse_short_pack(config, dataset, needed, config.held_out.samples if held else 0)
    yield Finding("ok", "store", told)


def run_folder(config: PretrainConfig, facts: Facts) -> Iterator[Finding]:
    """Whether what lies in the run folder can go on with this config and this store, and whether it is free."""
    from mim_scale.config_file import load_config
    from mim_scale.training.checkpoint import CheckpointFolder, read_record
    from mim_scale.training.run_folder import CHECKPOINTS, CONFIG, LOCK, refuse_other_run

    output = Path(config.output)
    if not output.is_dir():
        yield Finding("ok", "run folder", f"{output} will be made")
        return
    yield from _tenant(output, output / LOCK)
    if (output / CONFIG).is_file():
        refuse_other_run(load_config(PretrainConfig, output / CONFIG), config, str(output / CONFIG))
    folders = CheckpointFolder(output / CHECKPOINTS, config.checkpoint.keep).folders()
    if not folders:
        yield Finding("ok", "run folder", f"{output}: no checkpoint yet")
        return
    for folder in folders:
        try:
            newest = read_record(folder)
            break
        except OtherVersionError:
            raise
        except CheckpointError as error:
            yield Finding("warning", "run folder", f"{error}", "`mim-scale checkpoint verify` names all damaged ones")
    else:
        raise CheckpointError(f"{output}: no checkpoint is whole; choose another output, or restore a copy of one")
    saved = str(newest.record.get("fingerprint"))
    if facts.fingerprint is not None and saved != facts.fingerprint:
        raise StoreError(
            f"{output}: was trained on the dataset {saved[:16]}, but data.store {config.data.store} holds "
            f"{facts.fingerprint[:16]}; give the store of that run, or choose another output"
        )
    verb = "goes on from" if newest.step < config.train.steps else "is done at"
    yield Finding("ok", "run folder", f"{output}: {verb} step {newest.step} of {config.train.steps}")


def _tenant(output: Path, lock: Path) -> Iterator[Finding]:
    """A run that has the folder. Its lock is never tried: a run that starts in that instant would be refused."""
    from mim_scale.training.status import holder_of

    who, seems_alive = holder_of(lock)
    if _is_locked(lock):
        yield Finding("note", "run folder", f"{output}: a run is alive in it", "a second one will be refused")
    elif seems_alive:
        remedy = "a second one will be refused while it lives"
        yield Finding("note", "run folder", f"{output}: {who} may be alive in it", remedy)


def _is_locked(path: Path) -> bool:
    """Whether a process that this machine knows of holds a lock, by the kernel's list of them."""
    try:
        file, held = path.stat(), (PROC / "locks").read_text()
    except OSError:
        return False
    return f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}" in held.split()


def disks(config: PretrainConfig, facts: Facts) -> Iterator[Finding]:
    """Room for checkpoints where the run folder lies, and the disk of the store."""
    from mim_scale.training.run_folder import CHECKPOINTS

    output, keep = Path(config.output), config.checkpoint.keep
    one = facts.save_bytes
    there = sum(_size(folder) for folder in (output / CHECKPOINTS).glob("step_*"))
    # One more than are kept: the newest stands before the oldest goes.
    needed = max((keep + 1) * one - there, one)
    yield from doctor_disk.room("disk of output", output, needed, one, f"{keep} checkpoints and the one being written")
    where = Path(config.data.pack or config.data.store)
    if where.is_dir():
        kind = doctor_disk.kind_of(where)
        yield Finding("ok", "disk of store", f"{where} lies on {kind}")


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; a run that is alive may be deleting it."""
    size = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(inside, name)).st_size
    return size
