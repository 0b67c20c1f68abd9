"""The kinds of values that settings are made of. Axes are (z, y, x); a single integer means the same on every axis."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Size3 = tuple[int, int, int]


def as_size(value: Any) -> Any:
    """One number as three, a list as a tuple; anything else as it is."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value, value)
    return tuple(value) if isinstance(value, list) else value


def as_tuple(value: Any) -> Any:
    """A list as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def as_spacing(value: Any) -> Any:
    """One number as three floats, a list as a tuple; anything else as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),) * 3
    return as_tuple(value)


Checkpointing = Literal["none", "stem", "second", "all", "auto"]
Positive = Annotated[int, Field(gt=0)]
Size = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(as_size)]
Ratio = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[Ratio | tuple[Ratio, Ratio], BeforeValidator(as_tuple)]
"""One number, or the smallest and the largest of what is drawn for each sample."""
Rate = Annotated[float, Field(ge=0.0)]
Weights = Annotated[tuple[Rate, ...], BeforeValidator(as_tuple)]
Above0 = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_part(text: str) -> str:
    one, many = map(int, text.split("/"))
    if one > many:
        raise ValueError(f"there is no part {one} of {many}")
    return text


Part = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}/[1-9]\d{0,8}$"), AfterValidator(_check_part)]
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Ints = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)]
Spacing = Annotated[tuple[Above0, Above0, Above0], BeforeValidator(as_spacing)]


class Section(BaseModel):
    """A group of settings: frozen, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def divide(size: Size3, by: Size3) -> Size3:
    """Axis by axis, rounded down."""
    return (size[0] // by[0], size[1] // by[1], size[2] // by[2])


def check_divides(name: str, size: Size3, by_name: str, by: Size3) -> None:
    """Raise ValueError where a size is no whole multiple."""
    if any(a % b for a, b in zip(size, by, strict=True)):
        raise ValueError(f"{name} {list(size)} is not a multiple of {by_name} {list(by)} on every axis")
