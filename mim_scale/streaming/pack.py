"""A pack: one run's samples, cut out once and kept as tars, and the reader that gives the same batches as the store.

PACK.md fixes the format. The record, pack.json, is written last; it says of which data, plan, seed and positions.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from mim_scale.commit import sha256_file, sha256_values
from mim_scale.config import PretrainConfig
from mim_scale.config_file import config_values
from mim_scale.errors import DamagedError, StoreError
from mim_scale.sampling.plan import LevelPlan, Plan
from mim_scale.store.dataset import Dataset, fingerprint
from mim_scale.store.geometry import Box, size3
from mim_scale.store.manifest import Row, read_rows
from mim_scale.store.tar_store import MEND, ShardIndex, read_index, read_member, read_sealed
from mim_scale.streaming.batch import Batch, Sample, collate
from mim_scale.streaming.reader import SampleReader

FORMAT = "mim-scale pack"
FORMAT_VERSION = 2
"""Version of PACK.md; a pack of another version is refused."""

RECORD = "pack.json"
NOTE = "packing.json"
"""What an unfinished pack is to become; in its place stands the record once it is finished."""
MANIFEST = "manifest.parquet"
SIDES = ("train", "held_out")
MEMBERS = ("plan.json", "block.blosc")
"""Of every sample, in the order in which they lie in the tar."""

_OPEN_INDICES = 8
_LEVEL = ("starts", "parent", "cell", "visible", "hidden", "draws")

# One thread a call: bytes must not depend on the number of cores, and streams have workers of their own.
numcodecs.blosc.use_threads = False
_CODEC = numcodecs.blosc.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.blosc.BITSHUFFLE)


def encode(sample: Sample) -> tuple[bytes, bytes]:
    """A sample as the bytes of its MEMBERS."""
    levels = [{name: getattr(level, name).tolist() for name in _LEVEL} for level in sample.plan.levels]
    values = {
        "position": sample.position,
        "volume": sample.key,
        "box": {"start": list(sample.plan.box.start), "size": list(sample.plan.box.size)},
        "levels": levels,
    }
    plan = json.dumps(values, separators=(",", ":")).encode()
    return plan, bytes(_CODEC.encode(np.ascontiguousarray(sample.block, dtype="<i2")))


def _level(values: dict[str, Any]) -> LevelPlan:
    return LevelPlan(**{name: np.array(values[name], dtype=np.int32) for name in _LEVEL})


def decode(plan: bytes, block: bytes) -> Sample:
    """The sample that was encoded.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: the bytes were not made by `encode`.
    """
    values = json.loads(plan)
    box = Box(size3(values["box"]["start"]), size3(values["box"]["size"]))
    levels = tuple(_level(level) for level in values["levels"])
    voxels: NDArray[np.int16] = np.empty(box.size, dtype=np.int16)
    _CODEC.decode(block, out=voxels)
    return Sample(values["position"], values["volume"], voxels, Plan(values["position"], box, levels))


def member_name(side: str, position: int, member: str) -> str:
    """As it stands in the tar: webdataset takes all up to the first dot for the sample's key."""
    return f"{side}-{position:012d}.{member}"


