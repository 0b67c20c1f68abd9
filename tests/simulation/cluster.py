"""Ranks, launches and a launcher, simulated: the real loop runs on every rank, what is around it is here."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_scale.config import PretrainConfig
from mim_scale.errors import EXIT_REQUEUE, LostRankError, MimScaleError, host_error
from mim_scale.training import loop
from mim_scale.training.ranks import Ranks
from mim_scale.training.stop import SIGNALS, StopRequest
from tests.simulation.virtual import Here, Process

KILLED = -9
NOTICED_S = 17.0
"""When the watch over the ranks ends them after one fell silent (tests/training/test_watchdog.py has the real one)."""


class ProtocolError(Exception):
    """Ranks met in an exchange that is not the same one for all: on a cluster they would hang."""


@dataclass(frozen=True)
class SimRanks(Ranks):
    """A rank whose exchanges go through its launch."""

    launch: "Launch"

    def exchange(self, kind: str, value: Any) -> list[Any]:
        """Every rank's value."""
        return self.launch.exchange(self.rank, kind, value)

    def gather(self, values: Any) -> NDArray[np.float64]:
        return np.array(self.exchange(f"{len(values)} numbers", [float(value) for value in values]))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.exchange("objects", value)

    def broadcast(self, value: Any) -> Any:
        return self.exchange("a broadcast", value)[0]


class SimWatchdog:
    """What the loop tells the watch; a rank that falls silent is ended by its launch."""

    def beat(self, doing: str) -> None:
        pass

    def arm(self) -> None:
        pass

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        yield


class Launch:
    """One start of a run on so many ranks.

    Args:
        config: The run's.
        size: Number of ranks.
        blind: Ranks that do not see the run folder.
        slow: Ranks that compute slowly.
        is_patient: Whether the launcher lets the others end by themselves once one is gone.
    """

    def __init__(
        self, config: PretrainConfig, size: int, blind: frozenset[int], slow: frozenset[int], is_patient: bool
    ) -> None:
        self.config, self.size, self.blind, self._slow, self._is_patient = config, size, blind, slow, is_patient
        self.codes: dict[int, int] = {}
        self.processes = [Process(f"rank {rank}", (self, rank)) for rank in range(size)]
        self.stops = [StopRequest() for _ in range(size)]
        self._is_cut = False
        self._exchanges: dict[int, dict[int, tuple[str, bytes]]] = {}
        self._number = [0] * size

    def start(self) -> None:
        """Let the ranks begin."""
        for rank, process in enumerate(self.processes):
            process.at_death.append(partial(self._is_gone, rank))
            Here.world.spawn(process, partial(self._train, rank), "main")

    @property
    def is_over(self) -> bool:
        """Whether no rank is left."""
        return len(self.codes) == self.size

    def step_s(self, rank: int) -> float:
        """How long a micro-batch takes."""
        return (10.0 if rank in self._slow else 1.0) * (0.5 + Here.world.random.random())

    def kill(self, rank: int) -> None:
        """SIGKILL to a rank."""
        self.codes.setdefault(rank, KILLED)
        Here.world.kill(self.processes[rank])

    def kill_all(self, code: int = KILLED) -> None:
        """All at once: the node, or the watch over the ranks."""
        for rank, process in enumerate(self.processes):
            self.codes.setdefault(rank, code)
            Here.world.kill(process)

    def freeze(self, rank: int) -> None:
        """SIGSTOP to a rank: it says nothing any more, and holds what it holds."""
        if rank not in self.codes:
            self.processes[rank].is_frozen = True
            Here.world.after(NOTICED_S, partial(self.kill_all, EXIT_REQUEUE))

    def cut(self) -> None:
        """The network between the ranks is dead."""
        if self.size > 1:
            self._is_cut = True
            Here.world.after(NOTICED_S, partial(self.kill_all, EXIT_REQUEUE))

    def ask_to_stop(self, rank: int) -> None:
        """SIGTERM to a rank."""
        self.stops[rank].signal = SIGNALS[0]

    def exchange(self, rank: int, kind: str, value: Any) -> list[Any]:
        """Every rank's value, once all have come.

        Raises:
            LostRankError: one is gone.
        """
        number = self._number[rank]
        self._number[rank] += 1
        met = self._exchanges.setdefault(number, {})
        met[rank] = (kind, pickle.dumps(value))
        Here.world.wait(lambda: not self._is_cut and (len(met) == self.size or self._lacks(met)))
        if len(met) < self.size:
            raise LostRankError(f"rank {rank} lost another rank")
        if len({kind for kind, _ in met.values()}) > 1:
            raise ProtocolError(f"exchange {number}: {met}")
        return [pickle.loads(met[other][1]) for other in range(self.size)]

    def _lacks(self, met: dict[int, Any]) -> bool:
        return any(process.is_dead and rank not in met for rank, process in enumerate(self.processes))

    def _train(self, rank: int) -> None:
        ranks = SimRanks(rank, self.size, rank, torch.device("cpu"), self)
        try:
            code = loop._pretrain(self.config, ranks, self.stops[rank], SimWatchdog())  # type: ignore[arg-type]
            ranks.gather([0.0])
        except MimScaleError as error:
            Here.simulation.say(f"rank {rank}: {error}")
            code = error.exit_code
        except OSError as error:
            # As mim_scale.errors.exit_with.
            known = host_error(error)
            if known is None:
                raise
            Here.simulation.say(f"rank {rank}: {known}")
            code = known.exit_code
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        self.codes.setdefault(rank, code)
        Here.world.kill(self.processes[rank])

    def _is_gone(self, rank: int) -> None:
        if not self._is_patient and self.codes.get(rank) != 0:
            Here.world.after(Here.world.random.random() * 3, self.kill_all)
