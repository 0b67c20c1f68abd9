"""`mim-scale data verify`: is every committed byte still there and as it was."""

from pathlib import Path

from data_pipeline.commands.console import Bar, console, table
from mim_scale.errors import DamagedError


def verify(store: Path | str, deep: bool = False) -> int:
    """Check a store against its own records; 3 where something is damaged.

    Args:
        deep: decode every voxel and compare with the manifest, too.

    Raises:
        StoreError: no store there.
    """
    from mim_scale.store.verify import verify as check

    with Bar("volumes checked") as progress:
        problems = check(Path(store), deep, progress.at)
    out = console()
    if not problems:
        out.print(f"{store}: whole ({'every voxel was decoded' if deep else 'records and files; --deep decodes all'})")
        return 0
    rows = table(f"damage in {store}", "volume", "level", "what")
    for problem in problems:
        rows.add_row(problem.key, "" if problem.level < 0 else str(problem.level), problem.detail)
    out.print(rows)
    if any(problem.key for problem in problems):
        out.print("delete the folder volumes/VOLUME.zarr of each volume named here, then run the same `data build`")
    else:
        out.print("run the same `data build`: it writes the store's own records again and keeps the volumes")
    return DamagedError.exit_code