def job_of(config: PretrainConfig, dataset_fingerprint: str) -> dict[str, Any]:
    """Everything that decides which samples a run meets, as JSON values."""
    plan = config_values(config.plan)
    return {
        "fingerprint": dataset_fingerprint,
        "seed": config.seed,
        "held_out_subjects": config.data.held_out_subjects,
        "plan": plan,
        "plan_digest": sha256_values(plan),
    }


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the record names it."""

    name: str
    first: int
    stop: int
    bytes: int
    sha256: str
    """Of the tar."""
    index_digest: str


def read_record(path: Path) -> dict[str, Any]:
    """The values of a pack's record, or of the note that stands for it until the pack is whole.

    Raises:
        StoreError: another format version.
        DamagedError: the file is not as it was written.
    """
    values = read_sealed(path)
    if values.get("format") != FORMAT:
        raise DamagedError(f"{path}: is no record of a pack; name another folder")
    if values["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {values['format_version']}, this program reads {FORMAT_VERSION}; pack again"
        )
    return values


class Pack:
    """A committed pack, open for reading. Pickles by its path and digest."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.shards = {side: tuple(ShardEntry(**entry) for entry in record["shards"][side]) for side in SIDES}
        self._lock = threading.Lock()
        self._indices: OrderedDict[str, ShardIndex] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> "Pack":
        """Open a pack.

        Raises:
            StoreError: no pack is there, it was not finished, or it is of another format version.
            DamagedError: its record is damaged.
        """
        path = Path(path)
        if not path.is_dir():
            raise StoreError(f"{path}: no such pack; make one with `mim-scale data pack`")
        if not (path / RECORD).is_file():
            raise StoreError(
                f"{path}: has no commit record ({RECORD}): no pack, or its making was interrupted; "
                "run the same `mim-scale data pack` again"
            )
        return cls(path, read_record(path / RECORD))

    @cached_property
    def dataset(self) -> Dataset:
        """The dataset that was packed: rows and fingerprint; its voxels are not here.

        Raises:
            DamagedError: the manifest is not the one that was committed.
        """
        manifest = self.path / MANIFEST
        if not manifest.is_file() or sha256_file(manifest) != self.record["files"][MANIFEST]:
            raise DamagedError(f"{manifest}: is missing or damaged; {MEND}")
        rows = read_rows(manifest)
        if fingerprint(rows) != self.record["fingerprint"]:
            raise DamagedError(f"{manifest}: contradicts {RECORD}; {MEND}")
        return Dataset(self.path, {"fingerprint": self.record["fingerprint"]}, rows)

    def range(self, side: str) -> range:
        """The positions of a side that the pack holds."""
        shards = self.shards[side]
        return range(shards[0].first, shards[-1].stop) if shards else range(0)

    def shard_of(self, side: str, position: int) -> ShardEntry:
        """The shard that holds a position.

        Raises:
            StoreError: none does.
        """
        held = self.range(side)
        if position not in held:
            what = f"{'held-out ' if side == 'held_out' else ''}position"
            raise StoreError(
                f"{self.path}: {what} {position} is not in the pack, which holds {held.start} to {held.stop - 1}; "
                "give a pack that has it as data.pack, or null to read from the store"
            )
        low, high = 0, len(self.shards[side])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.shards[side][middle].first <= position else (low, middle)
        return self.shards[side][low]

    def refuse_other_run(self, config: PretrainConfig, dataset_fingerprint: str) -> None:
        """Raise StoreError where the pack was made for other data, another plan, seed or split."""
        if found := difference(job_of(config, dataset_fingerprint), self.record):
            name, wanted, held = found
            raise StoreError(
                f"{self.path}: was made with {name} {held}, this run has {wanted}; pack again, or change that"
            )

    def index(self, shard: ShardEntry) -> ShardIndex:
        """A shard's index; the most recent ones stay in memory.

        Raises:
            DamagedError: it is not the one that was committed.
        """
        with self._lock:
            index = self._indices.pop(shard.name, None)
            if index is None:
                index = read_index(self.path, shard.name, shard.index_digest)
            self._indices[shard.name] = index
            if len(self._indices) > _OPEN_INDICES:
                self._indices.popitem(last=False)
            return index

    def sample(self, side: str, position: int) -> Sample:
        """The sample at a position.

        Raises:
            StoreError: the pack does not hold it.
            DamagedError: its bytes are missing or fail their checksum; names file and member.
        """
        shard = self.shard_of(side, position)
        members = self.index(shard).members_at(position)
        plan, block = (read_member(self.path, shard.name, member) for member in members)
        try:
            return decode(plan, block)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(f"{self.path}: {members[0].name}: cannot be decoded ({error}); pack again") from None

    def __reduce__(self) -> tuple[Callable[[str, str], "Pack"], tuple[str, str]]:
        return _open_same, (str(self.path.resolve()), self.record["digest"])


