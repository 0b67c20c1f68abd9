"""The report as one HTML page that needs no network: text, tables, charts, pictures, and a script that sorts. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from data_pipeline.commands.console import shown_bytes
from data_pipeline.report.charts import histogram, hu_histogram
from data_pipeline.report.leakage import leakage_section
from data_pipeline.report.numbers import MOST_GROUPS, UNITS, Numbers
from data_pipeline.report.outliers import LEAST_VOLUMES, THRESHOLD
from data_pipeline.report.tables import counts_table, plain_table
from data_pipeline.report.volume_table import Listed, volume_table
from mim_scale.store.manifest import HU_EDGES, Row

_COUNT_TITLES = {
    "manufacturers": "Manufacturers",
    "models": "Scanners",
    "kernels": "Kernels",
    "tube_kv": "Tube voltage (kV)",
    "source_formats": "Source formats",
    "flags": "Flags: what to know before using or publishing",
    "repairs": "Repairs: what was changed on the way in",
}


@dataclass(frozen=True)
class Picture:
    """A volume as the page shows it."""

    row: Row
    image: str
    """A data URI; empty where the volume is damaged or no pictures were asked for."""
    problem: str = ""
    """One line, where it is damaged."""
    why: tuple[str, ...] = ()
    """What is unusual."""


@dataclass(frozen=True)
class Contents:
    """Everything that is on the page."""

    numbers: Numbers
    listed: Sequence[Listed]
    """Volumes in the table; not all where there are very many."""
    outliers: Sequence[Picture]
    """The most unusual ones."""
    sample: Sequence[Picture]
    leakage: dict[str, Any] | None = None
    """The certificate of `data leakage`."""


def page(contents: Contents) -> str:
    """The whole page."""
    numbers = contents.numbers
    sections = (
        ("summary", "Summary", _summary(numbers)),
        ("geometry", "Geometry", _geometry(numbers)),
        ("hu", "Hounsfield units", _hu(numbers)),
        ("acquisition", "Acquisition, flags, repairs", _acquisition(numbers)),
        ("refused", "Refused inputs", _refused(numbers)),
        ("duplicates", "Duplicates and near-copies", _duplicates(numbers)),
        ("leakage", "Leakage", leakage_section(contents.leakage, numbers.digest)),
        ("outliers", "Outliers", _outliers(contents)),
        ("sample", "A sample of the volumes", _sample(contents)),
        ("volumes", "Volumes", volume_table(contents.listed, numbers.num_volumes)),
    )
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{escape(title)}</h2>{text}</section>'
        for name, title, text in sections
    )
    title = escape(f"Store {numbers.store}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page loads nothing from anywhere, and says so to the browser.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{title}: report</title><style>{_own('page.css')}</style></head><body>"
        f"<header><h1>{title}</h1>{_identity(numbers)}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<script>{_own('page.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return files("data_pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _identity(numbers: Numbers) -> str:
    return (
        f'<p class="soft">Fingerprint <code>{escape(numbers.record["fingerprint"])}</code>. Volumes, people and inputs '
        "are named by keys and pseudonyms; pictures show anatomy, faces and burned-in text included.</p>"
    )


def _summary(numbers: Numbers) -> str:
    stored, refused, inputs = numbers.num_volumes, numbers.num_refused, numbers.num_inputs
    sizes = numbers.num_bytes
    holds = inputs == stored + refused
    proof = (
        f'<p class="{"good" if holds else "bad"}"><strong>{inputs:,} inputs = {stored:,} stored + {refused:,} refused: '
        f"{'every input has exactly one row' if holds else 'this does not add up; build the store again'}.</strong> "
        '<span class="soft"><code>mim-scale data scan SOURCE --store STORE</code> holds this against the source.</span>'
        "</p>"
    )
    facts = (
        ("Inputs", f"{inputs:,}", ""),
        ("Stored volumes", f"{stored:,}", ""),
        ("Refused inputs", f"{refused:,}", f"{refused / max(1, inputs):.1%} of all"),
        (
            "Subjects",
            f"{numbers.num_subjects:,}",
            f"{stored / max(1, numbers.num_subjects):.1f} volumes each on average",
        ),
        ("Source files", shown_bytes(sizes["source"]), "of the stored volumes"),
        ("Voxels", shown_bytes(sizes["raw"]), "as int16"),
        ("On disk", shown_bytes(sizes["stored"]), _ratios(sizes)),
        ("Outliers", f"{len(numbers.outliers):,}", "in spacing, extent or HU"),
    )
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in facts)
    return f'{proof}<dl class="facts">{cells}</dl>'


def _ratios(sizes: dict[str, int]) -> str:
    stored = max(1, sizes["stored"])
    words = f"voxels {sizes['raw'] / stored:.2f}:1"
    return f"{words}, source {sizes['source'] / stored:.2f}:1" if sizes["source"] else words


def _geometry(numbers: Numbers) -> str:
    names = [f"{what} {axis}" for what in ("spacing", "shape", "extent") for axis in "zyx"] + ["slice thickness"]
    charts = "".join(
        histogram(name[0].upper() + name[1:], UNITS[name.split()[0]], numbers.columns[name]) for name in names
    )
    return (
        "<p>z runs from feet to head, y from back to front, x from left to right. Spacing is the distance of voxel "
        "centres; slice thickness is nominal, as headers give it.</p>"
        f'<div class="charts">{charts}</div>'
    )


def _hu(numbers: Numbers) -> str:
    low, high = numbers.hu_range
    words = f"{int(numbers.hu_voxels.sum()):,} voxels of {numbers.num_volumes:,} volumes, {low:,} to {high:,} HU"
    width = HU_EDGES[1] - HU_EDGES[0]
    charts = (
        hu_histogram(HU_EDGES, numbers.hu_voxels, f"{words}; bins of {width} HU, outer ones hold all beyond"),
        histogram("Mean HU", "HU", numbers.columns["mean HU"]),
        histogram("HU histogram distance", "HU", numbers.columns["HU histogram distance"]),
    )
    return (
        f'<div class="charts">{"".join(charts)}</div><p class="soft">The distance says how far the voxels of a volume '
        "would have to move along the HU axis, on average, for its histogram to be that of all voxels together.</p>"
    )


def _acquisition(numbers: Numbers) -> str:
    tables = (counts_table(_COUNT_TITLES[name], numbers.counts[name], "volumes") for name in _COUNT_TITLES)
    return f'<div class="tables">{"".join(tables)}</div>'


def _refused(numbers: Numbers) -> str:
    if not numbers.refused:
        return '<p class="good">No input was refused.</p>'
    parts = [f'<div class="tables">{counts_table("By reason", numbers.refused, "inputs")}</div>']
    for reason, count in sorted(numbers.refused.items(), key=lambda item: (-item[1], item[0])):
        examples = numbers.examples[reason]
        shown = "" if len(examples) == count else f", {len(examples)} of them here"
        rows = ((example.source_key, example.source_format, example.detail) for example in examples)
        parts.append(f"<h3>{escape(reason.replace('_', ' '))}: {count:,}{shown}</h3>")
        parts.append(plain_table(("key of the input", "format", "detail"), rows, "details"))
    parts.append(
        '<p class="soft"><code>mim-scale data quarantine show STORE</code> says what can be done about each reason; '
        "with <code>--names SOURCE</code> it shows the paths behind the keys.</p>"
    )
    return "".join(parts)


def _duplicates(numbers: Numbers) -> str:
    count = numbers.refused["duplicate"]
    inputs = "1 input was" if count == 1 else f"{count:,} inputs were"
    text = f"<p>{inputs} refused as duplicate: equal voxels are stored once.</p>"
    if not numbers.groups:
        return f"{text}<p>No two subjects share a near-copy.</p>"
    text += (
        f"<p>{len(numbers.groups):,} group{'' if len(numbers.groups) == 1 else 's'} of subjects share near-copies: "
        "all volumes of a group stay on one side of a split.</p>"
    )
    rows = ((name, f"{subjects:,}", f"{volumes:,}") for name, subjects, volumes in numbers.groups[:MOST_GROUPS])
    more = len(numbers.groups) - MOST_GROUPS
    return (
        text
        + plain_table(("group", ">subjects", ">volumes"), rows)
        + (f"<p>{more:,} more groups are not shown.</p>" if more > 0 else "")
    )


def _outliers(contents: Contents) -> str:
    found, shown = len(contents.numbers.outliers), len(contents.outliers)
    if contents.numbers.num_volumes < LEAST_VOLUMES:
        return f"<p>Not looked for: fewer than {LEAST_VOLUMES} volumes say nothing about what is usual.</p>"
    how = (
        f"A volume is an outlier where its spacing, extent, mean HU or HU histogram lies more than {THRESHOLD} robust "
        "standard deviations (from the median absolute deviation) from the median; spacing and shape by their ratio."
    )
    if not found:
        return f'<p class="good">No volume is an outlier.</p><p class="soft">{how}</p>'
    hidden = found - shown
    words = f"{found:,} of {contents.numbers.num_volumes:,} volumes are outliers, the most unusual ones first" + (
        f"; {hidden:,} not shown here, the table below has the first of them" if hidden else ""
    )
    return f'<p>{words}.</p><p class="soft">{how}</p>{_pictures(contents.outliers)}'


def _sample(contents: Contents) -> str:
    if not contents.sample:
        return '<p class="none">No pictures were asked for.</p>'
    return (
        f"<p>{len(contents.sample):,} of {contents.numbers.num_volumes:,}, chosen by lot.</p>"
        f"{_pictures(contents.sample)}"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    return f'<div class="pictures">{"".join(map(_picture, pictures))}</div>'


def _picture(picture: Picture) -> str:
    row = picture.row
    size = " × ".join(map(str, row.shape))
    spacing = " × ".join(f"{spacing:.3g}" for spacing in row.spacing_mm)
    why = "".join(f"<li>{escape(line)}</li>" for line in picture.why)
    words = (
        f"Volume {row.key}: middle slices, axial, coronal and sagittal from left to right, in a soft-tissue window "
        "(−160 to 240 HU) above and a lung window (−1350 to 150 HU) below"
    )
    image = f'<img src="{picture.image}" alt="{words}" loading="lazy">' if picture.image else ""
    image = f'<p class="none">{escape(picture.problem)}</p>' if picture.problem else image
    flags = [flag.replace("_", " ") for flag in row.flags]
    made = ", ".join(filter(None, (row.manufacturer, row.model, row.kernel, *flags)))
    return (
        f'<figure>{image}<figcaption><a href="#v-{row.key}"><code>{row.key}</code></a><br>{size} voxels, {spacing} mm'
        f"{f'<br>{escape(made)}' if made else ''}{f'<ul class=why>{why}</ul>' if why else ''}</figcaption></figure>"
    )
