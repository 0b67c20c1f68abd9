"""`mim-scale data quarantine`: what a store refused and why, and what to do about it."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from data_pipeline.commands.console import console, reasons_table, table
from mim_scale.errors import StoreError
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import QuarantineRow

Action = Literal["list", "show", "retry", "waive"]


def quarantine(
    action: Action,
    store: Path,
    keys: tuple[str, ...] = (),
    reason: str = "",
    source: str | None = None,
    as_json: bool = False,
) -> int:
    """Look at refused inputs, or have the next build try them again or let them pass.

    Args:
        keys: of inputs, as `list` shows them; all where there are none (not for waive).
        reason: only inputs refused for it.
        source: what the store was built from: paths or addresses are shown beside the keys that stand for them.

    Raises:
        StoreError: no store there, no such input, or a reason that cannot be waived.
    """
    rows = _chosen(store, keys, reason)
    match action:
        case "list" | "show":
            _show(store, rows, _names(store, source) if source is not None else {}, as_json, action == "show")
        case "retry":
            _retry(store, rows)
        case "waive":
            _waive(store, keys, rows)
    return 0


def _chosen(store: Path, keys: tuple[str, ...], reason: str) -> list[QuarantineRow]:
    every = Dataset.open(store).quarantine
    known = {row.source_key for row in every}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise StoreError(f"{store}: no refused input has the key {unknown[0]}; `data quarantine list` shows the keys")
    reasons = sorted({row.reason for row in every})
    if reason and reason not in reasons:
        raise StoreError(f"{store}: nothing was refused for {reason}; there are: {', '.join(reasons) or 'none'}")
    return [row for row in every if (not keys or row.source_key in keys) and (not reason or row.reason == reason)]


def _show(store: Path, rows: list[QuarantineRow], names: dict[str, str], as_json: bool, in_full: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) | _named(row, names) for row in rows], indent=1))
        return
    out = console(is_wide=bool(names))
    columns = ("key", "format", "reason", "detail", *(("input",) if names else ()))
    shown = table(f"refused by {store}", *columns)
    for row in rows:
        extra = (names.get(row.source_key, "no longer in the source"),) if names else ()
        shown.add_row(row.source_key, row.source_format, row.reason, row.detail, *extra)
    if rows:
        out.print(shown)
        out.print(reasons_table("by reason", Counter(row.reason for row in rows)))
    out.print(f"{len(rows)} refused inputs{'' if names or not rows else '; --names SOURCE shows their paths'}")
    if in_full:
        for reason in sorted({row.reason for row in rows}):
            out.print(f"{reason}: {ADVICE.get(reason, 'see the detail')}")


def _named(row: QuarantineRow, names: dict[str, str]) -> dict[str, str]:
    return {"name": names[row.source_key]} if row.source_key in names else {}


def _names(store: Path, source: str) -> dict[str, str]:
    """Paths of a source's inputs by the keys that stand for them in this store."""
    from data_pipeline.pseudonym_key import load_key
    from data_pipeline.sources.inventory import Inventory, kept_headers
    from mim_scale.store.dataset import read_record

    pseudonyms = load_key()
    made_with = read_record(store)["build_config"].get("pseudonym_key")
    if made_with != pseudonyms.check:
        raise StoreError(
            f"{store}: its keys were made with another pseudonym key ({made_with}, yours is {pseudonyms.check}); "
            "set MIM_SCALE_KEY_FILE to the one it was built with"
        )
    with Inventory(source, kept_headers(source)) as inventory:
        inventory.list_files()
        inventory.read_headers()
        return {pseudonyms.pseudonym("source", found.name): found.shown for found in inventory.sources()}


def _retry(store: Path, rows: list[QuarantineRow]) -> None:
    from data_pipeline.build.ledger import Ledger, builder_lock, forget_finished

    with builder_lock(store), Ledger(store) as ledger:
        ledger.forget({row.source_key for row in rows})
        forget_finished(store)
    console().print(f"{len(rows)} refused inputs will be tried again by the next `data build`")


def _waive(store: Path, keys: tuple[str, ...], rows: list[QuarantineRow]) -> None:
    from data_pipeline.build.ledger import builder_lock, read_waivers, write_waivers
    from data_pipeline.screen import WAIVABLE
    from mim_scale.store.dataset import read_record

    if not keys:
        raise StoreError(f"{store}: name the inputs to let pass by their keys; `data quarantine list` shows them")
    for row in rows:
        if row.reason not in WAIVABLE:
            raise StoreError(
                f"{store}: {row.source_key} was refused as {row.reason}, which is no matter of judgement; only "
                f"{', '.join(sorted(WAIVABLE))} can be waived"
            )
    with builder_lock(store):
        waivers = read_waivers(store)
        if waivers is None:
            waivers = dict(read_record(store)["build_config"].get("waivers", {}))
        for row in rows:
            waivers[row.source_key] = " ".join(sorted({*waivers.get(row.source_key, "").split(), row.reason}))
        write_waivers(store, waivers)
    console().print(f"{len(rows)} refused inputs will be let pass by the next `data build`; their rows will say so")


ADVICE = {
    # What can be done about each reason.
    "unreadable": "the file is damaged or no image: get it again from where it came; or the detail says how to give it",
    "io_error": "the disk, the bucket or the server refused: mend that, the next build tries it again",
    "worker_died": "give the build more memory or fewer --workers; the next build tries it again",
    "missing_slices": "get the missing slices and run the build again",
    "gantry_tilt": "straighten the series with a tool of your choice and add the result",
    "hu_implausible": "a mask or no CT: nothing to do; else mend the rescaling, or `data quarantine waive`",
    "archive": "unpack it into the source",
    "no_pixels": "nothing to do: it holds no image",
    "not_ct": "nothing to do: another modality",
    "localizer": "nothing to do: an overview image, no slices",
    "derived_map": "nothing to do: computed values, no HU of tissue; the original series may be beside it",
    "secondary_capture": "nothing to do: a picture of a screen; the original series may be beside it",
    "multi_frame": "export it as single frames, or with a position for each frame",
    "no_geometry": "export it again with image position, orientation and pixel spacing (NIfTI: an affine)",
    "mixed_sizes": "several series under one name: give each its own series UID or folder",
    "mixed_orientation": "several stacks under one name: give each its own series UID or folder",
    "mixed_series": "several series without UIDs in one folder: give each its own folder",
    "repeated_positions": "several phases or reconstructions in one series: give each a series UID of its own",
    "uneven_spacing": "slices are missing or of two series: get the whole series, or resample it to even steps",
    "not_3d": "split it into 3D volumes, or export grey values",
    "sheared_affine": "resample it to a grid of right angles",
    "spacing_implausible": "mend the voxel size in the header",
    "non_finite": "replace NaN and infinite values, or mend slope and intercept",
    "too_few_slices": "lower --min-slices, or `data quarantine waive`",
    "constant": "nothing to learn from; `data quarantine waive` where you know better",
    "duplicate": "nothing to do: its voxels are stored once",
    "label_map": "nothing to do: labels are no CT",
    "held_out": "nothing to do: it was to be kept out",
}
