"""`mim-scale data scan`: what a source folder holds, from headers alone."""

from collections import Counter
from pathlib import Path

from data_pipeline.commands.console import console, reasons_table, shown_bytes, table
from mim_scale.bar import Bar
from mim_scale.errors import StoreError


def scan(source: Path | str, workers: int | None = None, store: Path | None = None, names: bool = False) -> int:
    """List what a source folder holds, from headers alone.

    Args:
        workers: processes that read headers; None takes one a core.
        store: a store to count against: every input must be a row of its manifest or of its quarantine.
        names: print the inputs that headers refuse, with their paths.

    Raises:
        SourceError: the folder is missing or holds no image.
        StoreError: some input has no row in the store.
    """
    import os

    from data_pipeline.sources.inventory import Inventory, kept_headers

    root = str(source)
    inputs: Counter[str] = Counter()
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    named = table("refused by their headers", "reason", "detail", "input")
    with Inventory(root, kept_headers(root)) as inventory:
        inventory.list_files()
        with Bar() as progress:
            inventory.read_headers(progress.looked, workers or len(os.sched_getaffinity(0)))
        for found in inventory.sources():
            inputs[found.format] += 1
            files[found.format] += len(found.files)
            sizes[found.format] += found.num_bytes
            if found.problem:
                refused[str(found.problem[0])] += 1
                if names:
                    named.add_row(*map(str, found.problem), found.shown)
        rows = table(f"{root}", "format", ">inputs", ">files", ">bytes")
        for kind in sorted(inputs):
            rows.add_row(kind, str(inputs[kind]), str(files[kind]), shown_bytes(sizes[kind]))
        out = console(is_wide=names)
        out.print(rows)
        if refused:
            out.print(named if names else reasons_table("refused by their headers", refused))
        out.print(
            f"{inventory.num_sources} inputs, {sum(refused.values())} of them refused by their headers; "
            f"{inventory.num_ignored} other files ignored (texts, tables, hidden files)"
        )
        for note in inventory.notes:
            out.print(note)
        if store is not None:
            _check_against(store, inventory.num_sources)
            out.print(f"{store}: each of the {inventory.num_sources} inputs is a row of its manifest or quarantine")
        else:
            out.print(f"next: mim-scale data plan {root} STORE, then mim-scale data build {root} STORE")
    return 0


def _check_against(store: Path, num_inputs: int) -> None:
    from mim_scale.store.dataset import read_record

    record = read_record(store)
    stored, quarantined = record["num_volumes"], record["num_quarantined"]
    if stored + quarantined != num_inputs:
        raise StoreError(
            f"{store}: {stored} volumes + {quarantined} quarantined are not the {num_inputs} inputs of the source: "
            "it has changed since the build; run the build again"
        )
