"""What a leakage certificate says, as a section of the report. Pure but for reading the file."""

import json
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.report.tables import counts_table, plain_table
from mim_scale.commit import sha256_values
from mim_scale.errors import SourceError

MOST_HITS = 50
"""Pairs that are listed."""


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate as `data leakage` wrote it.

    Raises:
        SourceError: the file is missing, is something else, or was changed.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); `data leakage` writes leakage.json") from None
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("format") != "mim-scale leakage certificate":
        raise SourceError(f"{path}: is no leakage certificate; name the leakage.json that `data leakage` wrote")
    if values.get("format_version") != 1:
        raise SourceError(f"{path}: is a certificate of another version; run `data leakage` again")
    if values.get("digest") != sha256_values({name: value for name, value in values.items() if name != "digest"}):
        raise SourceError(f"{path}: is not as it was written; run `data leakage` again")
    return values


def leakage_section(values: dict[str, Any] | None, digest: str) -> str:
    """Verdict, what was found by which evidence, and what was not compared; paths are left out.

    Args:
        values: A certificate; None where there is none.
        digest: Of the volumes of the store that the report is of, as certificates have it.
    """
    if values is None:
        return (
            '<p class="none">Not looked at: <code>mim-scale data leakage CORPUS BENCHMARK</code> writes the '
            "certificate that <code>data report --leakage leakage.json</code> shows here.</p>"
        )
    leaked, images = values["num_leaked"], values["num_benchmark_images"]
    if leaked:
        verdict = f'<p class="bad"><strong>{leaked:,} of {images:,} benchmark images are in the corpus.</strong></p>'
    else:
        kind, but = ("good", "") if values["complete"] else ("", ", but not everything was compared")
        verdict = (
            f'<p class="{kind}"><strong>None of {images:,} benchmark images was found in the corpus{but}.</strong></p>'
        )
    return (
        verdict
        + _corpus(values, digest)
        + _overlay(values.get("overlay"))
        + _not_compared(values["not_compared"])
        + _hits(values["hits"])
    )


def _corpus(values: dict[str, Any], digest: str) -> str:
    corpus, benchmark = values["corpus"], values["benchmark"]
    sides = f"{corpus['num_images']:,} images of the corpus against {benchmark['num_images']:,} of the benchmark"
    if corpus["digest"] == digest:
        return f"<p>The corpus is this store: {sides}.</p>"
    return (
        '<p class="bad"><strong>The corpus of this certificate is not this store as it is now:</strong> '
        f"{sides}. Run <code>data leakage</code> again.</p>"
    )


def _overlay(told: dict[str, Any] | None) -> str:
    if told is None:
        return "<p>Near-copies stand by their marks alone: no voxels were laid over each other.</p>"
    return (
        f"<p>Of {told['num_looked_at']:,} candidates laid over each other, voxels confirmed {told['num_confirmed']:,} "
        f"and refuted {told['num_refuted']:,}.</p>"
    )


def _not_compared(lines: list[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h3>Not compared</h3><ul>{items}</ul>" if lines else ""


def _hits(hits: list[dict[str, Any]]) -> str:
    if not hits:
        return ""
    counts = counts_table("By evidence", Counter(hit["evidence"] for hit in hits), "pairs")
    shown = hits[:MOST_HITS]
    rows = (
        (hit["corpus_key"], hit["benchmark_key"], hit["evidence"].replace("_", " "), f"{hit.get('score', '')}")
        for hit in shown
    )
    left_out = len(hits) - len(shown)
    return (
        f'<div class="tables">{counts}</div>'
        + plain_table(("volume of the corpus", "image of the benchmark", "evidence", ">score"), rows)
        + (f"<p>{left_out:,} more pairs are not shown; the certificate has them.</p>" if left_out else "")
    )
