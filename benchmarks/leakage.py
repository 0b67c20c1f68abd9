"""Recall of planted near-copies and false alarms among different patients: `python -m benchmarks.leakage FOLDER...`."""

import argparse
import io
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from data_pipeline.canonical import canonical, resample
from data_pipeline.duplicates import LEAST_SCORE, Evidence, Link, Match, find_copies
from data_pipeline.leakage import as_hu, fingerprints_of_scan
from data_pipeline.overlay import CANDIDATE_SCORE, Coarse, Overlay, coarse
from data_pipeline.reasons import Rejected
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan, Source
from data_pipeline.volume_fingerprint import volume_fingerprint
from mim_scale.store.geometry import Spacing3
from mim_scale.store.manifest import FingerprintRow
from mim_scale.store.volume import Volume

SAME_PATIENT = (("kbp_053", "dicom2stl/head.nii"), ("heart_crop", "thorax_cta"))
"""Volumes of the public sets that are of one patient, by a piece of their names."""

Change = Callable[[Volume, np.random.Generator], tuple[NDArray[np.generic], Spacing3]]


def body(volume: Volume) -> tuple[slice, slice, slice]:
    """The box around what is no air."""
    places = ndimage.find_objects((volume.voxels > -300).astype(np.int8))
    return places[0] if places else (slice(None),) * 3


def cut(volume: Volume, shares: tuple[float, float, float], random: np.random.Generator) -> Volume:
    """A box of these shares of the body's, anywhere in it."""
    box = []
    for place, share in zip(body(volume), shares, strict=True):
        size = place.stop - place.start
        kept = min(size, max(8, round(size * share)))
        start = place.start + int(random.integers(0, size - kept + 1))
        box.append(slice(start, start + kept))
    return Volume(np.ascontiguousarray(volume.voxels[tuple(box)]), volume.spacing_mm, volume.affine)


