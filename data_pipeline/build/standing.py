"""What stands where a store is to be built, and whether it may be built over."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.build import plan
from data_pipeline.build.compact import Names
from data_pipeline.build.ledger import is_begun, read_waivers, stored_keys
from data_pipeline.build.task import Task
from data_pipeline.storage.storage import is_remote
from mim_scale.errors import DamagedError, StoreError
from mim_scale.store.dataset import MANIFEST, QUARANTINE, RECORD, VOLUMES, read_record, read_table, table_path
from mim_scale.store.manifest import iter_rows, read_quarantine


@dataclass
class Standing:
    """The dataset that stood in the store before this build."""

    record: dict[str, Any] | None = None
    keys: Names = field(default_factory=lambda: Names.of(()))
    source_keys: Names = field(default_factory=lambda: Names.of(()))
    is_damaged: bool = False


def read_standing(store: Path) -> Standing:
    """The dataset that stands there, and whether its record or a table of it is damaged."""
    if not (store / RECORD).exists():
        return Standing()
    try:
        record = read_record(store)
        read_table(store, record, QUARANTINE, read_quarantine)
        manifest = table_path(store, record, MANIFEST)
        keys = Names.of(row.key for row in iter_rows(manifest))
        source_keys = Names.of(row.source_key for row in iter_rows(manifest))
    except DamagedError:
        return Standing(keys=Names.of(stored_keys(store)), is_damaged=True)
    if record["build_config"].get("pipeline_version", 0) > plan.PIPELINE_VERSION:
        raise StoreError(f"{store}: was built by a newer mim-scale; use that one, or build into another folder")
    return Standing(record, keys, source_keys)


def waivers_of(store: Path, before: Standing) -> dict[str, str]:
    """What the user lets pass, also after the builder's own notes were removed."""
    noted = read_waivers(store)
    if noted is not None:
        return noted
    return dict(before.record["build_config"].get("waivers", {})) if before.record else {}


def changes(before: Standing, now: dict[str, Any], what_then: str) -> Iterator[str]:
    """How settings differ from those of the last build, and what that means."""
    if before.record is None:
        return
    last = before.record["build_config"]
    changed = [name for name in now if last.get(name) != now[name] and name not in {"waivers", "deidentification"}]
    if "pipeline_version" in changed:
        yield f"the last build was made by an older program: every volume {what_then}"
    elif changed:
        shown = ", ".join(f"{name} {json.dumps(last.get(name))} -> {json.dumps(now[name])}" for name in changed)
        yield f"settings differ from the last build ({shown}): what they touch {what_then}"


def losses(before: Standing, now: dict[str, Any], tasks: Iterable[Task]) -> list[str]:
    """What the store would lose that its owner may not mean to lose, and what to do."""
    if before.record is None:
        return []
    found = []
    last = before.record["build_config"]
    num_held, num_now = len(last.get("hold_out", [])), len(now["hold_out"])
    if num_now < num_held:
        found.append(
            f"the last build had {num_held} x --hold-out, this one has {num_now}; give them as before, or --replace to "
            "let their images in"
        )
    num_before = len(before.source_keys)
    # Under another key every input has another name: then nobody can tell.
    if last.get("pseudonym_key") == now["pseudonym_key"]:
        num_gone = num_before - sum(task.source_key in before.source_keys for task in tasks)
        if num_gone * 2 > num_before:
            found.append(
                f"{num_gone} of its {num_before} volumes come from files that are not in this source; a store holds "
                "what one source holds: give that one, build into another folder, or --replace to keep only these"
            )
    return found


def refuse_overlap(root: str, store: Path) -> None:
    if is_remote(root):
        return
    source, target = Path(root).resolve(), store.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise StoreError(
            f"{store}: store and source {root} lie in each other; choose a folder for the store outside of it"
        )


def refuse_foreign(store: Path) -> None:
    """A folder is written to only if it is new, empty, or a store."""
    if not store.exists():
        return
    if not store.is_dir():
        raise StoreError(f"{store}: is a file, expected a folder for the store; choose another path")
    is_store = (store / RECORD).is_file() and not _is_damaged(store)
    if not is_store and not is_begun(store) and any(store.iterdir()) and not _has_our_names(store):
        raise StoreError(f"{store}: exists and is no store; nothing was touched; choose another folder")


def _is_damaged(store: Path) -> bool:
    try:
        read_record(store)
    except DamagedError:
        return True
    return False


def _has_our_names(store: Path) -> bool:
    """Whether a folder with a damaged record, whose build/ was removed, still looks like a store."""
    return (store / RECORD).is_file() and (store / MANIFEST).is_file() and (store / VOLUMES).is_dir()
