"""Of what `mim-scale doctor` finds, and what it leaves."""

from pathlib import Path

from mim_scale.doctor.finding import Finding


def levels(found: list[Finding]) -> list[str]:
    return [one.level for one in found]


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))
