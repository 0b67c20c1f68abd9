"""Run cases in processes of their own: a crash, a hang or a greedy reader is an outcome of its case, not of the run."""

import importlib
import multiprocessing
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.errors import SourceError
from mim_scale.store.volume import Volume
from tests.pipeline.corpus.case import STOPS, Case, accepted, refused

LIMIT_S = 30.0
"""Of one case; the slowest takes about one second on an idle machine."""
_LIMIT_BYTES = 1 << 30
"""Of memory that one case may take; the largest input is smaller than a megabyte."""
_MIN_SLICES = 16
_HEALTHY = "zz_healthy/scan.nii"


@dataclass(frozen=True)
class Got:
    """What became of a case."""

    outcomes: tuple[str, ...]
    details: tuple[str, ...]


def run_case(case: Case, good: Volume) -> Got:
    """Write a case's folder beside a healthy volume, look, read, and compare what is accepted with the truth."""
    from data_pipeline.sources.inventory import find_sources
    from tests.pipeline.corpus.files import nifti

    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    try:
        (folder / "source").mkdir()
        root = folder / "source"
        truth = case.write(root, good) or good
        healthy = Volume(np.ascontiguousarray(good.voxels[::-1]), good.spacing_mm, good.affine)
        (root / _HEALTHY).parent.mkdir()
        (root / _HEALTHY).write_bytes(nifti(healthy))
        found = []
        with case.during(root):
            sources = find_sources(root).sources
            if case.meanwhile is not None:
                case.meanwhile(root)
            for source in sources:
                found.append(_outcome(root, source, healthy if source.name == _HEALTHY else truth))
                if source.name == _HEALTHY and found.pop()[0] != accepted():
                    found.append(("the healthy volume beside it was not accepted", ""))
        return Got(*zip(*sorted(found), strict=True)) if found else Got((), ())
    except SourceError as error:
        return Got((STOPS if "\n" not in str(error) else "STOPS with many lines",), (str(error),))
    except Exception as error:
        return Got((f"EXCEPTION {type(error).__name__}",), (traceback.format_exc(),))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _outcome(root: Path, source: Any, truth: Volume) -> tuple[str, str]:
    from data_pipeline.canonical import canonical
    from data_pipeline.reasons import Rejected
    from data_pipeline.screen import screen
    from data_pipeline.sources.read import read_source

    try:
        volume, repairs = canonical(read_source(root, source))
        flags = screen(volume.voxels, _MIN_SLICES)
    except Rejected as rejected:
        leaks = str(root) in rejected.detail or source.name in rejected.detail or "CANARY" in rejected.detail
        return refused(rejected.reason) + (" WITH A NAME" if leaks else ""), rejected.detail
    if volume.shape != truth.shape or not np.array_equal(volume.voxels, truth.voxels):
        return "WRONG voxels", f"{volume.shape}, expected {truth.shape}"
    if not np.allclose(volume.affine, truth.affine, atol=1e-3) or not np.allclose(
        volume.spacing_mm, truth.spacing_mm, rtol=1e-4
    ):
        return "WRONG geometry", f"{volume.affine.tolist()}, expected {truth.affine.tolist()}"
    return accepted(*repairs, flags=flags), ""


def _serve(pipe: Connection, good: Path, module: str) -> None:
    """A worker: names of cases in, what became of them out."""
    from tests.pipeline.corpus.good import load_good

    cases = {case.key: case for case in importlib.import_module(module).CASES}
    volume = load_good(good)
    # Everything is imported before memory is counted.
    run_case(Case("", "", lambda root, good: None, ()), volume)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _LIMIT_BYTES, resource.RLIM_INFINITY))
    pipe.send(None)
    while (key := pipe.recv()) is not None:
        pipe.send(run_case(cases[key], volume))


class _Worker:
    def __init__(self, good: Path, module: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, good, module), daemon=True)
        self.process.start()
        theirs.close()
        self.case: Case | None = None
        self.since = 0.0
        self.pipe.recv()

    def ask(self, case: Case) -> None:
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case.key)

    def age(self) -> float:
        """Seconds since it was asked."""
        return time.monotonic() - self.since

    def answer(self) -> Got | None:
        """None where the worker died."""
        try:
            got: Got = self.pipe.recv()
        except EOFError:
            self.process.join()
            return None
        return got

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def run_cases(
    cases: Sequence[Case], good: Path, workers: int = 2, module: str = "tests.pipeline.corpus.cases"
) -> Iterator[tuple[Case, Got]]:
    """Run cases on a few processes, in any order.

    Args:
        good: file that good.save_good wrote.
        workers: processes at once.
        module: where the workers find the cases, as CASES.
    """
    left, busy = list(cases)[::-1], [_Worker(good, module) for _ in range(min(workers, len(cases)))]
    for worker in busy:
        worker.ask(left.pop())
    while busy:
        first_limit = min(worker.since for worker in busy) + LIMIT_S
        ready = wait([worker.pipe for worker in busy], max(0.0, first_limit - time.monotonic()))
        late = [worker for worker in busy if worker.pipe not in ready and worker.age() > LIMIT_S]
        for worker in [*late, *(worker for worker in busy if worker.pipe in ready)]:
            got = Got(("HANG",), (f"over {LIMIT_S:g} seconds",)) if worker in late else worker.answer()
            assert worker.case is not None
            yield worker.case, got or Got((f"CRASH with {worker.process.exitcode}",), ("",))
            busy.remove(worker)
            is_fit = got is not None and worker not in late
            if not (is_fit and left):
                worker.end()
            if left:
                busy.append(worker if is_fit else _Worker(good, module))
                busy[-1].ask(left.pop())
