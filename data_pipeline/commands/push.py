"""`mim-scale data push`: a finished store, pack or export into a bucket."""

from pathlib import Path

from data_pipeline.commands.console import console, shown_bytes, table
from mim_scale.bar import Bar


def push(folder: Path | str, url: str, delete_old: bool = False) -> int:
    """Upload a store, a pack or an export; run again to go on.

    Raises:
        StoreError: the folder has no commit record, or another upload to the same address was faster.
        DamagedError: the folder is damaged.
        StorageError: the storage cannot be used.
    """
    from data_pipeline.storage.push import push_folder

    with Bar("sent", in_bytes=True) as progress:
        done = push_folder(Path(folder), url, progress, delete_old)
    rows = table(f"{folder} in {url}", "what", "")
    rows.add_row("objects", f"{done.num_objects}, {done.num_sent} of them sent now")
    rows.add_row("bytes", f"{shown_bytes(done.num_bytes)}, {shown_bytes(done.bytes_sent)} of them sent now")
    if done.num_old:
        told = "removed" if done.old_deleted else "left for readers of that build; --delete-old removes them"
        rows.add_row("of older builds", f"{done.num_old} objects, {told}")
    out = console()
    out.print(rows)
    out.print("nothing to do: all is there" if not done.num_sent else "complete: the commit record was written last")
    return 0
