"""The report's table of volumes: one row each, which the page's script sorts and filters. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mim_scale.store.manifest import Row

_COLUMNS = (
    "volume",
    "subject",
    "group",
    ">slices",
    ">rows",
    ">columns",
    ">spacing z",
    ">spacing y",
    ">spacing x",
    ">thickness",
    ">mean HU",
    ">distance",
    ">outlier score",
    "manufacturer",
    "scanner",
    "kernel",
    ">kV",
    ">MB stored",
    ">ratio",
    "format",
    "flags",
    "repairs",
)
_WRAPPED = ("flags", "repairs")

Cell = str | tuple[float, str]
"""Text; or a number to sort by and the text that is shown."""


@dataclass(frozen=True)
class Listed:
    """A volume of the table."""

    row: Row
    distance: float
    """Of its HU histogram from that of all voxels, in HU."""
    score: float
    """NaN where it is no outlier."""


def volume_table(listed: Sequence[Listed], num_volumes: int) -> str:
    """The table with its filter; says how many of the store's volumes are in it."""
    left_out = num_volumes - len(listed)
    words = f"{len(listed):,} of {num_volumes:,} volumes"
    words += (
        f": {left_out:,} are not on this page, which holds outliers first and then volumes in the order of their keys; "
        "manifest.parquet has them all"
        if left_out
        else ""
    )
    head = "".join(
        f'<th scope="col" data-name="{name.replace(" ", "-")}"{kind} aria-sort="none">'
        f'<button type="button">{escape(name)}</button></th>'
        for name, kind in ((name.lstrip(">"), ' class="n"' if name.startswith(">") else "") for name in _COLUMNS)
    )
    return (
        f"<p>{words}. Spacing and thickness in mm. An empty cell: no header says it, the volume is no outlier, or its "
        "subject shares no near-copy.</p>"
        '<form class="filter" id="filter-form" hidden><label for="filter">Show rows that contain</label>'
        '<input id="filter" type="search" placeholder="all of these words, such as siemens face" autocomplete="off">'
        '<output id="filter-count" for="filter"></output></form>'
        '<p class="printed">Printed are the first 50 of these rows.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of volumes"><table id="volume-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_table_row, listed))}</tbody></table></div>"
    )


def _table_row(listed: Listed) -> str:
    row = listed.row
    cells: tuple[Cell, ...] = (
        row.key,
        row.subject,
        row.group if row.group != row.subject else "",
        *(_number(length, "d") for length in row.shape),
        *(_number(spacing, ".3g") for spacing in row.spacing_mm),
        _number(row.slice_thickness_mm or math.nan, ".3g"),
        _number(row.hu_mean, ".0f"),
        _number(listed.distance, ".0f"),
        _number(listed.score, ".1f"),
        row.manufacturer,
        row.model,
        row.kernel,
        _number(row.tube_kv or math.nan, ".0f"),
        _number(row.bytes_stored / 1e6, ".1f"),
        _number(row.bytes_raw / max(1, row.bytes_stored), ".2f"),
        row.source_format,
        ", ".join(row.flags).replace("_", " "),
        ", ".join(row.repairs).replace("_", " "),
    )
    return f'<tr id="v-{escape(row.key)}">{"".join(map(_cell, _COLUMNS, cells))}</tr>'


def _cell(name: str, value: Cell) -> str:
    if isinstance(value, str):
        kind = ' class="wrap"' if name in _WRAPPED else ""
        return f"<td{kind}>{escape(value)}</td>"
    number, text = value
    return f'<td class="n" data-v="{"" if math.isnan(number) else repr(float(number))}">{text}</td>'


def _number(number: float, form: str) -> tuple[float, str]:
    """(to sort by, to show)."""
    return number, "" if math.isnan(number) else format(number, form)
