"""Lists made by hand or by another program, CSV, TSV or Parquet: columns path, and subject, role, dataset, split."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.descriptions.listed import SPLITS, Line, Role, listed_as
from data_pipeline.sources.descriptions.place import Place

TABLES = ("subjects.csv", "subjects.tsv", "subjects.parquet")
"""Names by which a table below a source speaks for the files beside and below it."""
SUFFIXES = (".csv", ".tsv", ".parquet")

_ROLES: dict[str, Role] = {
    "": "",
    "image": "image",
    "label": "label",
    "mask": "mask",
    "other": "other_modality",
    "other_modality": "other_modality",
}


def table_lines(place: Place, file: Path, needs_subject: bool) -> Iterator[Line]:
    """The lines of a table.

    Args:
        needs_subject: whether a line without a subject is a mistake.

    Raises:
        SourceError: the table cannot be used as it is.
    """
    rows = _parquet_rows(place, file) if file.suffix.lower() == ".parquet" else _text_rows(place, file)
    for where, row in rows:
        path, subject = _text(place, row, "path", where), _text(place, row, "subject", where)
        if not path or (needs_subject and not subject):
            columns = "path,subject" if needs_subject else "path[,subject,role,dataset,split]"
            place.refuse(f"{where} lacks a path{' or a subject' * needs_subject}; the columns are {columns}")
        role = _ROLES.get(_text(place, row, "role", where).lower())
        if role is None:
            place.refuse(f"{where} has an unknown role; use image, label, mask or other")
        split = _text(place, row, "split", where).lower()
        if split not in SPLITS:
            place.refuse(f"{where} has an unknown split; use train, val or test")
        yield Line(where, path, listed_as(role, subject or None, _text(place, row, "dataset", where), split))


def has_paths(place: Place, file: Path) -> bool:
    """Whether a table has a column of paths: others of its name are tables of something else."""
    try:
        if file.suffix.lower() == ".parquet":
            return "path" in _names(pq.read_schema(file).names)
        first = place.read(file)[:4096].decode("utf-8-sig", "replace").splitlines()[:1]
        return bool(first) and "path" in _names(next(csv.reader(first, delimiter=_delimiter(first[0], file))))
    except (pa.ArrowException, OSError, csv.Error):
        return False


def _text_rows(place: Place, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = place.read(file).decode("utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(first, file), strict=True)
        names = _names(next(reader, []))
        _check_names(place, names)
        for cells in reader:
            if not any(cells):
                continue
            where = f"line {reader.line_num}"
            if len(cells) > len(names):
                place.refuse(f"{where} has {len(cells)} cells under {len(names)} columns; quote paths that hold commas")
            yield where, dict(zip(names, cells, strict=False))
    except (UnicodeDecodeError, csv.Error) as error:
        place.refuse(f"not readable as CSV ({type(error).__name__})")


def _parquet_rows(place: Place, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.ParquetFile(file)
        names = _names(table.schema_arrow.names)
        _check_names(place, names)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", dict(zip(names, row.values(), strict=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        place.refuse(f"not readable as Parquet ({type(error).__name__})")


def _names(names: list[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _check_names(place: Place, names: list[str]) -> None:
    if len(set(names)) != len(names):
        place.refuse("has two columns of one name")


def _delimiter(first: str, file: Path) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    # What spreadsheets write where the comma separates decimals.
    return ";" if ";" in first and "," not in first else ","


def _text(place: Place, row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is not None and not isinstance(value, str | int):
        place.refuse(f"{where} has a {name} that is no text")
    return "" if value is None else str(value).strip()
