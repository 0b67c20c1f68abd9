"""A watch over the ranks by a channel of its own: what stands still ends all of them, with their stacks told.

A rank that waits in a collective for one that will never come looks like work, for as long as the collective's time
limit. So a thread of every rank talks to rank 0 each second, over a connection that no collective uses. Rank 0 judges:
a rank that says nothing (stopped, cut off) or whose main thread makes no progress is named, all ranks write their
stacks into the run folder and leave with the code of a lost rank, and whoever supervises starts them again. A process
that says nothing is killed by those on its machine: stopped, it would not hear that it is to end, and its launcher
would wait for it.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mim_scale.errors import EXIT_REQUEUE
from mim_scale.training.exit_report import tell_supervisor
from mim_scale.training.processes import ProcessId
from mim_scale.training.ranks import Ranks

BEAT_S = 1.0
POLL_S = 0.25
SILENCE_S = 15.0
"""How long a rank may say nothing: its thread runs whatever the main thread does."""
LEAST_LIMIT_S = 20.0
ALONE_LIMIT_S = 120.0
"""Where nobody waits for this rank, a slow disk may have more time."""
TIMES_LONGEST = 4.0
"""Without a limit in the config, a rank may stand still for this many times its longest time between two beats."""
GONE_S = 5.0
"""A rank whose connection ended without a word may have said why it ends, and have its own way of ending all."""
LEAVE_S = 2.0
"""How long rank 0 gives the others to hear the verdict and write their stacks."""
STACKS = "stacks"
EXCHANGE = "an exchange with other ranks"
PATIENCE_ENDED = "what follows a long task"
UNTIMED = ("start", PATIENCE_ENDED)
"""What says nothing about a rank's pace."""


@dataclass(frozen=True)
class Meeting:
    """Where the watch's connections are taken, known to all ranks."""

    address: str
    port: int
    token: str
    first: ProcessId
    """Rank 0."""


