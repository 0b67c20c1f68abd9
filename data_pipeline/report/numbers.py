"""What a store holds and refused, counted in one pass over its tables: everything that the report says."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.report.outliers import (
    LEAST_VOLUMES,
    MEASURES,
    THRESHOLD,
    Outlier,
    find_outliers,
    histogram_distances,
)
from mim_scale.errors import DamagedError
from mim_scale.store.dataset import MANIFEST, QUARANTINE, read_record, table_path
from mim_scale.store.distinct import Distinct
from mim_scale.store.manifest import HU_EDGES, QuarantineRow, Row, iter_rows, read_quarantine
from mim_scale.store.stats import NOT_SAID

Progress = Callable[[int, int], None]
"""Called with (rows done, rows to do)."""

_MOST_EXAMPLES = 5
"""Refused inputs that are shown for each reason."""
MOST_GROUPS = 50
"""Groups of near-copies that are listed."""
_ROWS_A_CALL = 500
_COLUMNS = (
    *(f"spacing {axis}" for axis in "zyx"),
    *(f"shape {axis}" for axis in "zyx"),
    *(f"extent {axis}" for axis in "zyx"),
    *("slice thickness", "tube voltage", "mean HU"),
)
UNITS = {"spacing": "mm", "shape": "voxels", "extent": "mm", "slice": "mm", "tube": "kV", "mean": "HU", "HU": "HU"}
"""Of columns, by the first word of their names."""


@dataclass
class Numbers:
    """A store in numbers. Memory: about 400 bytes a volume."""

    store: str
    """Name of its folder."""
    record: dict[str, Any]
    columns: dict[str, NDArray[np.float64]]
    """One value a volume, in key order; 0 where a header did not say."""
    outliers: list[Outlier]
    hu_voxels: NDArray[np.int64]
    """Voxels of all volumes in each bin of HU_EDGES."""
    hu_range: tuple[int, int]
    digest: str
    """Of which volumes it holds, as leakage certificates have it."""
    num_bytes: dict[str, int]
    """source, raw and stored."""
    num_subjects: int
    num_groups: int
    """Of subjects that stay on one side of a split; most hold one."""
    num_inputs: int
    """Different source keys of both tables."""
    counts: dict[str, Counter[str]]
    """Volumes by what they have, under the names that `data stats` gives."""
    refused: Counter[str]
    """Refused inputs by reason."""
    examples: dict[str, list[QuarantineRow]]
    """Some inputs of each reason."""
    groups: list[tuple[str, int, int]]
    """Groups of several subjects that share near-copies: (name, subjects, volumes), largest first."""

    @property
    def num_volumes(self) -> int:
        return len(self.columns["mean HU"])

    @property
    def num_refused(self) -> int:
        return self.refused.total()

    def as_json(self, keys: dict[int, str]) -> dict[str, Any]:
        """As plain values.

        Args:
            keys: Of volumes by their index, those of all outliers among them.
        """
        return {
            "store": self.store,
            "fingerprint": self.record["fingerprint"],
            "inputs": {
                "total": self.num_inputs,
                "stored": self.num_volumes,
                "refused": self.num_refused,
                "each_has_one_row": self.num_inputs == self.num_volumes + self.num_refused,
            },
            "num_volumes": self.num_volumes,
            "num_subjects": self.num_subjects,
            "num_groups": self.num_groups,
            "num_quarantined": self.num_refused,
            **{f"bytes_{name}": count for name, count in self.num_bytes.items()},
            "distributions": {name: distribution(self.columns[name]) for name in self.columns},
            "hu": {
                "min": self.hu_range[0],
                "max": self.hu_range[1],
                "edges": list(HU_EDGES),
                "voxels": self.hu_voxels.tolist(),
            },
            **{name: dict(sorted(count.items())) for name, count in self.counts.items()},
            "quarantine_reasons": dict(sorted(self.refused.items())),
            "duplicates": self.refused["duplicate"],
            "groups": [dict(zip(("group", "subjects", "volumes"), group, strict=True)) for group in self.groups],
            "outliers": {
                "threshold": THRESHOLD,
                "least_volumes": LEAST_VOLUMES,
                "volumes": [{"key": keys[o.index], "score": round(o.score, 3), "why": o.why} for o in self.outliers],
            },
        }


def distribution(values: NDArray[np.float64]) -> dict[str, float]:
    """Quantiles of what is known, and of how many volumes it is."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {"known": 0}
    at = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
    return {"known": len(known)} | {name: round(float(np.quantile(known, q)), 4) for name, q in at.items()}


def collect(path: Path, progress: Progress | None = None) -> Numbers:
    """Count what a store holds.

    Raises:
        StoreError: there is no store at that path.
        DamagedError: a table is not the one that was committed.
    """
    record = read_record(path)
    gathered = _Gathered(int(record["num_volumes"]))
    for row in manifest(path, record, progress):
        gathered.add(row)
    refused = read_quarantine(table_path(path, record, QUARANTINE))
    if (gathered.count, len(refused)) != (record["num_volumes"], record["num_quarantined"]):
        raise DamagedError(
            f"{path}: its record says {record['num_volumes']} volumes and {record['num_quarantined']} refused inputs, "
            f"its tables hold {gathered.count} and {len(refused)}; build the store again"
        )
    return gathered.numbers(path, record, refused)


