"""`mim-scale data build`: a store from a source folder, or go on with one."""

from typing import TYPE_CHECKING

from data_pipeline.commands.console import console, reasons_table, shown_bytes, table
from data_pipeline.reasons import PASSING
from mim_scale.bar import Bar
from mim_scale.config import BuildConfig

if TYPE_CHECKING:
    from data_pipeline.build.run import Outcome


def build(config: BuildConfig) -> int:
    """Build a store from a source folder, or go on with an interrupted build.

    Raises:
        SourceError: the source is missing, holds no image, or nothing in it can be stored.
        StoreError: the store's folder holds something else, belongs to another build, or cannot be written.
    """
    from data_pipeline.build.run import run_build

    with Bar() as progress:
        outcome = run_build(config, progress)
    if not outcome.fingerprint:
        return _told_part(outcome)
    rows = table(f"store {config.store}", "what", "")
    rows.add_row(
        "inputs", f"{outcome.num_sources} = {outcome.num_volumes} stored + {outcome.num_quarantined} quarantined"
    )
    raw, stored = outcome.bytes_raw, outcome.bytes_stored
    rows.add_row("subjects", str(outcome.num_subjects))
    rows.add_row("bytes", f"{shown_bytes(stored)} for {shown_bytes(raw)} of int16 voxels, ratio {raw / stored:.2f}")
    rows.add_row("fingerprint", outcome.fingerprint)
    out = console()
    if outcome.reasons:
        out.print(reasons_table("quarantined", outcome.reasons))
    out.print(rows)
    for note in outcome.notes:
        out.print(note)
    may_pass = sum(outcome.reasons.get(reason, 0) for reason in PASSING)
    if may_pass:
        count = f"{may_pass} input{'' if may_pass == 1 else 's'}"
        out.print(f"the store is whole without {count} that could not be read this time: run the same build again")
    else:
        out.print("nothing to do: the store is complete" if outcome.was_complete else "the store is complete")
    out.print(f"next: mim-scale data report {config.store}")
    return 0


def _told_part(outcome: "Outcome") -> int:
    out = console()
    if outcome.reasons:
        out.print(reasons_table("quarantined in this run", outcome.reasons))
    out.print(f"{outcome.num_sources} inputs = {outcome.num_volumes} volumes + {outcome.num_quarantined} refused")
    for note in outcome.notes:
        out.print(note)
    return 0
