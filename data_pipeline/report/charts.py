"""Charts of the report as inline SVG, coloured by the page's style: each says in words what it shows. Pure."""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 10, 34
_BINS = 30
_TAIL = 0.01
"""Share of the volumes that may lie beyond each end of an axis; they count in its first or last bar."""
_LEAST_FOR_TAILS = 50
_NARROW = 0.02
"""Axes are at least so wide, as a share of the median: where all agree there is one bar, not noise."""


def histogram(title: str, unit: str, values: NDArray[np.float64]) -> str:
    """How many volumes have which value; those that are not finite are told beside the title."""
    known = values[np.isfinite(values)]
    missing = len(values) - len(known)
    if not len(known):
        return _figure(title, "no volume says it", '<p class="none">No volume says it.</p>')
    edges, is_cut = _edges(known)
    counts = np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0]
    summary = f"median {_short(float(np.median(known)))} {unit}, {_short(known.min())} to {_short(known.max())}"
    summary += f"; {missing:,} not said" if missing else ""
    summary += "; the outer bars hold all beyond" if is_cut else ""
    names = [f"{_short(a)} to {_short(b)} {unit}" for a, b in pairwise(edges)]
    span = float(edges[-1] - edges[0])
    ticks = [((at - edges[0]) / span, _short(at)) for at in _round_numbers(float(edges[0]), float(edges[-1]))]
    return _figure(title, summary, _bars(f"{title}: {summary}", counts, names, ticks, unit, "volumes"))


def hu_histogram(edges: Sequence[int], voxels: NDArray[np.int64], total_words: str) -> str:
    """Share of all voxels in each bin of Hounsfield units; the axis of shares is logarithmic."""
    shares = voxels / max(1, int(voxels.sum()))
    names = [f"{a} to {b} HU: {share:.3%}" for (a, b), share in zip(pairwise(edges), shares, strict=True)]
    low, high = edges[0], edges[-1]
    ticks = [((hu - low) / (high - low), f"{hu:,}") for hu in (-1000, 0, 1000, 2000, 3000)]
    shown = np.maximum(np.log10(np.maximum(shares, 1e-9)) + 6, 0)
    marks = [(exponent + 6, f"{10.0 ** (exponent + 2):g}%") for exponent in (-6, -4, -2, 0)]
    body = _bars(f"HU of all voxels: {total_words}", shown, names, ticks, "HU", "share of voxels", marks, 720)
    return _figure("HU of all voxels", total_words, body, "wide")


def _edges(known: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """Edges of bars, and whether values lie beyond them."""
    low, high = float(known.min()), float(known.max())
    if len(known) >= _LEAST_FOR_TAILS:
        low, high = (float(np.quantile(known, q)) for q in (_TAIL, 1 - _TAIL))
    least = _NARROW * max(abs(float(np.median(known))), 1e-6)
    if high - low < least:
        low, high = low - least, high + least
    return np.linspace(low, high, _BINS + 1), bool(known.min() < low or known.max() > high)


def _bars(
    words: str,
    heights: NDArray[np.float64] | NDArray[np.int64],
    names: Sequence[str],
    ticks: Sequence[tuple[float, str]],
    x_name: str,
    y_name: str,
    marks: Sequence[tuple[float, str]] | None = None,
    width: int = _WIDTH,
) -> str:
    """The drawing: bars of the given heights, each with a tooltip."""
    if marks is None:
        marks = [(at, _short(at)) for at in _round_numbers(0, float(heights.max())) if at == int(at)]
    top = max(marks[-1][0], float(heights.max()), 1e-9)
    inner_width, inner_height = width - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    floor = _TOP + inner_height
    parts = [
        f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{escape(words)}"><title>{escape(words)}</title>'
    ]
    for value, text in marks:
        y = floor - inner_height * value / top
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>')
    step = inner_width / len(heights)
    for i, (height, name) in enumerate(zip(heights, names, strict=True)):
        if height > 0:
            # Also a single volume among thousands is to be seen.
            tall = max(1.5, inner_height * float(height) / top)
            count = "" if y_name != "volumes" else f": {int(height):,} volume{'' if height == 1 else 's'}"
            parts.append(
                f'<rect class="bar" x="{_LEFT + i * step + 0.5:.1f}" y="{floor - tall:.1f}" '
                f'width="{max(step - 1, 1):.1f}" height="{tall:.1f}"><title>{escape(name + count)}</title></rect>'
            )
    for place, text in ticks:
        x = _LEFT + place * inner_width
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 3}"/>')
        anchor = "end" if place > 0.96 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{floor + 14}" text-anchor="{anchor}">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = _LEFT + inner_width / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(
        f'<text class="name" x="11" y="{_TOP + inner_height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 11 {_TOP + inner_height / 2})">{escape(y_name)}</text></svg>'
    )
    return "".join(parts)


def _figure(title: str, summary: str, body: str, kind: str = "") -> str:
    return (
        f'<figure class="chart {kind}"><figcaption><strong>{escape(title)}</strong> '
        f"<span>{escape(summary)}</span></figcaption>{body}</figure>"
    )


def _round_numbers(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    step = 10.0 ** math.ceil(math.log10(max(high - low, 1e-9)))
    while (high - low) / step < 3:
        # 10, 5, 2.5, 1, ...
        step /= 2.5 if f"{step:e}"[:3] == "2.5" else 2
    return [at * step for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(number: float) -> str:
    """A number in about four digits."""
    number = float(number)
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"
