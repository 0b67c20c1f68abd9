"""Puts the simulated time, threads, ranks and servers where the training takes the real ones from."""

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mim_scale import commit
from mim_scale.training import checkpoint_write, loop, pictures, ranks, records, saving, step, tracking_mlflow
from mim_scale.training.checkpoint import CheckpointFolder
from mim_scale.training.run_folder import RunLock
from tests.simulation.stand_ins import Model, SimEngine, SimStream, mlflow_modules
from tests.simulation.virtual import Here, VirtualThreading, VirtualTime

NUM_VOLUMES = 7
ROWS = tuple(SimpleNamespace(key=f"v{n}", shape=(9, 9, 9), spacing_mm=(1.0, 1.0, 1.0)) for n in range(NUM_VOLUMES))


class QuietProgress:
    """As the loop's progress; rank 0 tells from which step it starts."""

    def __init__(self, start: int, steps: int, batch: int, is_shown: bool) -> None:
        self._is_shown = is_shown
        if is_shown:
            Here.simulation.begins_at(start)

    def say(self, text: str) -> None:
        if self._is_shown:
            Here.simulation.say(text)

    def step(self, *facts: Any) -> None:
        if self._is_shown:
            Here.simulation.executed = max(Here.simulation.executed, facts[0])

    def close(self) -> None:
        pass


class SimLock(RunLock):
    """The real lock; the kernel lets go of it when its simulated process dies, or a file server does later."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        if Here.simulation.is_locked:
            raise AssertionError("two launches hold the folder")
        self._is_held = Here.simulation.is_locked = True
        Here.world.process.at_death.append(self._let_go)

    def release(self) -> None:
        if not self._is_held:
            return  # its process is dead
        super().release()
        self._is_held = Here.simulation.is_locked = False

    def _let_go(self) -> None:
        if self._is_held:
            self._is_held = Here.simulation.is_locked = False
            Here.simulation.forgotten_locks.append(self._descriptor)
            if not Here.simulation.keeps_locks:
                Here.simulation.let_go_of_locks()


class _Ids:
    """As `uuid`, by the seed."""

    @staticmethod
    def uuid4() -> Any:
        return SimpleNamespace(hex=f"{Here.simulation.ids.getrandbits(128):032x}")


class _Dist:
    """As `torch.distributed`, for the state that rank 0 sends."""

    @staticmethod
    def broadcast(tensor: Any, src: int) -> None:
        launch, rank = Here.world.process.seat
        tensor.copy_(launch.exchange(rank, "a tensor", tensor.clone())[src])


def _find_writers(real: Any) -> Any:
    def found(of: Any, folder: Path) -> tuple[int, ...]:
        return tuple(rank for rank in real(of, folder) if rank == 0 or rank not in of.launch.blind)

    return found


def _publish(real: Any) -> Any:
    def publish(self: CheckpointFolder, step: int, *rest: Any) -> Path:
        path: Path = real(self, step, *rest)
        Here.simulation.published(step)
        return path

    return publish


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Inside, `loop._pretrain` trains in `Here.world`."""
    patch = pytest.MonkeyPatch()
    simulated = {
        loop: {
            "open_dataset": lambda data: SimpleNamespace(fingerprint="f" * 64, rows=ROWS, path=Path("store")),
            "split_subjects": lambda rows, seed, count: (ROWS, ()),
            "build_method": lambda config, policy: Model(config.train.steps * config.train.batch),
            "build_engine": lambda module, config, of: SimEngine(module, of, *Here.simulation.engine),
            "open_stream": lambda config, dataset, rows: SimStream(NUM_VOLUMES, config.seed),
            "Progress": QuietProgress,
            "system_rows": lambda *_: contextlib.nullcontext(),
            "find_writers": _find_writers(loop.find_writers),
            "time": VirtualTime,
            "print": _say,
        },
        saving: {"time": VirtualTime, "threading": VirtualThreading, "dist": _Dist, "uuid": _Ids},
        commit: {"uuid": _Ids},
        checkpoint_write: {"time": VirtualTime},
        records: {"time": VirtualTime, "RunLock": SimLock, "git_state": dict, "print": _say},
        step: {"time": VirtualTime, "to_device": lambda batch, device: batch},
        tracking_mlflow: {
            "time": VirtualTime,
            "threading": VirtualThreading,
            "uuid": _Ids,
            "_say": _say,
        },
        ranks: {"print": _say},
        pictures: {"draw_loss_curve": lambda rows, path: None},
        CheckpointFolder: {"publish": _publish(CheckpointFolder.publish)},
    }
    for owner, names in simulated.items():
        for name, value in names.items():
            patch.setattr(owner, name, value, raising=False)
    for name, module in mlflow_modules(lambda: Here.simulation.mlflow).items():
        patch.setitem(sys.modules, name, module)
    try:
        yield
    finally:
        patch.undo()


def _say(text: Any, **_: Any) -> None:
    Here.simulation.say(str(text))


def let_go(descriptors: list[int]) -> None:
    """Close what dead processes held."""
    while descriptors:
        os.close(descriptors.pop())


def ids(seed: int) -> random.Random:
    """Names that nobody else has, by the seed."""
    return random.Random(f"names {seed}")
