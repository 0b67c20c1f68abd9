"""Saves that do not stop the run: the state is copied, and a thread writes the copy while training goes on.

The copies lie in host memory that is kept from save to save. At most one save is under way. Each rank writes what it
holds of the state; where some do not see the run folder, the others share whole tensors out. Between their threads
there is nothing but files, and what became of them the main threads exchange at the next step.
"""

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from mim_scale.commit import TEMPORARY, write_file
from mim_scale.training.checkpoint import Piece
from mim_scale.training.checkpoint_write import GivenUp, Share, write_share
from mim_scale.training.engine import Engine, shared_out
from mim_scale.training.progress import Progress
from mim_scale.training.ranks import Ranks
from mim_scale.training.records import Records

LOOK_S = 0.05
GRACE_S = 10.0
"""How long a run that ends by an error waits for the shares of others, some of whom may be gone."""
SEES_S = 2.0
"""How long a file that another machine wrote may take to be seen."""

State = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Weights and moments by name."""


class Saver:
    """The saves of a run; every rank has one, and makes the same calls.

    Args:
        engine: Whose state is saved.
        ranks: All of them.
        records: Of this rank.
        progress: Where saves are told of.
        writers: The ranks that share the writing, 0 first.
        background: Whether training goes on while a save is written; otherwise no host memory is kept.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        records: Records,
        progress: Progress,
        writers: Sequence[int],
        background: bool,
    ) -> None:
        self._engine, self._ranks, self._records, self._progress = engine, ranks, records, progress
        self._writers, self._background = writers, background
        self._token = ranks.broadcast(uuid.uuid4().hex[:8])
        self._buffers: dict[tuple[str, str], Piece] = {}
        self._under_way: _Save | None = None

    def save(self, step: int, updates: int) -> None:
        """Save the state after `step` steps, `updates` of them made; an earlier save is waited for.

        Raises:
            CheckpointError: the disk did not take the earlier one, or, without `background`, this one; on all ranks.
        """
        began = time.perf_counter()
        self.finish()
        self._copy()
        number = self._writers.index(self._ranks.rank) if self._ranks.rank in self._writers else None
        share = None
        if number is not None:
            facts, pieces = self._records.facts(step, updates), list(self._buffers.values())
            share = Share(step, self._token, number, len(self._writers), pieces, facts, self._records.sync)
        save = self._under_way = _Save(step, began, share, self._records)
        save.stall_s = time.perf_counter() - began
        if not self._background:
            # Not by waiting for the own thread alone: it waits for the shares of others, and one may have failed.
            self.finish()
            self._buffers = {}

    def look(self, wait_s: float | None = 0.0) -> bool:
        """See what has become of the save under way; returns whether none is any more.

        Raises:
            CheckpointError: the disk did not take it; on all ranks, told once.
        """
        save = self._under_way
        if save is None:
            return True
        save.thread.join(wait_s)
        table = self._ranks.gather([not save.thread.is_alive(), save.error is not None])
        if table[:, 1].any():
            save.stop.set()
            save.thread.join()
            self._under_way = None
            self._ranks.together(save.raise_error)
        if not table[:, 0].all():
            return False
        self._under_way = None
        if not self._background:
            save.stall_s = time.perf_counter() - save.began
        self._tell(save)
        return True

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: the disk did not take it; on all ranks, told once.
        """
        while not self.look(None if self._ranks.world == 1 else LOOK_S):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error the save under way is still written, where nobody has to be waited for in vain."""
        save = self._under_way
        if save is None:
            return
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            save.thread.join(None if len(self._writers) == 1 else GRACE_S)
        save.stop.set()
        save.thread.join()
        if save.error is not None:
            self._progress.say(f"the checkpoint of step {save.step} was not saved: {save.error}")
        elif save.bytes:
            self._tell(save)

    def _copy(self) -> None:
        """This rank's share of the state, into host memory: what it holds, where every rank writes."""
        rank, is_by_all = self._ranks.rank, len(self._writers) == self._ranks.world
        pieces = self._engine.pieces() if is_by_all else shared_out(self._engine.state(), rank, self._writers)
        for piece in pieces:
            key, numbers = (piece.kind, piece.name), piece.numbers.detach()
            if key not in self._buffers:
                room = torch.empty(numbers.shape, dtype=torch.float32, pin_memory=numbers.device.type == "cuda")
                self._buffers[key] = replace(piece, numbers=room)
            self._buffers[key].numbers.copy_(numbers, non_blocking=True)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def _tell(self, save: "_Save") -> None:
        self._records.row("save", save.step, stall_s=save.stall_s, write_s=save.write_s, bytes=save.bytes)
        self._progress.say(
            f"step {save.step} saved: {save.bytes / 1e6:,.1f} MB in {save.write_s:.1f} s, of which training stood "
            f"still for {save.stall_s:.2f} s"
        )


class _Save:
    """One save under way, in a thread of its own."""

    def __init__(self, step: int, began: float, share: Share | None, records: Records) -> None:
        self.step, self.began, self.stop = step, began, threading.Event()
        self.error: Exception | None = None
        self.stall_s, self.write_s, self.bytes = 0.0, 0.0, 0
        self._share, self._records = share, records
        # Not waited for by an interpreter that ends: what a killed run leaves half is no checkpoint.
        self.thread = threading.Thread(target=self._run, name="mim-save", daemon=True)
        self.thread.start()

    def raise_error(self) -> None:
        """Raise what went wrong, if anything did."""
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            if self._share is not None:
                self.bytes = write_share(self._records.checkpoints, self._share, self.stop)
        except GivenUp:
            pass
        except Exception as error:
            self.error = error
        self.write_s = time.perf_counter() - began


def find_writers(ranks: Ranks, folder: Path) -> tuple[int, ...]:
    """The ranks that see the folder which rank 0 writes checkpoints to, rank 0 first."""
    if ranks.world == 1:
        return (0,)
    mark = ranks.broadcast(folder / f"{TEMPORARY}seen-by-{uuid.uuid4().hex}")
    ranks.on_first(lambda: write_file(mark, b""))
    deadline = time.monotonic() + SEES_S
    while not (sees := mark.exists()) and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    seen = ranks.gather([float(sees)])[:, 0]
    ranks.on_first(mark.unlink)
    return tuple(rank for rank in range(ranks.world) if rank == 0 or seen[rank])


def send_state(ranks: Ranks, state: State | None) -> State:
    """Rank 0's state, on all ranks: for those that do not see its files."""
    shapes = ranks.broadcast([{name: tuple(t.shape) for name, t in part.items()} for part in state or ()])
    parts: list[dict[str, Tensor]] = [{}, {}]
    for number, names in enumerate(shapes):
        for name, shape in names.items():
            tensor = state[number][name] if ranks.rank == 0 and state else torch.empty(shape)
            dist.broadcast(tensor, src=0)
            parts[number][name] = tensor
    return parts[0], parts[1]
