"""What rank 0 keeps of a run: lock, journal, checkpoints, tracker. On other ranks the same calls do nothing."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mim_scale.config import PretrainConfig
from mim_scale.config_file import config_values, digest_config
from mim_scale.errors import StoreError
from mim_scale.methods.method import Preview
from mim_scale.store.geometry import Spacing3
from mim_scale.training.checkpoint import Checkpoint, CheckpointFolder, versions
from mim_scale.training.guards import Guards
from mim_scale.training.journal import Journal, read_journal
from mim_scale.training.run_folder import (
    CHECKPOINTS,
    JOURNAL,
    PICTURES,
    RunLock,
    adopt_config,
    config_of_record,
    flatten,
    refuse_other_run,
)
from mim_scale.training.tracking import NoTracker, Status, Tracker, open_tracker
from mim_scale.training.tracking_git import git_state


@dataclass(frozen=True)
class StartingPoint:
    """Where a run is taken up; rank 0 finds it and tells the others."""

    checkpoint: Checkpoint | None
    held_out_step: int
    """The last step with a held-out row; -1 for none."""

    @property
    def step(self) -> int:
        """Updates made already."""
        return 0 if self.checkpoint is None else self.checkpoint.step


class Records:
    """The run folder in the hands of rank 0.

    Args:
        config: The run's settings.
        fingerprint: Of the dataset that it trains on.
        spacing_mm: The smallest and the largest spacing (z, y, x) of the volumes that it trains on, for the record.
        world: Number of ranks, for the record.
        is_kept_here: Whether this is rank 0.
    """

    def __init__(
        self, config: PretrainConfig, fingerprint: str, spacing_mm: list[Spacing3], world: int, is_kept_here: bool
    ) -> None:
        self._config, self._fingerprint, self._world = config, fingerprint, world
        self._spacing_mm = spacing_mm
        self._is_kept_here = is_kept_here
        self._output = Path(config.output)
        self.checkpoints = CheckpointFolder(self._output / CHECKPOINTS, config.checkpoint.keep)
        self._lock: RunLock | None = None
        self._journal: Journal | None = None
        self._tracker: Tracker = NoTracker()
        self.status: Status = "FAILED"
        """How the run ended, for the tracker; whoever ends it otherwise says so here."""

    def take_up(self) -> StartingPoint:
        """Take the folder, see that it is this run's, and find the newest whole checkpoint; rank 0 only.

        Raises:
            ConfigError: another run is alive in the folder, or the config differs in what changes results.
            StoreError: the run was begun on another dataset.
            CheckpointError: none of the checkpoints is whole.
        """
        self._lock = RunLock(self._output)
        self.checkpoints.remove_leftovers()
        checkpoint = self.checkpoints.newest(tell=print)
        if checkpoint is not None:
            where = str(checkpoint.path)
            refuse_other_run(config_of_record(checkpoint.record, where), self._config, where)
            self._refuse_other_store(checkpoint.record.get("fingerprint"))
        self._journal = Journal(self._output / JOURNAL)
        is_begun = checkpoint is not None or self._journal.first_start is not None
        adopt_config(self._config, self._output, is_begun)
        if self._journal.first_start is not None:
            self._refuse_other_store(self._journal.first_start.get("fingerprint"))
        return StartingPoint(checkpoint, self._journal.last_held_out)

    def begin(self, step: int, num_volumes: int, **chosen: Any) -> None:
        """Note that a process took up the run, with what it runs on and what it chose; let the tracker follow."""
        if self._journal is None:
            return
        facts = {
            "fingerprint": self._fingerprint,
            "config_digest": digest_config(self._config),
            "world": self._world,
            "store": self._config.data.store,
            "num_volumes": num_volumes,
            "process": f"{os.getpid()} on {socket.gethostname()}",
            "versions": versions(),
        }
        self._journal.write("start", step, time=time.time(), **facts, **chosen, **git_state())
        self.follow()

    def follow(self) -> None:
        """Let the tracker bring over what it lacks of the run folder."""
        if self._journal is None:
            return
        self._tracker = open_tracker(self._config.tracking, self._output, self._journal.path)
        self._tracker.start(flatten(config_values(self._config)))

    def row(self, kind: str, step: int, **values: Any) -> None:
        """Write a journal row; a step that has one already keeps it."""
        if self._journal is not None:
            self._journal.write(kind, step, time=time.time(), **values)

    def recall_guards(self, start: StartingPoint) -> Guards:
        """What the run's guards knew where it is taken up; rank 0 only, others get guards that know nothing."""
        guards = Guards(self._config.guards)
        if self._journal is not None and start.checkpoint is not None:
            updates = int(start.checkpoint.record.get("updates", start.step))
            guards.recall(read_journal(self._journal.path), start.step, updates)
        return guards

    def facts(self, step: int, updates: int) -> dict[str, Any]:
        """What the record of a checkpoint tells: after `step` steps, `updates` of them made."""
        return {
            "position": step * self._config.train.batch,
            "updates": updates,
            "config": config_values(self._config),
            "config_digest": digest_config(self._config),
            "fingerprint": self._fingerprint,
            "spacing_mm": self._spacing_mm,
            "world": self._world,
        }

    def sync(self) -> None:
        """Make the journal durable: before a checkpoint is published, so that none is newer."""
        if self._journal is not None:
            self._journal.sync()

    def draw(self, previews: Sequence[tuple[Sequence[str], Preview]]) -> None:
        """Write pictures of (volume keys, preview) and the loss curve into `pictures/`; rank 0 only."""
        if self._journal is None:
            return
        from mim_scale.training.pictures import draw_loss_curve, draw_preview

        folder = self._output / PICTURES
        for number, (keys, preview) in enumerate(previews, start=1):
            draw_preview(preview, keys, folder, number)
        draw_loss_curve(read_journal(self._journal.path), folder / "loss.png")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.status = "KILLED"
        self._tracker.close(self.status)
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def _refuse_other_store(self, begun_with: str | None) -> None:
        if begun_with != self._fingerprint:
            raise StoreError(
                f"{self._config.data.store}: its fingerprint is {self._fingerprint[:16]}, the run in {self._output} "
                f"was begun on {str(begun_with)[:16]}: other volumes mean another order; give it that store, "
                "or another output"
            )
