"""What a dataset holds and what it refused, one row each, as Parquet that any reader of tables opens.

Rows carry numbers and hashes only: no file names, no patient names, no dates.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mim_scale.commit import Hashed, new_file
from mim_scale.errors import ConfigError, DamagedError
from mim_scale.store.geometry import Size3, Spacing3, size3


@dataclass(frozen=True, slots=True)
class Row:
    """One stored volume."""

    key: str
    """Name of its folder in volumes/, without .zarr: first 16 hex digits of content_hash."""
    subject: str
    """Pseudonym of the person."""
    group: str
    """Subjects that share a near-duplicate are one group; all volumes of a group stay on one side of a split."""
    study: str
    """Pseudonym of the DICOM study; empty where there is none."""
    series: str
    """Pseudonym of the DICOM series; empty where there is none."""
    content_hash: str
    voxel_hash: str
    """SHA-256 over shape and voxels alone: equal for copies of other spacing or place."""
    shape: Size3
    spacing_mm: Spacing3
    affine: tuple[float, ...]
    """16 numbers, row by row: voxel index (x, y, z, 1) -> RAS millimetres."""
    hu_min: int
    hu_max: int
    hu_mean: float
    hu_histogram: tuple[int, ...]
    """Voxels in each bin of HU_EDGES."""
    foreground: bytes
    """Which blocks are not air, one bit each: see Foreground."""
    bytes_raw: int
    bytes_stored: int
    bytes_source: int
    """Of the source's files as they were found."""
    source_format: str
    """nifti, nrrd, mha, dicom or ome_zarr."""
    source_key: str
    """Pseudonym of the source's path relative to the source folder."""
    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness_mm: float = 0.0
    """Nominal, by the header; the distance of slices is in spacing_mm. 0 where it is not known."""
    tube_kv: float = 0.0
    flags: tuple[str, ...] = ()
    """What a user should know, as codes: face_likely, burned_in_text_possible, lossy_source, ..."""
    repairs: tuple[str, ...] = ()
    """What was changed on the way in, as codes: reoriented, rescaled, padding_mapped, resampled, ..."""


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """One input that was refused."""

    source_key: str
    """Pseudonym of the input's path relative to the source folder."""
    source_format: str
    reason: str
    detail: str
    """One line, without file names."""


@dataclass(frozen=True, slots=True)
class FingerprintRow:
    """What tells copies of a volume, without its image: this table alone is a list of volumes to hold out."""

    key: str
    subject: str
    series: str
    content_hash: str
    voxel_hash: str
    fingerprint: bytes
    """Of data_pipeline; empty where none was made."""


HU_EDGES = tuple(range(-1024, 3073, 64))
"""Edges of the bins of Row.hu_histogram; values outside count in the first or the last."""