def manifest(path: Path, record: dict[str, Any], progress: Progress | None = None) -> Iterator[Row]:
    """The rows of a store, a few in memory at a time, in key order."""
    total = int(record["num_volumes"])
    for done, row in enumerate(iter_rows(table_path(path, record, MANIFEST)), 1):
        yield row
        if progress is not None and (done % _ROWS_A_CALL == 0 or done == total):
            progress(done, total)


@dataclass
class _Gathered:
    """Sums and columns while rows pass by."""

    size: int
    count: int = 0
    num_bytes: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    contents: bytearray = field(default_factory=bytearray)
    inputs: Distinct = field(default_factory=Distinct)
    subjects: Distinct = field(default_factory=Distinct)
    groups: Distinct = field(default_factory=Distinct)
    group_subjects: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    hu_range: tuple[int, int] = (32767, -32768)

    def __post_init__(self) -> None:
        bins = len(HU_EDGES) - 1
        self.values = np.full((self.size, len(_COLUMNS)), np.nan)
        self.shares = np.zeros((self.size, bins), np.float32)
        self.hu_voxels = np.zeros(bins, np.int64)

    def add(self, row: Row) -> None:
        self.count += 1
        if self.count > self.size:
            return
        extent = (length * spacing for length, spacing in zip(row.shape, row.spacing_mm, strict=True))
        known = (value or np.nan for value in (row.slice_thickness_mm, row.tube_kv))
        self.values[self.count - 1] = (*row.spacing_mm, *row.shape, *extent, *known, row.hu_mean)
        voxels = np.array(row.hu_histogram, np.int64)
        self.hu_voxels += voxels
        self.shares[self.count - 1] = voxels / max(1, int(voxels.sum()))
        self.hu_range = min(self.hu_range[0], row.hu_min), max(self.hu_range[1], row.hu_max)
        self.num_bytes.update(source=row.bytes_source, raw=row.bytes_raw, stored=row.bytes_stored)
        for name in ("source_format", "manufacturer", "model", "kernel"):
            self.counts[f"{name}s"][getattr(row, name) or NOT_SAID] += 1
        self.counts["tube_kv"][f"{row.tube_kv:g}" if row.tube_kv else NOT_SAID] += 1
        self.counts["flags"].update(row.flags)
        self.counts["repairs"].update(row.repairs)
        self.contents += bytes.fromhex(row.content_hash)
        self.inputs.add(row.source_key)
        self.subjects.add(row.subject)
        self.groups.add(row.group)
        if row.group != row.subject:
            # A group bears the name of one of its subjects.
            self.group_subjects[row.group] |= {row.group, row.subject}

    def _digest(self) -> str:
        """As `leakage.Side.digest`: of the content hashes, sorted, a line each."""
        digest, between = hashlib.sha256(), ""
        contents = np.sort(np.frombuffer(self.contents, "S32"))
        for content in contents.view(np.uint8).reshape(-1, 32):
            digest.update(f"{between}{content.tobytes().hex()}".encode())
            between = "\n"
        return digest.hexdigest()

    def numbers(self, path: Path, record: dict[str, Any], refused: Iterable[QuarantineRow]) -> Numbers:
        examples: dict[str, list[QuarantineRow]] = defaultdict(list)
        reasons: Counter[str] = Counter()
        for row in refused:
            self.inputs.add(row.source_key)
            reasons[row.reason] += 1
            if len(examples[row.reason]) < _MOST_EXAMPLES:
                examples[row.reason].append(row)
        columns = dict(zip(_COLUMNS, np.ascontiguousarray(self.values.T), strict=True))
        width = HU_EDGES[1] - HU_EDGES[0]
        columns["HU histogram distance"] = histogram_distances(self.shares, self.hu_voxels, width)
        groups = [
            (name, len(subjects), self.groups.times(name)) for name, subjects in sorted(self.group_subjects.items())
        ]
        return Numbers(
            store=path.resolve().name,
            record=record,
            columns=columns,
            outliers=find_outliers({measure.name: columns[measure.name] for measure in MEASURES}),
            hu_voxels=self.hu_voxels,
            hu_range=self.hu_range,
            digest=self._digest(),
            num_bytes=dict(self.num_bytes),
            num_subjects=len(self.subjects),
            num_groups=len(self.groups),
            num_inputs=len(self.inputs),
            counts={
                name: self.counts[name]
                for name in ("source_formats", "manufacturers", "models", "kernels", "tube_kv", "flags", "repairs")
            },
            refused=reasons,
            examples=dict(examples),
            groups=sorted(groups, key=lambda group: (-group[2], group[0])),
        )
