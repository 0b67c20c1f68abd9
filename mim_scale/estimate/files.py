"""Files that `mim-scale estimate` is given, checked to the last number: what a link, a pace and a plan look like."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from mim_scale.config import Checkpointing, Section
from mim_scale.errors import ConfigError

Count = Annotated[int, Field(ge=1, le=10**6)]
Bytes = Annotated[float, Field(ge=0, le=1e24)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
Lasting = Annotated[float, Field(ge=1e-9, le=1e7)]
"""Seconds of what takes time: rates are made of it."""
LONGEST = 60
"""Characters of a wrong value that are shown."""


class TimedFile(Section):
    """One kind of link, in what `launch/measure_link.py --out` writes."""

    latency_s: Seconds
    bytes_per_s: Annotated[float, Field(ge=1, le=1e18)]
    members: Annotated[int, Field(ge=2, le=10**6)]
    sizes: tuple[Annotated[int, Field(ge=1, le=10**15)], ...]
    seconds: tuple[Lasting, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.sizes) != len(self.seconds):
            raise ValueError(f"has {len(self.sizes)} sizes and {len(self.seconds)} seconds, expected as many")
        return self


class LinkFile(Section):
    """All of it."""

    kind: Literal["mim-scale link"]
    device: Literal["cpu", "cuda"]
    cores: Count
    within: TimedFile | None
    between: TimedFile | None


class PaceFile(Section):
    """A pace, field by field as `scaling.Pace` has it."""

    micro_batch_s: Lasting
    spread_s: Seconds
    update_s: Seconds
    read_s: Seconds
    read_core_s: Seconds
    is_on_cores: bool
    crowding: Annotated[float, Field(ge=0, le=1e6)]
    copy_s: Seconds
    write_s: Seconds
    held_out_s: Seconds


class CalibrationFile(Section):
    """A pace and what it was measured on, as `pace.Calibration` has it."""

    pace: PaceFile
    source: str
    device: Literal["cpu", "cuda"]
    cores: Count
    steps: Count
    policy: Checkpointing
    peak_bytes: Annotated[int, Field(ge=0, le=10**18)]
    of: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pace.is_on_cores != (self.device == "cpu"):
            raise ValueError(f"device is {self.device}, and pace.is_on_cores {self.pace.is_on_cores}")
        return self


class EstimateFile(Section, extra="ignore"):
    """Of what `mim-scale estimate --json` prints, the pace."""

    calibration: CalibrationFile


class PlanFile(Section, extra="ignore"):
    """Of what `mim-scale data plan --json` prints, the size of the corpus."""

    num_sources: Annotated[int, Field(ge=0, le=10**12)]
    num_refused: Annotated[int, Field(ge=0)]
    bytes_stored: Bytes

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_refused > self.num_sources:
            raise ValueError(f"num_refused is {self.num_refused}, more than num_sources {self.num_sources}")
        return self


Kind = TypeVar("Kind", bound=Section)


def read_file(kind: type[Kind], path: Path, option: str, wanted: str, remedy: str = "") -> Kind:
    """A JSON file's content.

    Args:
        option: That named it.
        wanted: The end of "path is ...", where it is another file.
        remedy: Behind the reason of a file that cannot be read.

    Raises:
        ConfigError: the file is missing or another one, with the first value that is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}{remedy}") from None
    except ValidationError as error:
        raise ConfigError(f"{option} {path}: is {wanted}: {_explained(error.errors()[0])}") from None


def _explained(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return f"{key + ' ' if key else ''}{error['ctx']['error']}"
    if error["type"] == "json_invalid":
        return "it is no JSON"
    shown = repr(error["input"])
    shown = shown if len(shown) <= LONGEST else shown[:LONGEST] + " ..."
    return f"{key or 'all of it'} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"
