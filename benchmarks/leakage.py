"""Recall of planted near-copies and false alarms among different patients: `python -m benchmarks.leakage FOLDER...`."""

import argparse
import io
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from data_pipeline.canonical import canonical, resample
from data_pipeline.duplicates import LEAST_SCORE, find_copies
from data_pipeline.leakage import fingerprints_of_scan
from data_pipeline.reasons import Rejected
from data_pipeline.sources.inventory import find_sources
from data_pipeline.sources.read import read_source
from data_pipeline.sources.source import Scan, Source
from data_pipeline.volume_fingerprint import volume_fingerprint
from mim_scale.store.geometry import Spacing3
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


def measure(item: tuple[str, Source, int]) -> tuple[str, bytes, float, float, dict[str, list[bytes]]] | None:
    """Name, fingerprint, CPU ms, megavoxels and, where asked for, the fingerprints of every copy of one source."""
    root, source, copies = item
    try:
        volume, _ = canonical(read_source(Path(root), source))
    except Rejected:
        return None
    before = time.process_time()
    own = volume_fingerprint(volume)
    taken = (time.process_time() - before) * 1000
    found: dict[str, list[bytes]] = {}
    if copies:
        for number, (name, change) in enumerate(CHANGES.items()):
            voxels, (z, y, x) = change(volume, np.random.default_rng((7, number)))
            affine = np.diag([x, y, z, 1.0])
            found[name] = fingerprints_of_scan(Scan(voxels.transpose(2, 1, 0), affine))[1]
    return source.name, own, taken, volume.voxels.size / 1e6, found


def same_patient(a: str, b: str) -> bool:
    """Whether two of the public volumes are known to be of one patient."""
    return a == b or any((p in a and q in b) or (q in a and p in b) for p, q in SAME_PATIENT)


def main() -> None:
    """Print the tables of docs/benchmarks/2026-11-24-leakage.md."""
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
    print(f"{platform.machine()}; {len(results)} volumes, copies of {sum(bool(r[4]) for r in results)} of them")
    sizes, times = [len(result[1]) for result in results], [result[2] for result in results]
    voxels, largest = max((result[3], result[2]) for result in results)
    print(
        f"fingerprints: {statistics.median(sizes):.0f} bytes in the median, {max(sizes)} at most; CPU "
        f"{statistics.median(times):.0f} ms in the median, {largest:.0f} ms for the largest of {voxels:.1f} M voxels"
    )
    report(results)


def report(results: list[tuple[str, bytes, float, float, dict[str, list[bytes]]]]) -> None:
    """Choose the threshold on the even volumes, report both halves by it and by the one in use."""
    names = [result[0] for result in results]
    planted = [
        (q, name, mark) for q, result in enumerate(results) for name, marks in result[4].items() for mark in marks
    ]
    before = time.process_time()
    matches = find_copies([mark for _, _, mark in planted], [result[1] for result in results], least_score=0.5)
    seconds = time.process_time() - before
    own: dict[tuple[int, str], float] = defaultdict(float)
    wrong: dict[tuple[int, int, str], float] = defaultdict(float)
    for match in matches:
        q, name, _ = planted[match.a]
        if q == match.b:
            own[q, name] = max(own[q, name], match.score)
        elif not same_patient(names[q], names[match.b]):
            wrong[q, match.b, name] = max(wrong[q, match.b, name], match.score)
    print(f"search: {len(planted)} fingerprints against {len(results)} in {seconds:.0f} CPU s")
    sides = {half: {q for q, result in enumerate(results) if result[4] and (q // 2) % 2 == half} for half in (0, 1)}
    for half, label in ((0, "chosen on"), (1, "reported")):
        num_pairs = sum(len(results[q][4]) for q in sides[half]) * (len(results) - 1)
        scores = sorted((score for (q, _, _), score in wrong.items() if q in sides[half]), reverse=True)
        print(f"\n{label}: {len(sides[half])} volumes, {num_pairs} pairs of different patients")
        for (q, other, name), score in sorted(wrong.items(), key=lambda item: -item[1])[:8]:
            if q in sides[half]:
                print(f"  {score:.1f} {Path(names[q]).name} ({name}) and {Path(names[other]).name}")
        for threshold in (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, LEAST_SCORE):
            hits = [own.get((q, name), 0) >= threshold for q in sides[half] for name in results[q][4]]
            alarms = sum(score >= threshold for score in scores)
            rate = alarms / num_pairs * 10000
            print(f"  threshold {threshold}: recall {np.mean(hits):.2%}, {rate:.2f} false alarms per 10,000 pairs")
    print("\n| change | recall, chosen on | recall, reported | lowest score |\n|---|---|---|---|")
    for name in CHANGES:
        line = [f"{np.mean([own.get((q, name), 0) >= LEAST_SCORE for q in sides[half]]):.1%}" for half in (0, 1)]
        missed = [Path(names[q]).name for q in sides[0] | sides[1] if own.get((q, name), 0) < LEAST_SCORE]
        lowest = min(own.get((q, name), 0) for q in sides[0] | sides[1])
        print(f"| {name} | {line[0]} | {line[1]} | {lowest:.1f} |" + (f" missed: {missed}" if missed else ""))


if __name__ == "__main__":
    main()
