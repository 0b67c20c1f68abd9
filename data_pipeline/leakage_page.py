"""A leakage certificate as one page that a person reads offline: verdict first, then hits, pictures and limits."""

import base64
import html
import io
from typing import Any

import numpy as np
from matplotlib import image as images
from numpy.typing import NDArray
from scipy import ndimage

from data_pipeline.leakage import Side
from mim_scale.store.volume import Volume

MOST_PICTURES = 100
"""Hits that are shown as pictures."""
_SIDE_PIXELS = 160
_WINDOW_HU = (-160, 240)
_WORDS = {
    "same_voxels": "same voxels",
    "same_series": "same series",
    "same_patient": "same patient",
    "near_copy": "near-copy",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { padding: 1rem; border-left: 6px solid; background: var(--soft); font-size: 1.15rem; }
.leak { border-color: #c62828; } .clean { border-color: #2e7d32; } .part { border-color: #b26a00; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
td, th { text-align: left; vertical-align: top; }
td.number { text-align: right; } code { font-size: .85rem; overflow-wrap: anywhere; }
img { background: #000; display: block; } figure { margin: 0; } figcaption { font-size: .8rem; opacity: .75; }
.pair { display: flex; gap: .5rem; } small { opacity: .75; }
"""


def page(values: dict[str, Any], corpus: Side, benchmark: Side, with_pictures: bool = True) -> str:
    """The certificate as HTML without any reference to other files.

    Args:
        values: what `certificate` gave.
        with_pictures: show the middle slices of the first hits, where voxels are at hand.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Leakage certificate</title>",
        f"<style>{_STYLE}</style></head><body><h1>Leakage certificate</h1>",
        _verdict(values),
        _hits(values, corpus, benchmark, with_pictures),
        _compared(values),
        _limits(values),
        f"<p><small>mim-scale {html.escape(values['mim_scale'])}, digest of this certificate "
        f"<code>{values['digest']}</code></small></p></body></html>",
    ]
    return "\n".join(parts)


def _verdict(values: dict[str, Any]) -> str:
    num, total = values["num_leaked"], values["num_benchmark_images"]
    if num:
        kind, words = "leak", f"<b>Leak:</b> {num} of {total} benchmark images are in the corpus."
    elif values["complete"]:
        kind, words = "clean", f"<b>Clean:</b> none of {total} benchmark images was found in the corpus."
    else:
        kind, words = (
            "part",
            (
                f"<b>None found, but not everything was compared:</b> none of {total} benchmark images was "
                "found in the corpus; see below what this does not cover."
            ),
        )
    return f"<p class='verdict {kind}'>{words}</p>"


def _hits(values: dict[str, Any], corpus: Side, benchmark: Side, with_pictures: bool) -> str:
    hits = values["hits"]
    if not hits:
        return ""
    heads = ("in the corpus", "in the benchmark", "evidence", "score", "the same place in both, where it is known")
    lines = []
    for place, hit in enumerate(hits):
        shown = _pair(corpus, benchmark, hit) if with_pictures and place < MOST_PICTURES else ""
        names = [
            f"<code>{hit[f'{side}_key']}</code>"
            + (f"<br><small>{html.escape(hit[f'{side}_name'])}</small>" if hit.get(f"{side}_name") else "")
            for side in ("corpus", "benchmark")
        ]
        evidence = _WORDS[hit["evidence"]]
        if hit.get("suspected"):
            evidence += (
                f"<br><small>{html.escape(hit['suspected'])}; {hit['marks_in_common']} marks in common; "
                f"{_told_by_voxels(hit)}</small>"
            )
        lines.append(
            f"<tr><td>{names[0]}</td><td>{names[1]}</td><td>{evidence}</td>"
            f"<td class='number'>{hit.get('score', '')}</td><td>{shown}</td></tr>"
        )
    row = "".join(f"<th>{head}</th>" for head in heads)
    return (
        f"<h2>What was found</h2><table id='hits'><thead><tr>{row}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _told_by_voxels(hit: dict[str, Any]) -> str:
    if hit["evidence"] == "same_voxels":
        return "<b>voxel for voxel the same</b>"
    if hit["confirmed_by_voxels"]:
        return f"<b>confirmed by voxels, correlation {hit['correlation']:.2f}</b>"
    if hit["correlation"] is not None:
        return f"not confirmed by voxels, correlation {hit['correlation']:.2f}, but too many marks agree to drop it"
    return "by marks alone" if hit["evidence"] == "near_copy" else "voxels were not laid over each other"


def _overlay(values: dict[str, Any]) -> str:
    told = values["overlay"]
    if told is None:
        return (
            "<p>One side is a list, which carries no voxels: near-copies stand by their marks alone, "
            "none was confirmed or refuted.</p>"
        )
    return (
        f"<p>Near-copies from a score of {told['candidate_score']} on were laid over each other, voxels on voxels: "
        f"<b>{told['num_looked_at']} candidates looked at, {told['num_confirmed']} confirmed, {told['num_refuted']} "
        f"refuted and dropped</b> ({told['num_refuted_hits']} of these would have counted by their marks). Confirmed "
        f"means that soft tissue correlates by {told['least_correlation']} or more. Pairs whose voxels cannot be read "
        "or hardly overlap are never dropped for it.</p>"
    )


def _compared(values: dict[str, Any]) -> str:
    lines = []
    for side in ("corpus", "benchmark"):
        told = values[side]
        lines.append(
            f"<tr><td>{side}</td><td>{told['kind']}</td><td class='number'>{told['num_images']}</td>"
            f"<td class='number'>{told['num_refused']}</td><td><code>{told['key_check'] or 'unknown'}</code></td>"
            f"<td><code>{told['digest'][:16]}</code></td></tr>"
        )
    return (
        "<h2>What was compared</h2><table><thead><tr><th>side</th><th>kind</th><th>images</th><th>not read</th>"
        f"<th>check of the pseudonym key</th><th>digest</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"
        "<p>Evidence, strongest first: equal voxels; one series; one patient (the last two by pseudonym, under one key "
        f"only); a near-copy, which is a volume fingerprint (version {values['volume_fingerprint_version']}) of score "
        f"{values['least_score']} or more. Near-copies are found after flips, wrong axes, resampling, windowing, "
        "cropping, thicker slices and lossy compression.</p>" + _overlay(values)
    )


def _limits(values: dict[str, Any]) -> str:
    lines = [
        *values["not_compared"],
        "pieces of less than about 120 mm, or with little soft tissue in them, may be missed; so may copies whose "
        "voxel size is wrong. On planted copies of real CT, 98.9 and 100 % (two halves) were found where voxels were "
        "laid over each other, with no false alarm among 88,725 pairs of different patients, mostly heads at coarse "
        "voxels; by marks alone 98.2 and 100 %, with 14 and 2 false alarms among 10,000 pairs, all below a score of "
        "6.1: look at hits of low score that no voxels confirmed (docs/benchmarks/2026-11-26-leakage.md)",
    ]
    return (
        "<h2>What this does not cover</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
    )


def _pair(corpus: Side, benchmark: Side, hit: dict[str, Any]) -> str:
    ours, theirs = corpus.voxels(hit["corpus_key"]), benchmark.voxels(hit["benchmark_key"])
    shown = []
    for name, volume, place in (("corpus", ours, _place_in_corpus(hit, ours, theirs)), ("benchmark", theirs, None)):
        if volume is not None:
            shown.append(
                f"<figure><img alt='axial slice' width='{_SIDE_PIXELS}' src='{_data_uri(axial_slice(volume, place))}'>"
                f"<figcaption>{name}</figcaption></figure>"
            )
    return f"<div class='pair'>{''.join(shown)}</div>" if shown else "<small>no voxels at hand</small>"


def _place_in_corpus(hit: dict[str, Any], ours: Volume | None, theirs: Volume | None) -> int | None:
    """The slice of the corpus volume that shows what the middle slice of the benchmark image shows."""
    if "relation" not in hit or ours is None or theirs is None:
        return None
    middle = np.array([len(theirs.voxels) // 2, *(size // 2 for size in theirs.shape[1:])]) * theirs.spacing_mm
    there = (middle - np.array(hit["shift_mm"])) @ np.array(hit["relation"]).T
    return int(np.clip(round(float(there[0] / ours.spacing_mm[0])), 0, len(ours.voxels) - 1))


def axial_slice(volume: Volume, place: int | None = None) -> NDArray[np.uint8]:
    """A slice, or the middle one, as a square 8-bit picture: right on the left, front at the top, millimetres true."""
    low, high = _WINDOW_HU
    plane = volume.voxels[len(volume.voxels) // 2 if place is None else place][::-1, ::-1].astype(np.float32)
    grey = (np.clip(plane, low, high) - low) / (high - low) * 255
    sizes = np.array(grey.shape) * volume.spacing_mm[1:]
    scale = _SIDE_PIXELS / sizes.max()
    small = ndimage.zoom(grey, np.array(volume.spacing_mm[1:]) * scale, order=1)
    square = np.zeros((_SIDE_PIXELS, _SIDE_PIXELS), np.uint8)
    rows, columns = (min(size, _SIDE_PIXELS) for size in small.shape)
    top, left = (_SIDE_PIXELS - rows) // 2, (_SIDE_PIXELS - columns) // 2
    square[top : top + rows, left : left + columns] = np.clip(small[:rows, :columns], 0, 255)
    return square


def _data_uri(picture: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    images.imsave(file, picture, cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
