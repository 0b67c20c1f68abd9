"""Damaged volumes made again from their sources, each put in place whole; nothing else of the dataset is touched."""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.build.executor import make_executor
from data_pipeline.build.ledger import builder_lock
from data_pipeline.build.plan import PIPELINE_VERSION, make_tasks
from data_pipeline.build.task import Task, TaskResult, build_volume
from data_pipeline.pseudonym_key import load_key
from data_pipeline.sources.inventory import Inventory, kept_headers
from mim_scale.commit import publish_folder
from mim_scale.config import BuildConfig
from mim_scale.config_file import check_config
from mim_scale.errors import StoreError
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.manifest import Row

_WORKSHOP = Path("build") / "repair"
"""Where volumes are made before they are put in place: a source that has changed leaves nothing in volumes/."""


def repair(
    dataset: Dataset,
    keys: Collection[str],
    source: str,
    key_file: str | None = None,
    workers: int | None = None,
    looked: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Build volumes of a dataset again, with the settings of its record.

    Manifest and fingerprint stay as they are: a volume is put in place only if it is the one that was committed.

    Args:
        keys: Of the damaged volumes.
        source: What the dataset was built from.
        key_file: The secret behind its pseudonyms; None takes the user's own.
        workers: Volumes at once; None takes every core.
        looked: Hears how many headers of the source were read.

    Returns:
        Why a volume could not be repaired, in a few words, by key; empty where all were.

    Raises:
        SourceError: the source is missing or holds no image.
        StoreError: the dataset was built by another version or under another key, or cannot be written.
    """
    wanted = {row.source_key: row for row in dataset.rows if row.key in keys}
    config = _config(dataset, source, key_file, workers)
    workshop = dataset.path / _WORKSHOP
    with Inventory(source, kept_headers(source)) as inventory, builder_lock(dataset.path):
        inventory.list_files()
        inventory.read_headers(looked, config.workers or 1)
        tasks = _tasks(dataset, config, inventory, wanted)
        shutil.rmtree(workshop, ignore_errors=True)
        failed = {row.key: "its source is no longer there" for row in wanted.values()}
        try:
            with closing(make_executor(config).run(build_volume, tasks)) as ended:
                for result in ended:
                    row = wanted[result.source_key]
                    failed[row.key] = _put_in_place(dataset, workshop, row, result)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return {key: why for key, why in sorted(failed.items()) if why}


def _config(dataset: Dataset, source: str, key_file: str | None, workers: int | None) -> BuildConfig:
    asked = dataset.record["build_config"]
    if asked.get("pipeline_version") != PIPELINE_VERSION:
        raise StoreError(f"{dataset.path}: was built by another mim-scale; use that one, or run `data build` again")
    values: dict[str, Any] = {"source": source, "store": str(dataset.path), "executor": "local", "workers": workers}
    values |= {"spacing": asked.get("spacing"), "min_slices": asked.get("min_slices", 16), "key_file": key_file}
    return check_config(BuildConfig, values, "data verify --repair")


def _tasks(dataset: Dataset, config: BuildConfig, inventory: Inventory, wanted: dict[str, Row]) -> Iterator[Task]:
    """The tasks that make the wanted volumes, told to leave them in the workshop."""
    asked = dataset.record["build_config"]
    pseudonyms = load_key(Path(config.key_file) if config.key_file else None)
    if asked.get("pseudonym_key") != pseudonyms.check:
        raise StoreError(f"{dataset.path}: was built under another pseudonym key; name its file with --key")
    workshop = str((dataset.path / _WORKSHOP).resolve())
    tasks = make_tasks(inventory.address, inventory.sources(), config, pseudonyms, asked.get("waivers", {}))
    return (replace(task, store=workshop) for task in tasks if task.source_key in wanted)


def _put_in_place(dataset: Dataset, workshop: Path, row: Row, result: TaskResult) -> str:
    """Why not, in a few words; empty where the volume stands in its place."""
    if result.rejected is not None:
        return f"its source cannot be used any more: {result.rejected[0]}: {result.rejected[1]}"
    if result.row is None or result.row.content_hash != row.content_hash:
        return "its source has changed and gives another volume now; run `data build` to take that one"
    publish_folder(volume_folder(workshop, row.key), volume_folder(dataset.path, row.key))
    return ""
