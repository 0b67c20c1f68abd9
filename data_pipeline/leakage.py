"""Which images of a benchmark are in a corpus: two sides, each a store, a folder of images or a list of fingerprints.

What could not be compared is named as loudly as what was found.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.canonical import canonical
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.duplicates import IDENTITY, LEAST_SCORE, Evidence, Link, links
from data_pipeline.reasons import Rejected, reading_failed
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan, Source
from data_pipeline.volume_fingerprint import FRAMES, VERSION, volume_fingerprint
from mim_scale.commit import sha256_values
from mim_scale.errors import SourceError
from mim_scale.store.dataset import FINGERPRINTS, RECORD, Dataset, read_table
from mim_scale.store.geometry import whole_box
from mim_scale.store.manifest import FingerprintRow, iter_fingerprints, read_list
from mim_scale.store.volume import AIR_HU, Volume, content_hash, volume_key, voxel_hash

_HU_LOW, _HU_HIGH = -100, 100
"""Voxels in HU reach beyond both; windowed ones in another scale do not reach below the first."""
_WINDOWS = ((-160, 240), (-1000, 400), (-1000, 1000), (-1024, 3071))
_STORED_TISSUE = 1000
"""Stored values that no intercept was applied to: water lies at 1024."""
_TISSUES_HU = (-90, 40)
"""Fat and muscle: the commonest value of a body is one of them."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared."""

    kind: str
    """store, folder or list."""
    rows: tuple[FingerprintRow, ...]
    """One image may have several, of one key: one for each scale that its values may be in."""
    key_check: str
    """Of the key of its pseudonyms; empty where it is not known."""
    refused: tuple[tuple[str, str], ...] = ()
    """(reason, detail) of images that could not be read."""
    names: dict[str, str] = field(default_factory=dict, repr=False)
    """Path by key, where files were read; for `--names` alone."""
    picture: Callable[[str], Volume | None] = field(default=lambda key: None, repr=False)
    """The volume of a key, where voxels are at hand."""

    @property
    def digest(self) -> str:
        """SHA-256, as hex, of which voxels it holds."""
        return hashlib.sha256("\n".join(sorted({row.content_hash for row in self.rows})).encode()).hexdigest()

    @property
    def keys(self) -> set[str]:
        """Its images."""
        return {row.key for row in self.rows}


def load_side(path: Path, key: PseudonymKey | None = None, progress: Progress | None = None) -> Side:
    """Read one side: a store, a folder of images or one image, or a list of fingerprints.

    Args:
        key: under which names in images become pseudonyms; None leaves patients and series of images uncompared.

    Raises:
        SourceError: nothing there, or no image in it.
        StoreError: a store that cannot be used.
    """
    if path.suffix == ".parquet" and path.is_file():
        return _list_side(path)
    if (path / RECORD).exists():
        return _store_side(path)
    if not path.exists():
        raise SourceError(f"{path}: no such store, folder, image or list of fingerprints")
    return _folder_side(path, key, progress)


def _list_side(path: Path) -> Side:
    rows, key_check = read_list(path)
    return Side("list", rows, key_check)


def _store_side(path: Path) -> Side:
    dataset = Dataset.open(path)
    rows = read_table(path, dataset.record, FINGERPRINTS, lambda file: tuple(iter_fingerprints(file)))
    stored = {row.key: row for row in dataset.rows}

    def picture(key: str) -> Volume | None:
        row = stored.get(key)
        if row is None:
            return None
        voxels = dataset.reader(row).read_box(0, whole_box(row.shape))
        return Volume(voxels, row.spacing_mm, np.array(row.affine).reshape(4, 4))

    return Side("store", rows, str(dataset.record["build_config"].get("pseudonym_key", "")), picture=picture)


def _folder_side(path: Path, key: PseudonymKey | None, progress: Progress | None) -> Side:
    root, only = (path, None) if path.is_dir() else (path.parent, path.name)
    sources = [source for source in find_sources(root).sources if only is None or only in source.files]
    rows: list[FingerprintRow] = []
    refused: list[tuple[str, str]] = []
    origin: dict[str, Source] = {}
    for done, source in enumerate(sources, start=1):
        try:
            found = _rows_of(root, source, key)
        except Rejected as rejected:
            refused.append((str(rejected.reason), rejected.detail))
        except Exception as error:
            # A reader met an input that nobody foresaw: that input is named, the others are compared.
            failed = reading_failed(error, "reading it failed")
            refused.append((str(failed.reason), failed.detail))
        else:
            origin.setdefault(found[0].key, source)
            rows += found
        if progress is not None:
            progress(done, len(sources))
    if not rows:
        raise SourceError(f"{path}: none of {len(sources)} inputs is a volume that can be compared")

    def picture(wanted: str) -> Volume | None:
        try:
            scan = read_source(root, origin[wanted])
            return canonical(replace(scan, voxels=as_hu(scan.voxels)[0]))[0]
        except (KeyError, Rejected):
            return None

    rows.sort(key=lambda row: row.key)
    names = {name: os.fsencode(source.name).decode("utf-8", "replace") for name, source in origin.items()}
    return Side("folder", tuple(rows), key.check if key else "", tuple(refused), names, picture)


def _rows_of(root: Path, source: Source, key: PseudonymKey | None) -> list[FingerprintRow]:
    scan = read_source(root, source)
    volume, marks = fingerprints_of_scan(scan)
    content = content_hash(volume)

    def pseudonym(kind: str, name: str) -> str:
        return key.pseudonym(kind, name) if key and name else ""

    subject = pseudonym("patient", source.subject or scan.identity.patient)
    series = pseudonym("series", scan.identity.series)
    return [FingerprintRow(volume_key(content), subject, series, content, voxel_hash(volume), mark) for mark in marks]


