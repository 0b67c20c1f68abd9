"""Where metrics can be looked at, besides the journal that they are fed from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from mim_scale.config import TrackingConfig

Status = Literal["FINISHED", "KILLED", "FAILED"]


class Tracker(Protocol):
    """A view of the run's folder. No method raises or waits long: a tracker that is away never stops training."""

    def start(self, params: dict[str, Any]) -> None:
        """Name the run's settings, once in its life, and begin to follow its folder."""

    def close(self, status: Status) -> None:
        """Bring what is left over, as far as a bounded time allows, and say how the run ended."""


class NoTracker:
    """The journal is enough; also what every rank but the first holds."""

    def start(self, params: dict[str, Any]) -> None:
        """Nothing."""

    def close(self, status: Status) -> None:
        """Nothing."""


class Tail:
    """A file of journal rows that grows; each whole row is read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Whole rows after the last one read; a missing file has none."""
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def open_tracker(config: TrackingConfig, output: Path, journal: Path) -> Tracker:
    """The tracker that the config names, following `journal` and what else lies in the run folder `output`."""
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
