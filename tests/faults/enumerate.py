"""Every fault at every operation of whatever writes: what is left is the old state or the new one, bit for bit."""

import shutil
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.faulty_disk import CRASHES, POWER, REFUSALS, TWISTS, Crash, FaultyDisk, applies, still_disk


@dataclass(frozen=True)
class Writing:
    """Something that writes below a folder, and how to look at what it left."""

    name: str
    prepare: Callable[[Path], None]
    """Makes the old state in an empty folder."""
    act: Callable[[Path], None]
    """Makes the new state of it, by operations of `mim_scale.disk` alone."""
    look: Callable[[Path], Hashable]
    """Opens what is there as the program would, and tells all of it."""
    refused_as: type[Exception]
    """What a refusal of the disk ends as."""
    unsynced: tuple[str, ...] = ()
    """Names in the old state that its maker never synced."""


@dataclass
class Outcomes:
    """What the cases of one writing came to."""

    operations: int = 0
    cases: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.cases.values())


def enumerate_faults(writing: Writing, folder: Path) -> Outcomes:
    """Try every fault at every operation; asserts what the module says."""
    outcomes = Outcomes()
    still = still_disk()
    try:
        template = folder / "old"
        template.mkdir()
        writing.prepare(template)
        case = _Cases(writing, template, folder / "case")
        outcomes.operations = len(case.operations)
        for fault in (*CRASHES, *REFUSALS, *TWISTS):
            for at, operation in enumerate(case.operations):
                if applies(fault, operation):
                    outcomes.cases[fault] += case.run(fault, at)
    finally:
        still.undo()
    return outcomes


class _Cases:
    def __init__(self, writing: Writing, template: Path, path: Path) -> None:
        self._writing, self._template, self._path = writing, template, path
        self._fresh()
        self._old = writing.look(path)
        self._fresh()
        with FaultyDisk(path) as disk:
            writing.act(path)
        disk.close()
        self.operations = disk.seen
        self._new = writing.look(path)
        assert self._old != self._new
        assert len(self.operations) > 2

    def run(self, fault: str, at: int) -> int:
        """One fault at one operation; returns how many cases that was."""
        modes = POWER if fault in CRASHES else POWER[:1]
        for power in modes:
            where = f"{self._writing.name}: {fault} at {at} ({self.operations[at]}), {power}"
            self._fresh()
            disk = FaultyDisk(self._path, at, fault)
            for name in self._writing.unsynced:
                disk.forget(self._path / name)
            with disk:
                ended = self._act(fault, where)
            if ended == "done":
                # What was said to be done must survive anything.
                power = POWER[1]  # noqa: PLW2901
            assert ended != "refused at length", where
            disk.leave(power)
            disk.close()
            found = self._writing.look(self._path)
            assert found in ((self._new,) if ended == "done" else (self._old, self._new)), where
            self._writing.act(self._path)
            assert self._writing.look(self._path) == self._new, f"{where}, tried again"
        return len(modes)

    def _act(self, fault: str, where: str) -> str:
        try:
            self._writing.act(self._path)
        except Crash:
            assert fault in CRASHES, where
            return "crashed"
        except self._writing.refused_as as error:
            assert fault not in CRASHES, where
            return "refused" if "\n" not in str(error) else "refused at length"
        # Deleting what is no longer needed may fail without a word; a late crash may leave nothing to do.
        assert fault not in CRASHES, where
        return "done"

    def _fresh(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        shutil.copytree(self._template, self._path)
