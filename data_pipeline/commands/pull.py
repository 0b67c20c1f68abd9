"""`mim-scale data pull`: a store from a bucket, as it was pushed."""

from pathlib import Path

from data_pipeline.commands.console import console, shown_bytes
from mim_scale.bar import Bar


def pull(url: str, store: Path | str) -> int:
    """Download a store; run again to go on.

    Raises:
        StoreError: there is no store at the address, or the folder holds something else.
        DamagedError: what came is not what the record names.
        StorageError: the storage cannot be used.
    """
    from data_pipeline.storage.push import pull_store

    with Bar("fetched", in_bytes=True) as progress:
        fetched = pull_store(url, Path(store), progress)
    console().print(f"{store}: complete, {shown_bytes(fetched)} fetched now")
    return 0
