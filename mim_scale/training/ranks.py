"""The processes that train together, and the few exchanges they need besides the gradients.

Numbers are gathered in rank order and summed by the caller in that order, so every rank computes the same total. An
error on one rank ends all of them: `agree` and `together` let each learn of it before it would wait for the others in
vain.
"""

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import HashStore

from mim_scale.errors import BugError, LostRankError, MimScaleError, host_error
from mim_scale.training.placement import Placement, exported
from mim_scale.training.stop import signals_end_the_process

T = TypeVar("T")

TIMEOUT = timedelta(minutes=15)
"""How long a rank waits for the others, at the start and in every exchange: longer than a slow disk takes."""


PATIENCE_S = 20.0
"""How long a rank waits for the others without a word."""


class AllRanksEnd(SystemExit):
    """Every rank ends with one code; the line that says why was already printed, once.

    Attributes:
        line: that line.
    """

    def __init__(self, code: int, line: str) -> None:
        super().__init__(code)
        self.line = line


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes, the number it has on its machine, and the device it computes on."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    def gather(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Every rank's numbers, float64 [world, len(values)], in rank order, on all ranks."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return own.numpy()[None]
        parts = [torch.empty_like(own) for _ in range(self.world)]
        with _lost_peer_is_an_error(self.rank):
            dist.all_gather(parts, own)
        return torch.stack(parts).numpy()

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value in rank order, on all ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _lost_peer_is_an_error(self.rank):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        with _lost_peer_is_an_error(self.rank):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        received: T = box[0]
        return received

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every rank at the same point; if it fails on one, all of them end.

        Raises:
            MimScaleError: the action's own, when there is one rank.
            AllRanksEnd: when there are several; the lowest failing rank has printed its line.
        """
        try:
            result = action()
        except MimScaleError as error:
            self.agree(error)
            raise
        except Exception as error:
            if self.world == 1 or is_lost_peer(error):
                raise
            # The others must not wait for this rank.
            known: MimScaleError | None = host_error(error) if isinstance(error, OSError) else None
            if known is None:
                traceback.print_exc()
                known = BugError(f"rank {self.rank}: {type(error).__name__}, see the lines above; please report it")
            self.agree(known)
            raise
        self.agree(None)
        return result

    def on_first(self, action: Callable[[], T]) -> T:
        """Do something on rank 0 alone and give every rank its result; if it fails, all of them end."""
        done = self.together(lambda: action() if self.rank == 0 else None)
        return self.broadcast(done)  # type: ignore[return-value]  # rank 0's value is the one that arrives

    def agree(self, error: MimScaleError | None) -> None:
        """Go on when no rank has an error; otherwise end all of them with the lowest failing rank's line and code."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        if not self.gather([float(error is not None)]).any():
            return
        self._end_all(error)

    def fail(self, error: MimScaleError) -> NoReturn:
        """End all ranks with an error that each of them knows of; it is told once."""
        if self.world == 1:
            raise error
        self._end_all(error if self.rank == 0 else None)

    def _end_all(self, error: MimScaleError | None) -> NoReturn:
        told = self.gather_objects(None if error is None else (error.exit_code, str(error)))
        first = next(rank for rank, entry in enumerate(told) if entry is not None)
        code, line = told[first] or (1, "")
        if self.rank == first:
            print(f"error: {line}", file=sys.stderr, flush=True)
        # Nobody leaves before the line is out: a launcher ends the rest as soon as one is gone.
        self.gather([0.0])
        raise AllRanksEnd(code, line)


@contextlib.contextmanager
def joined(placement: Placement, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Meet the other ranks, choose the device, and part from them at the end.

    Args:
        placement: Of this rank.
        timeout: How long it waits for the others, at the start and in every exchange.

    Raises:
        LostRankError: the others did not come, or went away during the work.
    """
    device = _device(placement)
    with exported(placement), _deterministic(device):
        _meet(placement, device, timeout)
        try:
            yield Ranks(placement.rank, placement.world, placement.local_rank, device)
        except RuntimeError as error:
            if placement.world > 1 and is_lost_peer(error):
                raise _lost_peer(placement.rank, error) from None
            raise
        finally:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _meet(placement: Placement, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if placement.world == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    patience = threading.Timer(PATIENCE_S, _say_waiting, [placement, timeout])
    patience.daemon = True
    patience.start()
    try:
        # The wait is not Python's: a signal that is only remembered would not be heard until the others came.
        with signals_end_the_process():
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        # A machine that is being replaced is away for a while: whoever starts this again may meet it.
        raise LostRankError(
            f"rank {placement.rank} of {placement.world} did not meet the others at "
            f"{placement.address}:{placement.port} from {socket.gethostname()}: {_short(error)}; "
            + (
                f"another run has port {placement.port}: give the launcher another --master_port"
                if "eaddrinuse" in str(error).lower()
                else "check that all ranks started and that the port is open"
            )
        ) from None
    finally:
        patience.cancel()


def _say_waiting(placement: Placement, timeout: timedelta) -> None:
    print(
        f"rank {placement.rank} of {placement.world} on {socket.gethostname()} waits for the others at "
        f"{placement.address}:{placement.port} (up to {timeout.total_seconds() / 60:g} min)",
        file=sys.stderr,
        flush=True,
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of the communication library says that another rank went away."""
    text = str(error).lower()
    words = (
        "connection closed by peer",
        "connection reset",
        "broken pipe",
        "socket error",
        "socketclosed",
        "timed out",
    )
    return isinstance(error, dist.DistError) or ("gloo" in text and any(word in text for word in words))


def _lost_peer(rank: int, error: BaseException) -> LostRankError:
    return LostRankError(
        f"rank {rank} lost another rank ({_short(error)}); that rank's own message says why; start the same command "
        "again to go on"
    )


@contextlib.contextmanager
def _lost_peer_is_an_error(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost_peer(rank, error) from None


def _device(placement: Placement) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # srun may show each task its own GPU only: then it is number 0 whatever the local rank.
    device = torch.device("cuda", placement.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a CPU: one thread a rank unless OMP_NUM_THREADS is set, and only algorithms that repeat bit by bit."""
    if device.type != "cpu":
        yield
        return
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
