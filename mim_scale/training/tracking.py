"""Where metrics can be looked at, besides the journal that they are fed from."""

from pathlib import Path
from typing import Any, Literal, Protocol

from mim_scale.config import TrackingConfig

Status = Literal["FINISHED", "KILLED", "FAILED"]


class Tracker(Protocol):
    """A view of the run. No method raises or waits long: a tracker that is away never stops training."""

    def start(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Name the run's settings, once in its life, and begin to follow the journal."""

    def image(self, path: Path) -> None:
        """Show a picture beside the run."""

    def artifact(self, path: Path) -> None:
        """Keep a file beside the run."""

    def close(self, status: Status) -> None:
        """Bring what is left of the journal over, as far as a bounded time allows, and say how the run ended."""


class NoTracker:
    """The journal is enough; also what every rank but the first holds."""

    def start(self, params: dict[str, Any], tags: dict[str, str]) -> None:
        """Nothing."""

    def image(self, path: Path) -> None:
        """Nothing."""

    def artifact(self, path: Path) -> None:
        """Nothing."""

    def close(self, status: Status) -> None:
        """Nothing."""


def open_tracker(config: TrackingConfig, output: Path, journal: Path) -> Tracker:
    """The tracker that the config names, following `journal`; its own files lie in the run folder `output`."""
    if config.mlflow is None:
        return NoTracker()
    from mim_scale.training.tracking_mlflow import MlflowTracker

    return MlflowTracker(config.mlflow, config.experiment, output, journal)


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """A journal row as flat metric names: `loss`, `parts/level_1`, `held_out/trivial_1`, ..."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{inner}": float(number) for inner, number in value.items() if number is not None})
        elif isinstance(value, int | float) and name not in ("step", "time"):
            flat[name] = float(value)
    return flat