_ROWS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("study", pa.string(), nullable=False),
        pa.field("series", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("voxel_hash", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("spacing_mm", pa.list_(pa.float64()), nullable=False),
        pa.field("affine", pa.list_(pa.float64()), nullable=False),
        pa.field("hu_min", pa.int32(), nullable=False),
        pa.field("hu_max", pa.int32(), nullable=False),
        pa.field("hu_mean", pa.float64(), nullable=False),
        pa.field("hu_histogram", pa.list_(pa.int64()), nullable=False),
        pa.field("foreground", pa.binary(), nullable=False),
        pa.field("bytes_raw", pa.int64(), nullable=False),
        pa.field("bytes_stored", pa.int64(), nullable=False),
        pa.field("bytes_source", pa.int64(), nullable=False),
        pa.field("source_format", pa.string(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("manufacturer", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("kernel", pa.string(), nullable=False),
        pa.field("slice_thickness_mm", pa.float64(), nullable=False),
        pa.field("tube_kv", pa.float64(), nullable=False),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
        pa.field("repairs", pa.list_(pa.string()), nullable=False),
    ]
)
_QUARANTINE = pa.schema([pa.field(field.name, pa.string(), nullable=False) for field in fields(QuarantineRow)])


_FINGERPRINTS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("series", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("voxel_hash", pa.string(), nullable=False),
        pa.field("fingerprint", pa.binary(), nullable=False),
    ]
)
_KEY_CHECK = "mim_scale.key_check"
_DIGEST = "mim_scale.digest"
_BUILD_AGAIN = "build the store again"
_BATCH = 1024
"""Rows in memory while a table is written."""
_READ_BATCH = 128
"""Likewise while one is walked through, twice: as Python's objects they take ten times their bytes."""


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Replace the file by these rows, in the order in which they come: by key."""
    return _write(path, rows, _ROWS)


def write_quarantine(path: Path, rows: Iterable[QuarantineRow]) -> str:
    """Replace the file by these rows, in the order in which they come: by source_key."""
    return _write(path, rows, _QUARANTINE)


def write_fingerprints(path: Path, rows: Iterable[FingerprintRow], key_check: str = "") -> str:
    """Replace the file by these rows, in the order in which they come: by key; it carries their digest.

    Args:
        key_check: of the key of the rows' pseudonyms, for a list that stands alone; in a store the record has it.
    """
    digest = _Digest(key_check)
    return _write(path, digest.passing(rows), _FINGERPRINTS, lambda: {_KEY_CHECK: key_check, _DIGEST: digest.hex})


def read_rows(path: Path) -> tuple[Row, ...]:
    """The rows of a manifest, sorted by key.

    Raises:
        DamagedError: the file is missing or is no manifest.
    """
    return tuple(iter_rows(path))


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of a manifest, sorted by key, a few in memory at a time.

    Raises:
        DamagedError: the file is missing or is no manifest.
    """
    for values in _iterate(path, _ROWS):
        yield _row(values)


def iter_fingerprints(path: Path) -> Iterator[FingerprintRow]:
    """The volume fingerprints, sorted by key, a few in memory at a time.

    Raises:
        DamagedError: the file is missing, is no such table, or (at its end) does not hold what was written.
    """
    return _iter_fingerprints(path, lambda key_check: None, _BUILD_AGAIN)


def read_list(path: Path) -> tuple[tuple[FingerprintRow, ...], str]:
    """The rows of a list of fingerprints that stands alone, and the check of the key of its pseudonyms, if it has one.

    Raises:
        DamagedError: as `iter_fingerprints`.
    """
    checks: list[str] = []
    rows = tuple(_iter_fingerprints(path, checks.append, "make it again with `mim-scale data fingerprints`"))
    return rows, checks[0]


def _iter_fingerprints(path: Path, tell_key_check: Callable[[str], None], mend: str) -> Iterator[FingerprintRow]:
    metadata: dict[str, str] = {}
    rows = (FingerprintRow(**values) for values in _iterate(path, _FINGERPRINTS, mend, metadata))
    first = next(rows, None)
    key_check = metadata.get(_KEY_CHECK, "")
    digest = _Digest(key_check)
    tell_key_check(key_check)
    yield from digest.passing(rows if first is None else chain([first], rows))
    # Parquet has no checksum of its own that covers all: one row that is another could hide a copy.
    if metadata.get(_DIGEST) != digest.hex:
        raise DamagedError(f"{path}: is damaged: it does not hold what was written; {mend}")


class _Digest:
    """SHA-256 over a list of fingerprints, gathered as its rows pass by."""

    def __init__(self, key_check: str) -> None:
        self._sha256 = hashlib.sha256(json.dumps(["mim-scale fingerprints 1", key_check]).encode())

    def passing(self, rows: Iterable[FingerprintRow]) -> Iterator[FingerprintRow]:
        for row in rows:
            values = [row.key, row.subject, row.series, row.content_hash, row.voxel_hash, row.fingerprint.hex()]
            self._sha256.update(b"\n" + json.dumps(values).encode())
            yield row

    @property
    def hex(self) -> str:
        return self._sha256.hexdigest()


def read_quarantine(path: Path) -> tuple[QuarantineRow, ...]:
    """The refused inputs, sorted by source_key.

    Raises:
        DamagedError: the file is missing or is no quarantine table.
    """
    return tuple(QuarantineRow(**values) for values in _iterate(path, _QUARANTINE))


def split_subjects(rows: Sequence[Row], seed: int, held_out_subjects: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training rows, held-out rows): no person is on both sides, nor two near-copies, whatever the order of rows.

    Subjects that share a near-duplicate count as one. A group's rank depends on the seed and its own name alone, so a
    growing dataset moves few subjects across.

    Raises:
        ConfigError: nothing is left to train on.
    """
    groups = sorted({row.group for row in rows}, key=lambda group: (_rank(seed, group), group))
    if held_out_subjects >= len(groups):
        raise ConfigError(
            f"data.held_out_subjects is {held_out_subjects}, but the store holds volumes of {len(groups)} subjects: "
            "nothing is left to train on; lower it or add data"
        )
    held_out = set(groups[:held_out_subjects])
    return (
        tuple(row for row in rows if row.group not in held_out),
        tuple(row for row in rows if row.group in held_out),
    )


def _rank(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}\n{group}".encode()).hexdigest()


def _write(
    path: Path, rows: Iterable[Any], schema: pa.Schema, metadata: Callable[[], dict[str, str]] | None = None
) -> str:
    """`metadata` is asked once all rows are written. Returns the SHA-256 of the file's bytes."""
    waiting = iter(rows)
    with new_file(path) as file:
        hashed = Hashed(file)
        with pq.ParquetWriter(hashed, schema, compression="zstd") as writer:
            while batch := list(islice(waiting, _BATCH)):
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in batch], schema=schema))
            if metadata is not None:
                writer.add_key_value_metadata(metadata())
        return hashed.sha256


def _iterate(
    path: Path, schema: pa.Schema, mend: str = _BUILD_AGAIN, metadata: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows as they stand; `metadata` takes what the file says of itself, before the first."""
    try:
        with pq.ParquetFile(path) as table:
            if not table.schema_arrow.equals(schema):
                names = table.schema_arrow.names
                raise DamagedError(f"{path}: has columns {names}, expected {schema.names}; {mend}")
            if metadata is not None:
                found = table.metadata.metadata or {}
                metadata |= {name.decode("utf-8", "replace"): found[name].decode("utf-8", "replace") for name in found}
            for batch in table.iter_batches(_READ_BATCH):
                yield from batch.to_pylist()
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise DamagedError(f"{path}: not readable as Parquet ({_one_line(error)}); {mend}") from None


def _row(values: dict[str, Any]) -> Row:
    z, y, x = values["spacing_mm"]
    return Row(
        **values
        | {
            "shape": size3(values["shape"]),
            "spacing_mm": (z, y, x),
            **{name: tuple(values[name]) for name in ("affine", "hu_histogram", "flags", "repairs")},
        }
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
