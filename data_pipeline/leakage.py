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
from data_pipeline.overlay import (
    CANDIDATE_SCORE,
    NO_VOXELS,
    NoVoxels,
    Overlay,
    Voxels,
    is_confirmed,
    pictures_of,
    strongest,
)
from data_pipeline.reasons import Rejected, reading_failed
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan, Source
from data_pipeline.volume_fingerprint import FRAMES, VERSION, unpack, volume_fingerprint
from mim_scale.commit import sha256_values
from mim_scale.errors import DamagedError, SourceError, StoreError
from mim_scale.store.array_store import VolumeReader
from mim_scale.store.dataset import FINGERPRINTS, RECORD, Dataset, read_table, volume_folder
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
    voxels: Voxels = field(default=NO_VOXELS, repr=False)
    """Reads the volume of a key, where voxels are at hand."""

    @property
    def has_voxels(self) -> bool:
        """Whether there is anything to lay over a near-copy."""
        return not isinstance(self.voxels, NoVoxels)

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
    _check_versions(path, rows)
    return Side("list", rows, key_check)


def _check_versions(path: Path, rows: Sequence[FingerprintRow]) -> None:
    """Raise StoreError where a fingerprint is none that this program can compare."""
    for row in rows:
        try:
            # Empty: a volume without a single mark.
            unpack(row.fingerprint or bytes([VERSION]))
        except ValueError:
            raise StoreError(
                f"{path}: holds volume fingerprints of another version of mim-scale; make it again with this one"
            ) from None


def _store_side(path: Path) -> Side:
    dataset = Dataset.open(path)
    rows = read_table(path, dataset.record, FINGERPRINTS, lambda file: tuple(iter_fingerprints(file)))
    _check_versions(path, rows)
    return Side("store", rows, str(dataset.record["build_config"].get("pseudonym_key", "")), voxels=StoredVoxels(path))


@dataclass(frozen=True)
class StoredVoxels:
    """Of a store, also of one that is being built and has no manifest yet.

    A damaged volume is a DamagedError: what cannot be laid over must not pass for compared.
    """

    store: Path

    def __call__(self, key: str, fingerprint: bytes = b"") -> Volume | None:
        folder = volume_folder(self.store, key)
        try:
            own = VolumeReader(folder, key, (1, 1, 1)).metadata()["attributes"]["mim_scale"]
            z, y, x = own["shape"]
            spacing_mm, affine = tuple(own["spacing_mm"]), np.array(own["affine"])
        except (KeyError, TypeError, ValueError):
            raise DamagedError(
                f"volume {key}: its metadata is incomplete; run `mim-scale data verify {self.store}`"
            ) from None
        voxels = VolumeReader(folder, key, (z, y, x)).read_box(0, whole_box((z, y, x)))
        return Volume(voxels, spacing_mm, affine)


def _folder_side(path: Path, key: PseudonymKey | None, progress: Progress | None) -> Side:
    root, only = (path, None) if path.is_dir() else (path.parent, path.name)
    sources = [source for source in find_sources(root).sources if only is None or only in source.files]
    rows: list[FingerprintRow] = []
    refused: list[tuple[str, str]] = []
    origin: dict[str, Source] = {}
    guesses: dict[tuple[str, bytes], int] = {}
    for done, source in enumerate(sources, start=1):
        try:
            found, of_marks = _rows_of(root, source, key)
        except Rejected as rejected:
            refused.append((str(rejected.reason), rejected.detail))
        except Exception as error:
            # A reader met an input that nobody foresaw: that input is named, the others are compared.
            failed = reading_failed(error, "reading it failed")
            refused.append((str(failed.reason), failed.detail))
        else:
            origin.setdefault(found[0].key, source)
            guesses |= {(found[0].key, mark): guess for mark, guess in of_marks.items()}
            rows += found
        if progress is not None:
            progress(done, len(sources))
    if not rows:
        raise SourceError(f"{path}: none of {len(sources)} inputs is a volume that can be compared")

    rows.sort(key=lambda row: row.key)
    names = {name: os.fsencode(source.name).decode("utf-8", "replace") for name, source in origin.items()}
    voxels = _FileVoxels(root, origin, guesses)
    return Side("folder", tuple(rows), key.check if key else "", tuple(refused), names, voxels)


