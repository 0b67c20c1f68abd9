"""The disk that all simulated ranks share: operations take turns, a write can be cut in two, faults come in spells."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.faulty_disk import READS, TAKES_ROOM, FaultyDisk, refusal
from tests.simulation.virtual import Crash, Here


class SharedDisk(FaultyDisk):
    """Stands in for `mim_scale.disk` below the run folder; knows what a power failure would leave.

    Attributes:
        spells: What ails the disk now: "full", "error", "short", "stale"; "deadly" kills who writes next, half-way.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.spells: set[str] = set()
        self._files: list[Any] = []

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        act = {"fsync": self._fsync, "sync": self._sync}.get(name, real)

        def call(*arguments: Any) -> Any:
            world = Here.world
            if world.process.is_dead:
                raise Crash
            world.sleep(Here.simulation.disk_s * world.random.random())
            self._refuse(name, arguments)
            if name == "write" and len(arguments[1]) > 1:
                return self._write(act, *arguments)
            if name in READS and "stale" in self.spells:
                return self._stale(name, arguments[0])
            result = self._do(name, act, arguments)
            if name in ("create", "append"):
                self._files.append(result)
            return result

        return call

    def close(self) -> None:
        """Forget the files that were seen; those of dead processes are closed, as the kernel does."""
        super().close()
        for file in self._files:
            file.close()

    def _refuse(self, name: str, arguments: Any) -> None:
        if "full" in self.spells and name in TAKES_ROOM:
            raise refusal("ENOSPC", arguments)
        if "error" in self.spells:
            # One is enough: whoever meets it tries again or ends.
            self.spells.discard("error")
            raise refusal("EIO", arguments)

    def _write(self, act: Callable[..., Any], file: Any, data: Any) -> int:
        """In two parts: a process can die between them."""
        half = (len(data) + 1) // 2
        written: int = act(file, data[:half])
        if "short" in self.spells:
            return written
        if "deadly" in self.spells:
            self.spells.discard("deadly")
            launch, rank = Here.world.process.seat
            launch.kill(rank)
        Here.world.pause()
        return written + int(act(file, data[half:]))

    def _fsync(self, file: Any) -> None:
        # By its number: another process may have deleted the name meanwhile.
        descriptor = file.fileno()
        self._bytes[os.fstat(descriptor).st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
