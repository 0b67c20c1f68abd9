"""The journal of a run, `journal.jsonl`: one JSON line a step, the truth that every other view of the run is fed from.

Rows have a `kind`:
  start     a process took up the run: step, world, fingerprint, config_digest, store, num_volumes, process, versions,
            device (cpu or cuda), hosts (how many), activation_checkpointing and zero_stage (where those are auto, what
            was chosen), and, where its code lies in a git checkout, commit and is_dirty
  step      one update: step (counted from 1), epoch, position, loss, parts, learning_rate, grad_norm,
            samples_per_second, data_wait (share of the time); null for what is not finite. A step that was left out has
            `left_out`, a spike that was not has `noted`: the reason; both have `volumes`, the keys of what was seen.
            On several ranks slowest_rank, and slowest_times: its own work by that of the middle of the ranks
  save      a checkpoint: step, stall_s (training stood still), write_s (until it stood), bytes
  held_out  step (updates made so far) and held_out: the loss, its parts, the trivial predictor's as `trivial_1` ...

A step has one row however often it was computed: a run that goes on from an older checkpoint repeats steps, bit for
bit, and does not write them again.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mim_scale import disk
from mim_scale.commit import make_folder, write_all
from mim_scale.errors import CheckpointError

ONCE = ("step", "held_out")
"""Kinds of which each step has one row."""


class Journal:
    """The journal, open for appending by the one process that owns the run folder."""

    def __init__(self, path: Path) -> None:
        """Open or make the journal; a last line that a killed process left unfinished is cut off.

        Raises:
            CheckpointError: a line before the last one is not JSON.
        """
        self.path = path
        make_folder(path.parent)
        self._last = dict.fromkeys(ONCE, -1)
        self.first_start: dict[str, Any] | None = None
        whole = 0
        for row, end in _rows_with_ends(path):
            whole = end
            if row["kind"] in self._last:
                self._last[row["kind"]] = max(self._last[row["kind"]], int(row["step"]))
            elif row["kind"] == "start" and self.first_start is None:
                self.first_start = row
        is_new = not path.exists()
        self._file = disk.append(path)
        if is_new:
            disk.sync(path.parent)
        self._cut(whole)

    @property
    def last_step(self) -> int:
        """The last step that has a row; -1 for none."""
        return self._last["step"]

    @property
    def last_held_out(self) -> int:
        """The last step with a held-out row; -1 for none."""
        return self._last["held_out"]

    def write(self, kind: str, step: int, **values: Any) -> bool:
        """Append a row, unless the step has one of this kind already; returns whether it was written.

        One write call a row, so that a kill leaves it whole or leaves a last line that the next start cuts off.
        """
        if kind in self._last:
            if step <= self._last[kind]:
                return False
            self._last[kind] = step
        row = {"kind": kind, "step": step, **values}
        self._append((json.dumps(row, allow_nan=False) + "\n").encode())
        return True

    def _append(self, line: bytes) -> None:
        try:
            write_all(self._file, line)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut(self._end)
            raise CheckpointError(
                f"{self.path}: cannot be written ({error.strerror}); make room, then start the same command again"
            ) from None
        self._end += len(line)

    def _cut(self, end: int) -> None:
        """Leave out what follows the last whole row, which ends there."""
        if os.fstat(self._file.fileno()).st_size != end:
            disk.truncate(self._file, end)
        self._end = end

    def sync(self) -> None:
        """Make the rows durable: before a checkpoint, so that none is newer than the journal."""
        disk.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal, in order; an unfinished last line is left out, a missing file has none.

    Raises:
        CheckpointError: a line before the last one is not JSON.
    """
    return [row for row, _ in _rows_with_ends(path)]


def _rows_with_ends(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row with the number of bytes up to its end."""
    end = 0
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is None:
                if file.read(1):
                    raise CheckpointError(
                        f"{path}: line {number} is not a row of the journal; repair it or move the file away"
                    )
                return
            end += len(line)
            yield row, end


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "kind" in row and isinstance(row.get("step"), int) else None
