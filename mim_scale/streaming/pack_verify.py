"""Is every byte of a pack as it was committed, and is each sample the one that data, plan and seed say."""

from collections.abc import Callable, Sequence
from pathlib import Path

from mim_scale.config import PlanConfig
from mim_scale.errors import DamagedError
from mim_scale.store.manifest import split_subjects
from mim_scale.store.tar_store import MEND, check_shard
from mim_scale.streaming.pack import NOTE, RECORD, SIDES, Pack, ShardEntry, decode, same_plan
from mim_scale.streaming.reader import SampleReader


def is_pack(path: Path) -> bool:
    """Whether a folder holds a pack, be it damaged or not finished."""
    return any((path / name).is_file() for name in (RECORD, NOTE))


def verify_pack(path: Path, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a pack, a line each; an empty list is a clean bill.

    Args:
        deep: Decode every sample and compare its plan with a fresh one, and check the SHA-256 of each shard; otherwise
            compare every byte with records and checksums.
        progress: Called with (shards done, shards in all).

    Raises:
        StoreError: there is no pack to verify at that path.
    """
    try:
        pack = Pack.open(path)
        # The manifest, too, is held against the record.
        _ = pack.dataset
    except DamagedError as error:
        return [str(error)]
    planners = _planners(pack) if deep else {}
    problems: list[str] = []
    shards = [(side, shard) for side in SIDES for shard in pack.shards[side]]
    for done, (side, shard) in enumerate(shards, start=1):
        problems += _check(pack, shard, planners.get(side))
        if progress is not None:
            progress(done, len(shards))
    return problems


def _planners(pack: Pack) -> dict[str, SampleReader]:
    record, plan = pack.record, PlanConfig.model_validate(pack.record["plan"])
    sides = split_subjects(pack.dataset.rows, record["seed"], record["held_out_subjects"])
    return {
        side: SampleReader(pack.dataset, rows, plan, record["seed"], side == "held_out")
        for side, rows in zip(SIDES, sides, strict=True)
        if rows
    }


def _check(pack: Pack, shard: ShardEntry, planner: SampleReader | None) -> list[str]:
    try:
        index = pack.index(shard)
    except DamagedError as error:
        return [str(error)]
    problems: list[str] = []

    def compare(position: int, members: Sequence[bytes]) -> None:
        if planner is None:
            return
        where = f"{pack.path / shard.name}.tar: position {position}"
        try:
            sample = decode(*members)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            problems.append(f"{where}: cannot be decoded ({error}); {MEND}")
            return
        row, plan = planner.planned(position)
        if sample.key != row.key or not same_plan(sample.plan, plan):
            problems.append(f"{where}: is not the sample that this version would cut; pack again into a new folder")

    return [*check_shard(pack.path, shard.name, index, planner is not None, compare), *problems]