@dataclass(frozen=True)
class _FileVoxels:
    root: Path
    sources: dict[str, Source]
    guesses: dict[tuple[str, bytes], int]
    """Which guess of the scale a fingerprint is of."""

    def __call__(self, key: str, fingerprint: bytes = b"") -> Volume | None:
        try:
            scan = read_source(self.root, self.sources[key])
            guess = as_hu(scan.voxels)[self.guesses.get((key, fingerprint), 0)]
            return canonical(replace(scan, voxels=guess))[0]
        except Exception:
            # It was read once already: what can no longer be read is only not looked at.
            return None


def _rows_of(root: Path, source: Source, key: PseudonymKey | None) -> tuple[list[FingerprintRow], dict[bytes, int]]:
    scan = read_source(root, source)
    volume, marks = fingerprints_of_scan(scan)
    content = content_hash(volume)

    def pseudonym(kind: str, name: str) -> str:
        return key.pseudonym(kind, name) if key and name else ""

    subject = key.subject(source.subject, scan.identity.patient) if key else ""
    series = pseudonym("series", scan.identity.series)
    name, voxels = volume_key(content), voxel_hash(volume)
    return [FingerprintRow(name, subject, series, content, voxels, mark) for mark in marks], marks


def fingerprints_of_scan(scan: Scan) -> tuple[Volume, dict[bytes, int]]:
    """The volume that a store would hold of a scan; a fingerprint for each scale its values may be in, and which guess.

    Raises:
        Rejected: no regular 3D grid, or values that are no numbers.
    """
    volumes = [canonical(replace(scan, voxels=voxels))[0] for voxels in as_hu(scan.voxels)]
    marks: dict[bytes, int] = {}
    for guess, volume in enumerate(volumes):
        marks.setdefault(volume_fingerprint(volume), guess)
    return volumes[0], marks


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


def find_leaks(corpus: Side, benchmark: Side) -> tuple[list[tuple[str, str, Link]], Overlay | None]:
    """(corpus key, benchmark key, link) of every pair that is one scan or one patient, and how voxels judged.

    Where voxels of both sides are at hand, weaker candidates are looked at too, and refuted ones are left out.
    """
    overlay = None
    if corpus.has_voxels and benchmark.has_voxels:
        overlay = Overlay(pictures_of(corpus.voxels), pictures_of(benchmark.voxels))
    least_score = LEAST_SCORE if overlay is None else CANDIDATE_SCORE
    pairs: dict[tuple[str, str], list[tuple[FingerprintRow, FingerprintRow, Link]]] = {}
    for link in links(corpus.rows, benchmark.rows, _same_key(corpus, benchmark), least_score):
        a, b = corpus.rows[link.a], benchmark.rows[link.b]
        pairs.setdefault((a.key, b.key), []).append((a, b, link))
    judge = overlay.judge if overlay is not None else strongest
    # By key, so that each volume of a corpus is read once.
    found = [(a, b, judge(held)) for (a, b), held in sorted(pairs.items())]
    return [(a, b, link) for a, b, link in found if link is not None], overlay


def certificate(corpus: Side, benchmark: Side, with_names: bool = False) -> dict[str, Any]:
    """What was compared, what was found, and what could not be compared, as plain JSON values."""
    leaks, overlay = find_leaks(corpus, benchmark)
    hits = []
    for a, b, link in leaks:
        hit: dict[str, Any] = {"corpus_key": a, "benchmark_key": b, "evidence": str(link.evidence)}
        if link.evidence == Evidence.SAME_VOXELS:
            hit |= {"confirmed_by_voxels": True}
        if link.match is not None:
            hit |= {
                "score": round(link.match.score, 2),
                "marks_in_common": link.match.num_marks,
                "suspected": suspected(link),
                "relation": FRAMES[link.match.relation].tolist(),
                "shift_mm": [round(step, 1) for step in link.match.shift_mm],
                "correlation": None if link.correlation is None else round(link.correlation, 3),
                "confirmed_by_voxels": link.evidence == Evidence.SAME_VOXELS or is_confirmed(link),
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
        "overlay": None if overlay is None else overlay.told(),
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


def _count(refused: Sequence[tuple[str, str]], reason: str) -> int:
    return sum(found == reason for found, _ in refused)