def _open_same(path: str, expected: str) -> Pack:
    pack = Pack.open(path)
    if pack.record["digest"] != expected:
        raise StoreError(f"{path}: holds another pack here than at the sender; give all machines the same pack")
    return pack


def refuse_missing(pack: Pack, positions: range, num_held_out: int) -> None:
    """Raise StoreError where the pack lacks training positions of a run, or held-out ones from 0 on."""
    held = pack.range("train")
    if positions and not (held.start <= positions.start and positions.stop <= held.stop):
        raise StoreError(
            f"{pack.path}: holds positions {held.start} to {held.stop - 1}, the run asks for {positions.start} to "
            f"{positions.stop - 1}; make one that has them with `mim-scale data pack OUT --config CONFIG --from "
            f"{positions.start} --to {positions.stop}`, or lower train.steps"
        )
    if (count := len(pack.range("held_out"))) < num_held_out:
        raise StoreError(
            f"{pack.path}: holds {count} held-out samples, the run asks for {num_held_out}; pack again into a new "
            "folder, or lower held_out.samples"
        )


class PackReader:
    """Samples of a pack by position: the same bits as SampleReader's, of the same config.

    Args:
        pack: Where samples come from.
        dataset: What the run samples from; none of its voxels is read.
        rows: The volumes of the side that is read, as for SampleReader.
        config: The run's; the pack must be made for it.
        held_out: Which side.

    Raises:
        ConfigError: rows is empty.
        StoreError: the pack was made for other data, another plan, seed or split, or by another way of sampling.
    """

    def __init__(
        self, pack: Pack, dataset: Dataset, rows: Sequence[Row], config: PretrainConfig, held_out: bool = False
    ) -> None:
        pack.refuse_other_run(config, dataset.fingerprint)
        self._pack = pack
        self._side = SIDES[held_out]
        planner = SampleReader(dataset, rows, config.plan, config.seed, held_out)
        if held := pack.range(self._side):
            self._refuse_other_sampling(planner, held.start)

    def sample(self, position: int) -> Sample:
        """The sample at a position; raises as Pack.sample."""
        return self._pack.sample(self._side, position)

    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples at these positions, stacked in their order."""
        return collate([self.sample(position) for position in positions])

    def _refuse_other_sampling(self, planner: SampleReader, position: int) -> None:
        # The first sample stands for all: a program that samples in another way would hardly cut the same one.
        row, plan = planner.planned(position)
        sample = self.sample(position)
        if sample.key != row.key or not same_plan(sample.plan, plan):
            raise StoreError(
                f"{self._pack.path}: this version samples position {position} in another way than the one that made "
                "the pack; pack again"
            )


def difference(wanted: Any, held: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first of the wanted values that is held otherwise, as (name, wanted, held); more may be held."""
    if isinstance(wanted, list) and isinstance(held, list) and len(wanted) == len(held) and name.endswith("levels"):
        wanted, held = (dict(enumerate(values)) for values in (wanted, held))
    if not isinstance(wanted, dict) or not isinstance(held, dict):
        return None if wanted == held else (name, _short(wanted), _short(held))
    inner = (difference(value, held.get(key), f"{name}.{key}".lstrip(".")) for key, value in wanted.items())
    return next((found for found in inner if found), None)


def same_plan(plan: Plan, other: Plan) -> bool:
    """Whether two plans are equal in every integer."""
    return ((plan.position, plan.box, len(plan.levels)) == (other.position, other.box, len(other.levels))) and all(
        np.array_equal(getattr(level, name), getattr(twin, name))
        for level, twin in zip(plan.levels, other.levels, strict=True)
        for name in _LEVEL
    )


def _short(value: Any) -> Any:
    return value[:16] if isinstance(value, str) else value