def organ(volume: Volume, random: np.random.Generator) -> Volume:
    """A box of at most 120 mm around a voxel of the body."""
    inside = np.argwhere(volume.voxels[::2, ::4, ::4] > -300) * (2, 4, 4)
    centre = inside[int(random.integers(len(inside)))]
    box = []
    for axis in range(3):
        size = volume.shape[axis]
        kept = min(size, round(120 / volume.spacing_mm[axis]))
        start = int(np.clip(centre[axis] - kept // 2, 0, size - kept))
        box.append(slice(start, start + kept))
    return Volume(np.ascontiguousarray(volume.voxels[tuple(box)]), volume.spacing_mm, volume.affine)


def jpeg(voxels: NDArray[np.int16], quality: int = 60) -> NDArray[np.int16]:
    """Each slice as an 8-bit JPEG of the window -1000 to 400, and back."""
    slices = []
    for image in voxels:
        shown = np.clip((image.astype(np.float32) + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(shown).save(file, "JPEG", quality=quality)
        slices.append(np.asarray(Image.open(file)).astype(np.float32) / 255 * 1400 - 1000)
    return np.rint(np.stack(slices)).astype(np.int16)


def slabs(volume: Volume, count: int) -> tuple[NDArray[np.int16], Spacing3]:
    """Means of `count` slices."""
    whole = len(volume.voxels) // count * count
    means = volume.voxels[:whole].reshape(-1, count, *volume.shape[1:]).mean(1)
    z, y, x = volume.spacing_mm
    return np.rint(means).astype(np.int16), (z * count, y, x)


def turned(volume: Volume, degrees: float) -> NDArray[np.int16]:
    """Rotated in plane."""
    return ndimage.rotate(volume.voxels, degrees, (1, 2), reshape=False, order=1, mode="constant", cval=-1024)


def permuted(volume: Volume) -> Volume:
    """Axes and directions named wrongly."""
    z, y, x = volume.spacing_mm
    return Volume(np.ascontiguousarray(volume.voxels.transpose(2, 0, 1)[::-1, :, ::-1]), (x, z, y), volume.affine)


def everything(volume: Volume, random: np.random.Generator) -> tuple[NDArray[np.generic], Spacing3]:
    """Permuted, resampled, cropped, windowed, scaled."""
    small = cut(resample(volume, (3.0, 2.0, 2.0)), (0.7, 0.7, 0.7), random)
    other = permuted(small)
    return (np.clip(other.voxels, -160, 240) + 160) / np.float32(400), other.spacing_mm


def _same(volume: Volume) -> tuple[NDArray[np.generic], Spacing3]:
    return volume.voxels, volume.spacing_mm


CHANGES: dict[str, Change] = {
    "flipped and permuted, header lies": lambda v, r: _same(permuted(v)),
    "resampled to 2 mm": lambda v, r: _same(resample(v, (2.0, 2.0, 2.0))),
    "resampled to 5 x 1.5 x 1.5 mm": lambda v, r: _same(resample(v, (5.0, 1.5, 1.5))),
    "cropped to the body": lambda v, r: _same(cut(v, (1, 1, 1), r)),
    "half of the slices": lambda v, r: _same(cut(v, (0.5, 1, 1), r)),
    "in-plane 60 %": lambda v, r: _same(cut(v, (1, 0.6, 0.6), r)),
    "half of the slices, in-plane 60 %": lambda v, r: _same(cut(v, (0.5, 0.6, 0.6), r)),
    "organ: a 120 mm box": lambda v, r: _same(organ(v, r)),
    "clipped to -160..240": lambda v, r: (np.clip(v.voxels, -160, 240), v.spacing_mm),
    "clipped to -1000..400": lambda v, r: (np.clip(v.voxels, -1000, 400), v.spacing_mm),
    "-160..240 as 0..1": lambda v, r: ((np.clip(v.voxels, -160, 240) + 160) / np.float32(400), v.spacing_mm),
    "-1000..400 as 0..255": lambda v, r: (
        ((np.clip(v.voxels, -1000, 400) + 1000) / 1400 * 255).astype(np.uint8),
        v.spacing_mm,
    ),
    "offset by 1024": lambda v, r: (v.voxels + np.int16(1024), v.spacing_mm),
    "z-scored": lambda v, r: (
        ((v.voxels - v.voxels.mean()) / v.voxels.std()).astype(np.float32),
        v.spacing_mm,
    ),
    "every second slice": lambda v, r: (v.voxels[::2], (2 * v.spacing_mm[0], *v.spacing_mm[1:])),
    "slabs of 2 slices": lambda v, r: slabs(v, 2),
    "slabs of 3 slices": lambda v, r: slabs(v, 3),
    "JPEG, quality 60": lambda v, r: (jpeg(v.voxels), v.spacing_mm),
    "turned by 3 degrees": lambda v, r: (turned(v, 3), v.spacing_mm),
    "turned by 7 degrees": lambda v, r: (turned(v, 7), v.spacing_mm),
    "permuted, 3 x 2 x 2 mm, 70 % each way, 0..1": everything,
}


@dataclass
class Measured:
    """One source and, where asked for, every copy of it: a fingerprint and a picture for each guess of its scale."""

    name: str
    mark: bytes
    picture: Coarse
    cpu_ms: float
    megavoxels: float
    copies: dict[str, dict[bytes, Coarse]] = field(default_factory=dict)


def measure(item: tuple[str, Source, int]) -> Measured | None:
    """Mark one source and its copies; None where it cannot be read."""
    root, source, copies = item
    try:
        volume, _ = canonical(read_source(Path(root), source))
    except Rejected:
        return None
    before = time.process_time()
    own = volume_fingerprint(volume)
    taken = (time.process_time() - before) * 1000
    measured = Measured(source.name, own, coarse(volume), taken, volume.voxels.size / 1e6)
    for number, (name, change) in enumerate(CHANGES.items() if copies else ()):
        voxels, (z, y, x) = change(volume, np.random.default_rng((7, number)))
        scan = Scan(voxels.transpose(2, 1, 0), np.diag([x, y, z, 1.0]))
        guesses = as_hu(scan.voxels)
        measured.copies[name] = {
            mark: coarse(canonical(replace(scan, voxels=guesses[guess]))[0])
            for mark, guess in fingerprints_of_scan(scan)[1].items()
        }
    return measured


def same_patient(a: str, b: str) -> bool:
    """Whether two of the public volumes are known to be of one patient."""
    return a == b or any((p in a and q in b) or (q in a and p in b) for p, q in SAME_PATIENT)


def main() -> None:
    """Print the tables of docs/benchmarks/2026-11-26-leakage.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="real CT; each volume of another patient, but for those named here"
    )
    parser.add_argument("--copies-of", type=int, default=1000, help="plant copies of so many volumes")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    items = [
        (str(root), source)
        for root in options.folders
        for source in find_sources(root).sources
        if "_seg" not in source.name and "_gtv" not in source.name
    ]
    step = max(1, len(items) // options.copies_of)
    work = [(root, source, int(i % step == 0)) for i, (root, source) in enumerate(items)]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        results = [result for result in pool.map(measure, work) if result is not None]
    print(f"{platform.machine()}; {len(results)} volumes, copies of {sum(bool(r.copies) for r in results)} of them")
    sizes, times = [len(result.mark) for result in results], [result.cpu_ms for result in results]
    voxels, largest = max((result.megavoxels, result.cpu_ms) for result in results)
    print(
        f"fingerprints: {statistics.median(sizes):.0f} bytes in the median, {max(sizes)} at most; CPU "
        f"{statistics.median(times):.0f} ms in the median, {largest:.0f} ms for the largest of {voxels:.1f} M voxels"
    )
    report(results)


Pair = tuple[int, str, int]
"""Which original was changed, how, and which original the copy was compared with."""


def report(results: list[Measured]) -> None:
    """By marks alone at several scores, and with voxels as the product looks at them; a half of the volumes each."""
    names = [result.name for result in results]
    planted = [
        (q, name, mark) for q, result in enumerate(results) for name in result.copies for mark in result.copies[name]
    ]
    before = time.process_time()
    matches = find_copies([mark for _, _, mark in planted], [result.mark for result in results], least_score=0.5)
    print(
        f"search: {len(planted)} fingerprints against {len(results)} in {time.process_time() - before:.0f} CPU s, "
        "candidates of a score of 0.5 or more"
    )
    pairs: dict[Pair, list[Match]] = defaultdict(list)
    for match in matches:
        q, name, _ = planted[match.a]
        if q == match.b or not same_patient(names[q], names[match.b]):
            pairs[q, name, match.b].append(match)
    scores = {pair: max(match.score for match in held) for pair, held in pairs.items()}
    links, told, taken = judged(results, planted, pairs)
    halves = [
        {(q, name) for q, result in enumerate(results) for name in result.copies if (q // 2) % 2 == half}
        for half in (0, 1)
    ]
    print(f"overlays: {told}, {taken:.0f} CPU s")
    for half, label in enumerate(("chosen on", "reported")):
        tell_half(label, halves[half], names, scores, links)
    columns = ("chosen on, marks", "chosen on, voxels", "reported, marks", "reported, voxels", "lowest score")
    print(f"\n| change | {' | '.join(columns)} | lowest correlation |\n|---|---|---|---|---|---|---|")
    for name in CHANGES:
        own = [(q, name, q) for q, result in enumerate(results) if result.copies]
        line = []
        for half in halves:
            asked = [pair for pair in own if pair[:2] in half]
            line.append(f"{np.mean([scores.get(pair, 0) >= LEAST_SCORE for pair in asked]):.1%}")
            line.append(f"{np.mean([pair in links for pair in asked]):.1%}")
        seen = [link.correlation for pair in own if (link := links.get(pair)) and link.correlation is not None]
        missed = [Path(names[pair[0]]).name for pair in own if pair not in links]
        line += [f"{min(scores.get(pair, 0) for pair in own):.1f}", f"{min(seen, default=0.0):.3f}"]
        print(f"| {name} | {' | '.join(line)} |" + (f" missed: {missed}" if missed else ""))


def judged(
    results: list[Measured], planted: list[tuple[int, str, bytes]], pairs: dict[Pair, list[Match]]
) -> tuple[dict[Pair, Link], dict[str, float], float]:
    """What the product keeps of the candidates where voxels of both sides can be read, and at what CPU seconds."""
    copies = {f"{q} {name}": result.copies[name] for q, result in enumerate(results) for name in result.copies}
    overlay = Overlay(lambda key, mark: copies[key][mark], lambda key, mark: results[int(key)].picture)
    before = time.process_time()
    links = {}
    for (q, name, other), held in pairs.items():
        rows = [
            (
                FingerprintRow(f"{q} {name}", "", "", "", "", planted[match.a][2]),
                FingerprintRow(str(other), "", "", "", "", results[other].mark),
                Link(match.a, match.b, Evidence.NEAR_COPY, match),
            )
            for match in held
            if match.score >= CANDIDATE_SCORE
        ]
        if rows and (link := overlay.judge(rows)) is not None:
            links[q, name, other] = link
    return links, overlay.told(), time.process_time() - before


def tell_half(
    label: str, copies: set[tuple[int, str]], names: list[str], scores: dict[Pair, float], links: dict[Pair, Link]
) -> None:
    """Recall and false alarms of one half of the volumes."""
    num_pairs = len(copies) * (len(names) - 1)
    wrong = {pair: score for pair, score in scores.items() if pair[:2] in copies and pair[0] != pair[2]}
    print(f"\n{label}: {len({q for q, _ in copies})} volumes, {num_pairs} pairs of different patients")
    for threshold in (1.0, CANDIDATE_SCORE, 2.0, 2.5, 3.0, LEAST_SCORE, 5.0):
        hits = [scores.get((q, name, q), 0) >= threshold for q, name in copies]
        rate = sum(score >= threshold for score in wrong.values()) / num_pairs * 10000
        print(
            f"  marks alone, threshold {threshold}: recall {np.mean(hits):.2%} ({len(hits) - sum(hits)} of {len(hits)} "
            f"missed), {rate:.2f} false alarms per 10,000 pairs"
        )
    hits = [(q, name, q) in links for q, name in copies]
    alarms = [pair for pair in wrong if pair in links]
    print(
        f"  voxels too: recall {np.mean(hits):.2%} ({len(hits) - sum(hits)} of {len(hits)} missed), "
        f"{len(alarms) / num_pairs * 10000:.2f} false alarms per 10,000 pairs"
    )
    for q, name, other in alarms:
        link = links[q, name, other]
        print(f"    {wrong[q, name, other]:.1f} {link.correlation} {names[q]} ({name}) and {names[other]}")


if __name__ == "__main__":
    main()
