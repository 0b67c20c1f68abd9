"""`mim-scale data scan`: what a source folder holds, from headers alone."""

import os
from collections import Counter
from pathlib import Path

from data_pipeline.commands.console import Bar, console, reasons_table, shown_bytes, table


def scan(source: Path | str) -> int:
    """List what a source folder holds, from headers alone.

    Raises:
        SourceError: the folder is missing or holds no image.
    """
    from data_pipeline.sources.find import find_sources

    root = Path(source)
    with Bar() as progress:
        tree = find_sources(root, progress.looked)
    rows = table(f"{root}", "format", ">inputs", ">files", ">bytes")
    for kind in sorted({found.format for found in tree.sources}):
        members = [found for found in tree.sources if found.format == kind]
        files = [path for found in members for path in found.paths(root) if os.path.isfile(path)]
        num_bytes = sum(path.stat().st_size for path in files)
        rows.add_row(kind, str(len(members)), str(len(files)), shown_bytes(num_bytes))
    refused = Counter(str(found.problem[0]) for found in tree.sources if found.problem)
    out = console()
    out.print(rows)
    if refused:
        out.print(reasons_table("refused by their headers", refused))
    out.print(
        f"{len(tree.sources)} inputs, {sum(refused.values())} of them refused by their headers; "
        f"{tree.num_ignored} other files ignored (texts, tables, DICOMDIR)"
    )
    out.print(f"next: mim-scale data build {root} STORE")
    return 0
