"""`mim-scale data build`: a store from a source folder, or go on with one."""

from data_pipeline.commands.console import Bar, console, reasons_table, shown_bytes, table
from mim_scale.config import BuildConfig


def build(config: BuildConfig) -> int:
    """Build a store from a source folder, or go on with an interrupted build.

    Raises:
        SourceError: the source is missing, holds no image, or nothing in it can be stored.
        StoreError: the store's folder holds something else, belongs to another build, or cannot be written.
    """
    from data_pipeline.build.run import run_build

    with Bar() as progress:
        outcome = run_build(config, progress)
    volumes = outcome.rows
    raw, stored = sum(row.bytes_raw for row in volumes), sum(row.bytes_stored for row in volumes)
    rows = table(f"store {config.store}", "what", "")
    rows.add_row("inputs", f"{outcome.num_sources} = {len(volumes)} stored + {len(outcome.quarantine)} quarantined")
    rows.add_row("subjects", str(len({row.subject for row in volumes})))
    rows.add_row("bytes", f"{shown_bytes(stored)} for {shown_bytes(raw)} of int16 voxels, ratio {raw / stored:.2f}")
    rows.add_row("fingerprint", outcome.fingerprint)
    out = console()
    if outcome.quarantine:
        out.print(reasons_table("quarantined", outcome.reasons))
    out.print(rows)
    for note in outcome.notes:
        out.print(note)
    out.print("nothing to do: the store is complete" if outcome.was_complete else "the store is complete")
    return 0
