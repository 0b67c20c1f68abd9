"""What the simulated loop computes with: a state that tells its own history, a stream of positions, an MLflow."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.sampling.order import volume_at
from mim_scale.training.checkpoint import Piece
from mim_scale.training.engine import shared_out
from mim_scale.training.schedule import learning_rate
from tests.simulation.virtual import Here

SHAPES = {"w": (3, 5), "b": (4,), "odd": (1,), "none": (0, 2)}


@dataclass(frozen=True)
class Positions:
    """A batch of nothing but its positions and the keys of the volumes there."""

    positions: tuple[int, ...]
    keys: tuple[str, ...]


class Model(nn.Module):
    """Weights that hold what was applied to them: `history` the positions, in order, -1 where none is yet."""

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.history = nn.Parameter(torch.full((num_positions,), -1.0))
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def apply(
    state: dict[str, Tensor], moments: dict[str, Tensor], positions: Sequence[int], rate: float, updates: int
) -> None:
    """One update, in place, after `updates` others: the same whoever computes it; order, rate and count all matter."""
    values = torch.tensor([float(position) for position in positions])
    first = int((state["history"] >= 0).sum())
    state["history"][first : first + len(values)] = values
    grad = float((values * torch.arange(1.0, len(values) + 1)).sum())
    for name in SHAPES:
        mean, square = moments[f"{name}/exp_avg"], moments[f"{name}/exp_avg_sq"]
        mean.mul_(0.5).add_(grad)
        square.mul_(0.75).add_(grad * grad)
        state[name].sub_(rate * mean / (square.sqrt() + updates + 1))


def loss_of(positions: Sequence[int], bad: frozenset[int]) -> float:
    """Mean over a micro-batch; not finite where it holds a bad position."""
    return math.nan if bad & set(positions) else 1 + math.fsum(position % 17 for position in positions) / len(positions)


@dataclass(frozen=True)
class Truth:
    """What a run is that nothing happens to."""

    states: list[dict[str, Tensor]]
    """After each step, that before the first one included."""
    losses: list[float | None]


def uninterrupted(config: PretrainConfig, bad: frozenset[int]) -> Truth:
    """A run from its first step to its last, in one go."""
    train = config.train
    model, moments, losses = Model(train.steps * train.batch), new_moments(), list[float | None]()
    updates = 0
    state = {name: value.detach() for name, value in model.named_parameters()}
    states = [{name: value.clone() for name, value in state.items()}]
    for step in range(train.steps):
        positions = range(step * train.batch, (step + 1) * train.batch)
        loss = loss_of(positions, bad)
        losses.append(loss if math.isfinite(loss) else None)
        if math.isfinite(loss):
            apply(state, moments, positions, learning_rate(step, config.optimizer, train), updates)
            updates += 1
        states.append({name: value.clone() for name, value in state.items()})
    return Truth(states, losses)


def new_moments() -> dict[str, Tensor]:
    """Before the first update."""
    return {f"{name}/{m}": torch.zeros(shape) for name, shape in SHAPES.items() for m in ("exp_avg", "exp_avg_sq")}


class SimEngine:
    """The engine protocol; every rank holds the whole state, and gradients are exchanged as positions."""

    def __init__(self, module: Model, ranks: Any, bad: frozenset[int], is_cut_up: bool) -> None:
        self.module, self._ranks, self._bad, self._is_cut_up = module, ranks, bad, is_cut_up
        self._moments, self._rate, self._updates = new_moments(), 0.0, 0
        self._own: list[int] = []
        self._all: list[int] = []

    def set_rates(self, rate: float) -> None:
        self._rate = rate

    def forward_backward(self, batch: Positions, last: bool) -> dict[str, Tensor]:
        Here.world.sleep(self._ranks.launch.step_s(self._ranks.rank))
        self._own += batch.positions
        if last:
            gathered = self._ranks.exchange("reduction", self._own)
            self._own, self._all = [], [position for own in gathered for position in own]
        loss = torch.tensor(loss_of(batch.positions, self._bad), dtype=torch.float64)
        return {"loss": loss, "level_1": loss / 2}

    def update(self, leave_out: bool = False) -> float:
        if not leave_out:
            state = {name: value.detach() for name, value in self.module.named_parameters()}
            apply(state, self._moments, self._all, self._rate, self._updates)
            self._updates += 1
        return 1.0

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, value in self.module.named_parameters():
            if self._is_cut_up:
                # As ZeRO-3: a tensor is put together by all ranks.
                self._ranks.exchange("a tensor", name)
            yield "weights", name, value
        for name, value in self._moments.items():
            yield "moments", name, value

    def pieces(self) -> Iterator[Piece]:
        rank, world = self._ranks.rank, self._ranks.world
        state = [("weights", *entry) for entry in self.module.named_parameters()]
        state += [("moments", *entry) for entry in self._moments.items()]
        if not self._is_cut_up:
            yield from shared_out(state, rank, range(world))
            return
        for kind, name, value in state:
            share = -(-value.numel() // world)
            part = value.detach().flatten()[rank * share : (rank + 1) * share]
            if part.numel() or not value.numel():
                yield Piece(kind, name, tuple(value.shape), rank * share if part.numel() else 0, part)

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int) -> None:
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(weights[name])
        self._moments = {name: value.clone() for name, value in moments.items()}
        self._updates = updates

    def close(self) -> None:
        pass


class SimStream:
    """Batches as the schedule asks for them."""

    def __init__(self, num_volumes: int, seed: int) -> None:
        self._num_volumes, self._seed = num_volumes, seed

    def batches(self, schedule: Iterable[Sequence[int]]) -> Iterator[Positions]:
        for positions in schedule:
            Here.world.sleep(0.01)
            keys = tuple(f"v{volume_at(position, self._num_volumes, self._seed)}" for position in positions)
            yield Positions(tuple(positions), keys)

    def __enter__(self) -> "SimStream":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@dataclass
class MlflowServer:
    """What MLflow has, and what ails it now: "down", "slow", or "deaf": it does what is asked, the answer is lost."""

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ails: set[str] = field(default_factory=set)

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        world = Here.world
        world.sleep(20.0 if "slow" in self.ails else 0.02)
        if "down" in self.ails:
            raise ConnectionError("refused")
        result = getattr(self, f"_{name}")(*arguments, **named)
        if "deaf" in self.ails and world.random.random() < 0.5:
            raise TimeoutError("no answer")
        world.sleep(0.02)
        return result

    def _get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1")

    def _search_runs(self, experiments: list[str], query: str) -> list[Any]:
        return [
            SimpleNamespace(info=SimpleNamespace(run_id=run)) for run, held in self.runs.items() if held["key"] in query
        ]

    def _create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        run = f"run{len(self.runs)}"
        self.runs[run] = {"key": next(iter(tags.values())), "points": [], "files": set(), "status": "RUNNING"}
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def _get_run(self, run: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=run, status=self.runs[run]["status"]))

    def _update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    _set_terminated = _update_run

    def _log_batch(
        self, run: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> None:
        self.runs[run]["points"] += [(metric.key, metric.step, metric.value) for metric in metrics]

    def _log_artifact(self, run: str, path: str, folder: str | None = None) -> None:
        self.runs[run]["files"].add(path)

    def _log_text(self, run: str, text: str, name: str) -> None:
        self.runs[run]["files"].add(name)

    def _log_inputs(self, run: str, datasets: list[Any]) -> None:
        self.runs[run]["files"].add("dataset")

    def _get_metric_history(self, run: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=step) for name, step, _ in self.runs[run]["points"] if name == key]


class _Entity:
    """An entity of MLflow: what it was made of."""

    def __init__(self, key: Any = None, value: Any = None, timestamp: int = 0, step: int = 0, **more: Any) -> None:
        self.key, self.value, self.step = key, value, step


def mlflow_modules(server: Callable[[], MlflowServer]) -> dict[str, ModuleType]:
    """Modules that stand for MLflow's client."""

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **named: server().call(name, *arguments, **named)

    mlflow, entities, exceptions = (ModuleType(f"mlflow{name}") for name in ("", ".entities", ".exceptions"))
    mlflow.MlflowClient = Client  # type: ignore[attr-defined]
    for name in ("Metric", "Param", "RunTag", "Dataset", "DatasetInput", "InputTag"):
        setattr(entities, name, _Entity)
    exceptions.MlflowException = type("MlflowException", (Exception,), {})  # type: ignore[attr-defined]
    return {module.__name__: module for module in (mlflow, entities, exceptions)}