class Watchdog:
    """What a rank's main thread tells its watching thread.

    Args:
        limit_s: How long it may stand still; None for a limit that follows its own pace.
    """

    def __init__(self, limit_s: float | None = None, least_s: float = LEAST_LIMIT_S) -> None:
        self._limit_s, self._least_s = limit_s, least_s
        self._last, self._longest = time.monotonic(), 0.0
        self._doing, self._is_armed = "start", False

    def beat(self, doing: str) -> None:
        """The main thread goes on, with `doing` next."""
        now = time.monotonic()
        if self._doing not in UNTIMED:
            self._longest = max(self._longest, now - self._last)
        self._last, self._doing = now, doing

    def arm(self) -> None:
        """The main thread is expected to go on from now on: the first step, with all that it prepares, is made."""
        self._is_armed = True

    @contextlib.contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Inside, the main thread may take as long as it likes."""
        was_armed, self._is_armed = self._is_armed, False
        self._doing = doing
        try:
            yield
        finally:
            self._last, self._doing, self._is_armed = time.monotonic(), PATIENCE_ENDED, was_armed

    def still(self) -> tuple[float, str]:
        """(seconds beyond the limit, what it does): 0 while all is well."""
        if not self._is_armed:
            return 0.0, self._doing
        limit = self._limit_s or max(self._least_s, TIMES_LONGEST * self._longest)
        since = time.monotonic() - self._last
        return (since if since > limit else 0.0), self._doing


@contextlib.contextmanager
def watched(ranks: Ranks, address: str, output: Path, limit_s: float | None) -> Iterator[Watchdog]:
    """Watch over the ranks until the block ends.

    Args:
        address: Where the others reach rank 0.
        output: The run folder; stacks go below it.
        limit_s: As `Watchdog`'s.
    """
    own = Watchdog(limit_s, LEAST_LIMIT_S if ranks.world > 1 else ALONE_LIMIT_S)
    ending = threading.Event()
    listener = _listen(address) if ranks.rank == 0 and ranks.world > 1 else None
    port = listener.getsockname()[1] if listener is not None else 0
    meeting = ranks.broadcast(Meeting(address, port, secrets.token_hex(16), ProcessId.own()))
    if ranks.rank == 0:
        guard: _First | _Other = _First(own, ranks.world, listener, meeting.token, ending)
    else:
        guard = _Other(own, ranks.rank, meeting, ending)
    thread = threading.Thread(target=_run, args=(guard, ranks.rank, output), name="mim-watchdog", daemon=True)
    thread.start()
    try:
        yield own
    finally:
        ending.set()
        thread.join(SILENCE_S)
        if listener is not None:
            listener.close()


def _listen(address: str) -> socket.socket:
    try:
        return socket.create_server((address, 0))
    except OSError:
        # The others' name for this machine is not one of its own addresses (a relay): take any.
        return socket.create_server(("", 0))


def _run(guard: "_First | _Other", rank: int, output: Path) -> None:
    verdict = guard.watch()
    if not verdict:
        return
    with contextlib.suppress(OSError):
        folder = output / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank_{rank:05d}.txt", "w") as file:
            file.write(verdict + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    if guard.is_judge:
        print(
            f"error: {verdict}; all ranks end, their stacks are in {output / STACKS}; start the same command again to "
            "go on",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(LEAVE_S)
    for process in guard.silent:
        process.kill()
    tell_supervisor(os.environ, code=EXIT_REQUEUE)
    # The main thread may be in a collective that will never return, so nothing can be asked of it.
    os._exit(EXIT_REQUEUE)


class _Lines:
    """Whole JSON lines of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""

    def send(self, **values: Any) -> None:
        self.connection.sendall(json.dumps(values).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None once the other side is gone."""
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        with contextlib.suppress(ValueError):
            return [dict(json.loads(line)) for line in lines]
        return None


class _First:
    """Rank 0's thread: hears all, judges, tells all."""

    is_judge = True

    def __init__(
        self, own: Watchdog, world: int, listener: socket.socket | None, token: str, ending: threading.Event
    ) -> None:
        self._own, self._listener, self._token, self._ending = own, listener, token, ending
        self._world = world
        self.silent: list[ProcessId] = []
        self._heard: dict[int, float] = {}
        self._gone: dict[int, float] = {}
        self._processes: dict[int, ProcessId] = {}
        self._hosts = {0: socket.gethostname()}
        self._still: dict[int, tuple[float, str]] = {}
        self._lines: dict[int, _Lines] = {}

    def watch(self) -> str:
        """Until the block ends: nothing; or what is wrong, after all that can hear were told."""
        with selectors.DefaultSelector() as selector:
            if self._listener is not None:
                self._listener.setblocking(False)
                selector.register(self._listener, selectors.EVENT_READ)
            while not self._ending.is_set():
                if self._listener is None:
                    self._ending.wait(BEAT_S)
                else:
                    self._serve(selector)
                self._still[0] = self._own.still()
                verdict = self._judge()
                if verdict:
                    self.silent = [self._processes[rank] for rank in self._unheard() if rank in self._processes]
                    for lines in self._lines.values():
                        with contextlib.suppress(OSError):
                            lines.send(verdict=verdict, silent=[asdict(process) for process in self.silent])
                    return verdict
        for lines in self._lines.values():
            with contextlib.suppress(OSError):
                lines.send(end=True)
        return ""

    def _serve(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(POLL_S):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.settimeout(BEAT_S)
                selector.register(connection, selectors.EVENT_READ, _Lines(connection))
                continue
            lines: _Lines = key.data
            told = lines.receive()
            for message in told or ():
                self._hear(lines, message)
            if told is None:
                selector.unregister(key.fileobj)
                lines.connection.close()
                for rank in [rank for rank, held in self._lines.items() if held is lines]:
                    self._lines.pop(rank)
                    if self._heard.pop(rank, None) is not None:
                        self._gone[rank] = time.monotonic()

    def _hear(self, lines: _Lines, message: dict[str, Any]) -> None:
        if message.get("token") != self._token:
            return
        rank = int(message["rank"])
        if message.get("end"):
            self._heard.pop(rank, None)
            self._still.pop(rank, None)
            return
        self._lines[rank], self._hosts[rank] = lines, str(message["host"])
        self._processes[rank] = ProcessId(**message["process"])
        self._heard[rank] = time.monotonic()
        self._still[rank] = (float(message["still"]), str(message["doing"]))
        with contextlib.suppress(OSError):
            lines.send()

    def _judge(self) -> str:
        now = time.monotonic()
        for rank in self._unheard():
            return f"{self._named(rank)} has said nothing for {now - self._heard[rank]:.0f} s"
        for rank, gone in sorted(self._gone.items()):
            if now - gone > GONE_S:
                return f"{self._named(rank)} ended without a word {now - gone:.0f} s ago"
        still = {rank: found for rank, found in sorted(self._still.items()) if found[0]}
        # Who waits for others is not to blame, unless all do.
        blamed = {rank: found for rank, found in still.items() if found[1] != EXCHANGE}
        if not blamed and len(still) < self._world:
            return ""
        return "; ".join(
            f"{self._named(rank)} has stood still for {seconds:.0f} s in {doing}"
            for rank, (seconds, doing) in (blamed or still).items()
        )

    def _unheard(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, heard in sorted(self._heard.items()) if now - heard > SILENCE_S]

    def _named(self, rank: int) -> str:
        host = self._hosts.get(rank)
        return f"rank {rank}" + (f" on {host}" if host else "")


class _Other:
    """The thread of every other rank: tells, and hears the verdict."""

    is_judge = False

    def __init__(self, own: Watchdog, rank: int, meeting: Meeting, ending: threading.Event) -> None:
        self._own, self._rank, self._meeting, self._ending = own, rank, meeting, ending
        self.silent: list[ProcessId] = []
        self._process = ProcessId.own()

    def watch(self) -> str:
        """Until the block ends: nothing; or what rank 0 says is wrong, or that it says nothing."""
        heard = time.monotonic()
        try:
            connection = socket.create_connection((self._meeting.address, self._meeting.port), SILENCE_S)
        except OSError as error:
            print(
                f"watchdog: rank {self._rank} does not reach rank 0 at {self._meeting.address}:{self._meeting.port} "
                f"({error}): open the port; what stands still is not seen",
                file=sys.stderr,
                flush=True,
            )
            return ""
        with connection:
            connection.settimeout(BEAT_S)
            lines = _Lines(connection)
            while not self._ending.is_set():
                still, doing = self._own.still()
                try:
                    self._send(lines, still=still, doing=doing)
                    told = lines.receive()
                except OSError:
                    told = None
                for message in told or ():
                    heard = time.monotonic()
                    if message.get("verdict"):
                        self.silent = [ProcessId(**process) for process in message["silent"]]
                        return str(message["verdict"])
                    if message.get("end"):
                        return ""
                if time.monotonic() - heard > SILENCE_S:
                    # Nobody else would say it.
                    self.is_judge, self.silent = True, [self._meeting.first]
                    return (
                        f"rank 0 at {self._meeting.address} has said nothing to rank {self._rank} for {SILENCE_S:.0f} s"
                    )
                self._ending.wait(BEAT_S)
            with contextlib.suppress(OSError):
                self._send(lines, end=True)
        return ""

    def _send(self, lines: _Lines, **values: Any) -> None:
        who = {"token": self._meeting.token, "rank": self._rank, "host": socket.gethostname()}
        lines.send(**who, process=asdict(self._process), **values)
