"""`mim-scale data leakage`: which images of a benchmark are in a corpus, as a certificate."""

import json
from collections import Counter
from pathlib import Path

from data_pipeline.commands.console import console, table
from mim_scale.bar import Bar

LEAK = 3
"""The exit code of `--fail-on-leak`."""


def leakage(
    corpus: Path,
    benchmark: Path,
    out: Path,
    key_file: Path | None = None,
    with_names: bool = False,
    with_pictures: bool = True,
    fail_on_leak: bool = False,
) -> int:
    """Compare two sides, write leakage.json and leakage.html, print the verdict.

    Raises:
        SourceError, StoreError: a side is missing or cannot be used.
    """
    from data_pipeline.leakage import certificate, load_side
    from data_pipeline.leakage_page import page
    from data_pipeline.pseudonym_key import load_key
    from mim_scale.commit import write_file

    key = load_key(key_file)
    with Bar("images of the corpus") as bar:
        ours = load_side(Path(corpus), key, bar.at)
    with Bar("images of the benchmark") as bar:
        theirs = load_side(Path(benchmark), key, bar.at)
    values = certificate(ours, theirs, with_names)
    text = page(values, ours, theirs, with_pictures)
    write_file(Path(out) / "leakage.json", (json.dumps(values, indent=1) + "\n").encode())
    write_file(Path(out) / "leakage.html", text.encode())
    rows = table("leakage", "what", "")
    rows.add_row("corpus", f"{len(ours.keys)} images ({ours.kind})")
    rows.add_row("benchmark", f"{len(theirs.keys)} images ({theirs.kind})")
    rows.add_row("in the corpus", f"{values['num_leaked']} of {len(theirs.keys)} benchmark images")
    for evidence, count in Counter(hit["evidence"] for hit in values["hits"]).items():
        rows.add_row(evidence, f"{count} pairs")
    if overlay := values["overlay"]:
        rows.add_row(
            "laid over each other",
            f"{overlay['num_looked_at']} candidates: voxels confirmed {overlay['num_confirmed']}, "
            f"refuted {overlay['num_refuted']}",
        )
    shown = console()
    shown.print(rows)
    for line in values["not_compared"]:
        shown.print(f"not compared: {line}")
    shown.print(f"written: {Path(out) / 'leakage.html'} and leakage.json")
    return LEAK if fail_on_leak and not values["clean"] else 0
