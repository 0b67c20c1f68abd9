"""`mim-scale data plan`: what a build would do and take, from headers alone; nothing is written."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from data_pipeline.commands.console import console, shown_bytes, table
from mim_scale.bar import Bar
from mim_scale.config import BuildConfig


def plan(config: BuildConfig, as_json: bool = False) -> int:
    """Print counts, bytes before and after, core-hours and memory of a build.

    Raises:
        SourceError: the source is missing or holds no image.
        StoreError: the store's folder holds something else.
    """
    from data_pipeline.build.run import plan_build

    with Bar() as progress:
        found = plan_build(config, progress)
    if as_json:
        print(
            json.dumps(asdict(found) | {"bytes_stored": found.bytes_stored, "core_hours": found.core_hours}, indent=1)
        )
        return 0
    rows = table(f"{config.source} -> {config.store}", "what", "")
    rows.add_row("inputs", f"{found.num_sources}, {found.num_refused} of them refused by their headers")
    rows.add_row("done by earlier builds", str(found.num_done))
    rows.add_row("source files", shown_bytes(found.bytes_source))
    rows.add_row("voxels as int16", shown_bytes(found.bytes_raw))
    how = "as measured on what is done" if found.is_measured else "a cautious guess, until some volumes are done"
    rows.add_row("store on disk, about", f"{shown_bytes(found.bytes_stored)} ({how})")
    rows.add_row("free on that disk", shown_bytes(_free_bytes(Path(config.store))))
    rows.add_row("work left, about", _shown_work(found.core_hours))
    rows.add_row("memory of the largest task", shown_bytes(found.largest_memory_bytes))
    out = console()
    out.print(rows)
    for warning in found.warnings:
        out.print(f"beware: {warning}")
    out.print(f"next: mim-scale data build {shlex.join(_typed(config))}", soft_wrap=True)
    return 0


def _typed(config: BuildConfig) -> list[str]:
    """What a build with these settings is started with; only what is not the default."""
    words = [str(config.source), str(config.store)]
    plain = BuildConfig(source=config.source, store=config.store)
    if config.spacing is not None:
        words += ["--spacing", ",".join(f"{size:g}" for size in config.spacing)]
    for name in ("min_slices", "executor", "workers", "part", "key_file"):
        value = getattr(config, name)
        if value != getattr(plain, name):
            words += [f"--{'key' if name == 'key_file' else name.replace('_', '-')}", str(value)]
    words += [word for path in config.hold_out for word in ("--hold-out", str(path))]
    return words + ["--replace"] * config.replace


def _shown_work(core_hours: float) -> str:
    return f"{core_hours:.1f} core-hours" if core_hours >= 1 else f"{core_hours * 60:.1f} core-minutes"


def _free_bytes(path: Path) -> int:
    import shutil

    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
