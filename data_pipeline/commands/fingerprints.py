"""`mim-scale data fingerprints`: a list of volumes to hold out or to compare with, which carries no images."""

from pathlib import Path

from data_pipeline.commands.console import console, shown_bytes
from mim_scale.bar import Bar


def fingerprints(source: Path, out: Path, key_file: Path | None = None) -> int:
    """Write the fingerprints of a store or of a folder of images as one Parquet file.

    Raises:
        SourceError, StoreError: the source is missing or cannot be used, or `out` is no .parquet.
    """
    from data_pipeline.leakage import load_side
    from data_pipeline.pseudonym_key import load_key
    from mim_scale.errors import SourceError
    from mim_scale.store.manifest import write_fingerprints

    if Path(out).suffix != ".parquet":
        raise SourceError(f"{out}: a list of fingerprints is a .parquet file; name it so")
    with Bar("images") as bar:
        side = load_side(Path(source), load_key(key_file), bar.at)
    write_fingerprints(Path(out), side.rows, side.key_check)
    shown = console()
    shown.print(
        f"{out}: fingerprints of {len(side.keys)} images, {shown_bytes(Path(out).stat().st_size)}; it carries no images"
    )
    if side.refused:
        shown.print(f"{len(side.refused)} inputs could not be read and are not in the list: {side.refused[0][0]}, ...")
    return 0
