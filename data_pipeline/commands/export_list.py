"""`mim-scale data list`: what a source holds as a list, for nnssl or for a later build."""

from dataclasses import replace
from pathlib import Path

from data_pipeline.commands.console import console
from data_pipeline.sources.descriptions.listed import Written
from mim_scale.bar import Bar
from mim_scale.errors import SourceError

_FOR_NNSSL = (".nii", ".nii.gz", ".nrrd", ".mha")


def export_list(source: Path | str, out: Path | str) -> int:
    """Write the images of a source as nnssl's pretrain_data.json, or as a CSV or Parquet list.

    The list names files by their paths or addresses. Subjects are numbered; their names are not in it.

    Raises:
        SourceError: the source is missing, holds no image, or the list's name says no known form.
    """
    from data_pipeline.sources.descriptions.export import write_table, written
    from data_pipeline.sources.inventory import Inventory, kept_headers

    root, path = str(source), Path(out)
    is_nnssl = path.suffix.lower() == ".json"
    if not is_nnssl and path.suffix.lower() not in {".csv", ".parquet"}:
        raise SourceError(f"{path}: a list is a .json for nnssl, a .csv or a .parquet; choose one of them")
    with Inventory(root, kept_headers(root)) as inventory:
        inventory.list_files()
        with Bar() as progress:
            inventory.read_headers(progress.looked)
        entries = list(
            written(inventory.address, inventory.sources(), lambda one: inventory.described.of(one.name, *one.files))
        )
        refused = sum(one.problem is not None for one in inventory.sources())
    left_out = 0
    if is_nnssl:
        entries, left_out = _for_nnssl(path, entries)
    else:
        write_table(path, entries)
    out_lines = console()
    images = sum(entry.role == "image" for entry in entries)
    out_lines.print(f"{path}: {images} images listed by their paths; {refused} inputs refused by headers or labels")
    if left_out:
        out_lines.print(f"left out: {left_out} files or folders of formats that nnssl does not read")
    if is_nnssl and len({_suffix(entry) for entry in entries}) > 1:
        out_lines.print("the images are of several formats: nnssl's authors advise one format for all")
    if not is_nnssl:
        out_lines.print(f"next: mim-scale data build {path} STORE")
    return 0


def _for_nnssl(path: Path, entries: list[Written]) -> tuple[list[Written], int]:
    from data_pipeline.sources.descriptions.addresses import is_address
    from data_pipeline.sources.descriptions.nnssl import write_nnssl

    images = [entry for entry in entries if entry.role == "image"]
    if any(is_address(entry.path) for entry in images):
        raise SourceError(f"{path}: nnssl reads files of a disk, not of a bucket or a web server; write a .csv list")
    kept = [entry for entry in images if _suffix(entry)]
    if not kept:
        raise SourceError(f"{path}: nnssl reads .nii .nii.gz .nrrd and .mha files, and the source holds none of them")
    # nnssl needs a subject for every image: who is not known is nobody else.
    named = [
        replace(entry, subject=entry.subject or f"own-{number:05d}", dataset=entry.dataset or "archive")
        for number, entry in enumerate(kept, start=1)
    ]
    write_nnssl(path, named)
    return kept, len(images) - len(kept)


def _suffix(entry: Written) -> str:
    """The one that nnssl knows; empty where it knows none."""
    return next((suffix for suffix in _FOR_NNSSL if entry.path.lower().endswith(suffix)), "")
