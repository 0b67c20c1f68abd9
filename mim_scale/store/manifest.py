"""What a dataset holds and what it refused, one row each, as Parquet that any reader of tables opens.

Rows carry numbers and hashes only: no file names, no patient names, no dates.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mim_scale.commit import write_file
from mim_scale.errors import ConfigError, DamagedError
from mim_scale.store.geometry import Size3, Spacing3, size3


@dataclass(frozen=True)
class Row:
    """One stored volume."""

    key: str
    """Name of its folder in volumes/, without .zarr: first 16 hex digits of content_hash."""
    subject: str
    """Pseudonym of the person; all volumes of one person stay on one side of a split."""
    content_hash: str
    shape: Size3
    spacing_mm: Spacing3
    affine: tuple[float, ...]
    """16 numbers, row by row: voxel index (x, y, z, 1) -> RAS millimetres."""
    hu_min: int
    hu_max: int
    hu_mean: float
    bytes_raw: int
    bytes_stored: int
    source_format: str
    """nifti, nrrd, mha or dicom."""
    repairs: tuple[str, ...] = ()
    """What was changed on the way in, as codes: reoriented, rescaled, padding_mapped, resampled, ..."""


@dataclass(frozen=True)
class QuarantineRow:
    """One input that was refused."""

    source_key: str
    """First 16 hex digits of the SHA-256 of the input's path relative to the source folder."""
    source_format: str
    reason: str
    detail: str
    """One line, without file names."""


_ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("spacing_mm", pa.list_(pa.float64()), nullable=False),
        pa.field("affine", pa.list_(pa.float64()), nullable=False),
        pa.field("hu_min", pa.int32(), nullable=False),
        pa.field("hu_max", pa.int32(), nullable=False),
        pa.field("hu_mean", pa.float64(), nullable=False),
        pa.field("bytes_raw", pa.int64(), nullable=False),
        pa.field("bytes_stored", pa.int64(), nullable=False),
        pa.field("source_format", pa.string(), nullable=False),
        pa.field("repairs", pa.list_(pa.string()), nullable=False),
    ]
)
_QUARANTINE = pa.schema([pa.field(field.name, pa.string(), nullable=False) for field in fields(QuarantineRow)])


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by these rows, sorted by key."""
    write_file(path, rows_bytes(rows))


def write_quarantine(path: Path, rows: Iterable[QuarantineRow]) -> None:
    """Replace the file by these rows, sorted by source_key."""
    write_file(path, quarantine_bytes(rows))


def rows_bytes(rows: Iterable[Row]) -> bytes:
    """The rows as the bytes of a Parquet file."""
    return _parquet(sorted(rows, key=lambda row: row.key), _ROWS)


def quarantine_bytes(rows: Iterable[QuarantineRow]) -> bytes:
    """The refused inputs as the bytes of a Parquet file."""
    return _parquet(sorted(rows, key=lambda row: (row.source_key, row.reason)), _QUARANTINE)


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a manifest, sorted by key.

    Raises:
        DamagedError: the file is missing or is no manifest.
    """
    return tuple(_row(values) for values in _read(path, _ROWS))


def read_quarantine(path: Path) -> tuple[QuarantineRow, ...]:
    """The refused inputs, sorted by source_key.

    Raises:
        DamagedError: the file is missing or is no quarantine table.
    """
    return tuple(QuarantineRow(**values) for values in _read(path, _QUARANTINE))


def split_subjects(rows: Sequence[Row], seed: int, held_out_subjects: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training rows, held-out rows): no person is on both sides, whatever the order of the rows.

    A subject's rank depends on the seed and its own name alone, so a growing dataset moves few subjects across.

    Raises:
        ConfigError: nothing is left to train on.
    """
    subjects = sorted({row.subject for row in rows}, key=lambda subject: (_rank(seed, subject), subject))
    if held_out_subjects >= len(subjects):
        raise ConfigError(
            f"data.held_out_subjects is {held_out_subjects}, but the store holds volumes of {len(subjects)} subjects: "
            "nothing is left to train on; lower it or add data"
        )
    held_out = set(subjects[:held_out_subjects])
    return (
        tuple(row for row in rows if row.subject not in held_out),
        tuple(row for row in rows if row.subject in held_out),
    )


def _rank(seed: int, subject: str) -> str:
    return hashlib.sha256(f"{seed}\n{subject}".encode()).hexdigest()


def _parquet(rows: Sequence[Row] | Sequence[QuarantineRow], schema: pa.Schema) -> bytes:
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _read(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{path}: not readable as Parquet ({_one_line(error)}); build the store again") from None
    if not table.schema.equals(schema):
        raise DamagedError(f"{path}: has columns {table.schema.names}, expected {schema.names}; build the store again")
    values: list[dict[str, Any]] = table.to_pylist()
    return values


def _row(values: dict[str, Any]) -> Row:
    z, y, x = values["spacing_mm"]
    return Row(
        **values
        | {
            "shape": size3(values["shape"]),
            "spacing_mm": (z, y, x),
            "affine": tuple(values["affine"]),
            "repairs": tuple(values["repairs"]),
        }
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