def fingerprints_of_scan(scan: Scan) -> tuple[Volume, list[bytes]]:
    """The volume that a store would hold of a scan, and a fingerprint for each scale its values may be in.

    Raises:
        Rejected: no regular 3D grid, or values that are no numbers.
    """
    volumes = [canonical(replace(scan, voxels=voxels))[0] for voxels in as_hu(scan.voxels)]
    return volumes[0], list(dict.fromkeys(volume_fingerprint(volume) for volume in volumes))


def as_hu(voxels: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    """Voxels in HU as they are; others as HU under each guess of their window, likeliest first."""
    values: NDArray[Any] = voxels
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all() or low == high or (low <= _HU_LOW and high >= _HU_HIGH):
        return [voxels]
    unit = ((values - low) / np.float32(high - low)).astype(np.float32)
    guesses = [unit * np.float32(top - bottom) + np.float32(bottom) for bottom, top in _WINDOWS]
    inside = unit[unit > 0.02]
    counts, edges = np.histogram(inside, 200, (0.0, float(np.quantile(inside, 0.999))))
    commonest = float(edges[counts.argmax()] + edges[counts.argmax() + 1]) / 2
    guesses += [unit * np.float32((tissue + 1000) / commonest) - np.float32(1000) for tissue in _TISSUES_HU]
    if values.dtype.kind in "iu" and high > _STORED_TISSUE:
        guesses.insert(0, values.astype(np.float32) + np.float32(AIR_HU))
    return [np.clip(guess, AIR_HU, 30000) for guess in guesses]


def find_leaks(corpus: Side, benchmark: Side) -> list[tuple[str, str, Link]]:
    """(corpus key, benchmark key, strongest link) of every pair that is one scan or one patient."""
    found: dict[tuple[str, str], Link] = {}
    order = list(Evidence)
    for link in links(corpus.rows, benchmark.rows, same_key=_same_key(corpus, benchmark)):
        pair = corpus.rows[link.a].key, benchmark.rows[link.b].key
        held = found.get(pair)
        if held is None or (order.index(link.evidence), -score_of(link)) < (
            order.index(held.evidence),
            -score_of(held),
        ):
            found[pair] = link
    return sorted((a, b, link) for (a, b), link in found.items())


def certificate(corpus: Side, benchmark: Side, with_names: bool = False) -> dict[str, Any]:
    """What was compared, what was found, and what could not be compared, as plain JSON values."""
    leaks = find_leaks(corpus, benchmark)
    hits = []
    for a, b, link in leaks:
        hit: dict[str, Any] = {"corpus_key": a, "benchmark_key": b, "evidence": str(link.evidence)}
        if link.match is not None:
            hit |= {
                "score": round(link.match.score, 2),
                "marks_in_common": link.match.num_marks,
                "suspected": suspected(link),
                "relation": FRAMES[link.match.relation].tolist(),
                "shift_mm": [round(step, 1) for step in link.match.shift_mm],
            }
        if with_names:
            hit |= {"corpus_name": corpus.names.get(a, ""), "benchmark_name": benchmark.names.get(b, "")}
        hits.append(hit)
    leaked = sorted({b for _, b, _ in leaks})
    values: dict[str, Any] = {
        "format": "mim-scale leakage certificate",
        "format_version": 1,
        "mim_scale": version("mim-scale"),
        "volume_fingerprint_version": VERSION,
        "least_score": LEAST_SCORE,
        "corpus": _told(corpus),
        "benchmark": _told(benchmark),
        "num_benchmark_images": len(benchmark.keys),
        "num_leaked": len(leaked),
        "clean": not leaked,
        "complete": not not_compared(corpus, benchmark),
        "hits": hits,
        "not_compared": not_compared(corpus, benchmark),
    }
    return values | {"digest": sha256_values(values)}


def suspected(link: Link) -> str:
    """What was done to a near-copy, as far as its marks tell."""
    if link.match is None:
        return ""
    return "same orientation" if link.match.relation == IDENTITY else "turned or mirrored: a header names other axes"


def not_compared(corpus: Side, benchmark: Side) -> list[str]:
    """What a clean verdict does not cover, a line each."""
    lines = []
    if not _same_key(corpus, benchmark):
        lines.append(
            "patients and series: the pseudonyms of the two sides were not made under one known key; "
            "hold the same key and build both sides with it"
        )
    for name, side in (("corpus", corpus), ("benchmark", benchmark)):
        if side.refused:
            reasons = ", ".join(
                f"{reason} {_count(side.refused, reason)}" for reason in sorted({r for r, _ in side.refused})
            )
            lines.append(f"{len(side.refused)} inputs of the {name} that could not be read ({reasons})")
        marked = {row.key for row in side.rows if len(row.fingerprint) > 1}
        if bare := len(side.keys - marked):
            lines.append(f"{bare} volumes of the {name} for near-copies: they show too little to be marked")
    return lines


def _told(side: Side) -> dict[str, Any]:
    return {
        "kind": side.kind,
        "num_images": len(side.keys),
        "num_refused": len(side.refused),
        "digest": side.digest,
        "key_check": side.key_check,
    }


def _same_key(a: Side, b: Side) -> bool:
    return bool(a.key_check) and a.key_check == b.key_check


def score_of(link: Link) -> float:
    """Of its near-copy; 0 where hashes or pseudonyms alone tie the two."""
    return link.match.score if link.match is not None else 0.0


def _count(refused: Sequence[tuple[str, str]], reason: str) -> int:
    return sum(found == reason for found, _ in refused)
