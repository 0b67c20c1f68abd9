"""`mim-scale data push`: a finished store, pack or export into a bucket."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import progress as bars
from rich.console import Console

from data_pipeline.commands.console import console, shown_bytes, table


class ByteBar:
    """Bytes, rate and time left; silent where nobody watches."""

    def __init__(self, what: str) -> None:
        self._bars = bars.Progress(
            bars.TextColumn(what),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task: bars.TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def began(self, done: int, total: int) -> None:
        """So many bytes are to be dealt with."""
        self._task = self._bars.add_task("", total=total, completed=done)

    def advanced(self, num_bytes: int) -> None:
        """So many more are where they belong."""
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)


def push(folder: Path | str, url: str, delete_old: bool = False) -> int:
    """Upload a store, a pack or an export; run again to go on.

    Raises:
        StoreError: the folder has no commit record, or another upload to the same address was faster.
        DamagedError: the folder is damaged.
        StorageError: the storage cannot be used.
    """
    from data_pipeline.storage.push import push_folder

    with ByteBar("sent") as progress:
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
