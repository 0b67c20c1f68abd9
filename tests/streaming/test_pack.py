"""A pack gives the batches of its store, bit for bit, and no run takes a pack that is not its own."""

import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mim_scale.commit import sealed
from mim_scale.config import ForegroundConfig
from mim_scale.errors import ConfigError, DamagedError, StoreError
from mim_scale.sampling import plan as sampling
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming.pack import Pack, PackReader
from mim_scale.streaming.pack_verify import verify_pack
from mim_scale.streaming.pack_write import write_pack
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream import open_dataset, open_stream
from mim_scale.streaming.stream_threads import ThreadStream
from tests.streaming.packs import CONFIG, config_for, contents, flip
from tests.streaming.test_stream import StreamContract, assert_equal, schedule
from tests.synthetic import make_dataset, make_plan_config

PACK_MD = Path(__file__).parents[2] / "mim_scale" / "streaming" / "PACK.md"


@pytest.fixture(scope="module")
def reader(dataset):
    return SampleReader(dataset, dataset.rows, CONFIG, seed=4)


class PackContract(StreamContract):
    """As from the store: `reader` stays the one in line, the streams read the pack."""

    @pytest.fixture(autouse=True)
    def _packed(self, dataset, pack):
        self.reader = PackReader(Pack.open(pack), dataset, dataset.rows, config_for(dataset.path))

    def test_the_first_error_comes_at_its_index(self, dataset, pack, reader, tmp_path):
        copied = Pack.open(shutil.copytree(pack, tmp_path / "pack"))
        shard = copied.shard_of("train", 3)
        member = copied.index(shard).members_at(3)[1]
        flip(copied.path / f"{shard.name}.tar", member.offset + member.length // 2)
        self.reader = PackReader(copied, dataset, dataset.rows, config_for(dataset.path))
        with self.open(reader, workers=2, read_ahead=4) as stream:
            batches = stream.batches(schedule(8, micro_batch=1))
            for position in range(3):
                assert_equal(next(batches), reader.batch([position]))
            with pytest.raises(
                DamagedError, match=rf"{shard.name}\.tar: member train-000000000003\.block\.blosc: fails"
            ):
                next(batches)
            assert list(batches) == []


class TestPackByThreads(PackContract):
    def open(self, reader, workers=2, read_ahead=3):
        return ThreadStream(self.reader, workers, read_ahead)


@pytest.mark.ray
class TestPackByRay(PackContract):
    @pytest.fixture(autouse=True)
    def _cluster(self, cluster):
        pass

    def open(self, reader, workers=2, read_ahead=3):
        from mim_scale.streaming.stream_ray import RayStream

        return RayStream(self.reader, workers, read_ahead)


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_both_sides_are_those_of_the_store_from_any_position(dataset, split_pack, side):
    held_out = side == "held_out"
    rows = split_subjects(dataset.rows, 4, 1)[held_out]
    items = [[position] for position in (range(3) if held_out else [11, 5, 6, 12, 7])]
    config = config_for(dataset.path, 1, split_pack)
    expected = SampleReader(dataset, rows, CONFIG, 4, held_out)
    with open_stream(config, open_dataset(config.data), rows, held_out) as stream:
        for batch, positions in zip(stream.batches(items), items, strict=True):
            assert_equal(batch, expected.batch(positions))


def test_positions_outside_are_refused_with_what_is_held(dataset, split_pack):
    config = config_for(dataset.path, 1, split_pack)
    for position, held_out, words in (
        (4, False, r"split: position 4 is not in the pack, which holds 5 to 12; "),
        (13, False, r"position 13 is not in the pack"),
        (3, True, r"held-out position 3 is not in the pack, which holds 0 to 2; "),
    ):
        rows = split_subjects(dataset.rows, 4, 1)[held_out]
        with open_stream(config, dataset, rows, held_out) as stream, pytest.raises(StoreError, match=words):
            next(stream.batches([[position]]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 5}, "was made with seed 4, this run has 5"),
        (
            {"plan": make_plan_config(box=64, view=32)},
            r"was made with plan.box \[48, 48, 48\], this run has \[64, 64, 64\]",
        ),
        ({"plan": make_plan_config(views=(2, 2))}, "was made with plan.levels.1.views 3, this run has 2"),
        ({"held_out_subjects": 2}, "was made with held_out_subjects 1, this run has 2"),
    ],
)
def test_a_pack_of_another_run_is_refused(dataset, split_pack, changes, words):
    config = config_for(dataset.path, **{"held_out_subjects": 1, "pack": split_pack, **changes})
    with pytest.raises(StoreError, match=words):
        open_stream(config, dataset, dataset.rows)


def test_a_pack_knows_where_the_air_is(dataset, tmp_path):
    """Its manifest says so, as the store's does: plans are checked, and the run reads on, without a voxel."""
    foreground = ForegroundConfig(box_share=0.7, tries=5, hidden_share=0.9)
    config = config_for(dataset.path, 1, plan=CONFIG.model_copy(update={"foreground": foreground}))
    write_pack(config, tmp_path / "pack", 0, 4)
    assert verify_pack(tmp_path / "pack", deep=True) == []
    rows = split_subjects(dataset.rows, 4, 1)[0]
    packed = PackReader(Pack.open(tmp_path / "pack"), dataset, rows, config).batch(range(4))
    assert_equal(packed, SampleReader(dataset, rows, config.plan, 4).batch(range(4)))
    plain = SampleReader(dataset, rows, CONFIG, 4).batch(range(4))
    assert not np.array_equal(packed.levels[1].tokens, plain.levels[1].tokens)


def test_a_pack_of_another_version_says_what_to_do(copy):
    record = {name: value for name, value in Pack.open(copy).record.items() if name != "digest"}
    (copy / "pack.json").write_bytes(sealed(record | {"format_version": 1})[0])
    with pytest.raises(StoreError, match="format version 1, this program reads 2; pack again") as caught:
        Pack.open(copy)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)


def test_a_pack_of_another_store_is_refused(split_pack, tmp_path):
    other = make_dataset(tmp_path / "other", [(48, 48, 48)] * 2)
    config = config_for(other.path, 1, split_pack)
    held = Pack.open(split_pack).record["fingerprint"][:16]
    with pytest.raises(
        StoreError, match=f"is a pack of the dataset {held}, but data.store .* {other.fingerprint[:16]}"
    ):
        open_dataset(config.data)
    with pytest.raises(StoreError, match=f"was made with fingerprint {held}, this run has {other.fingerprint[:16]}"):
        open_stream(config, other, other.rows)


def test_a_program_that_samples_otherwise_is_refused(dataset, split_pack, monkeypatch):
    monkeypatch.setattr("mim_scale.streaming.reader.plan", lambda seed, *rest: sampling.plan(seed + 1, *rest))
    config = config_for(dataset.path, 1, split_pack)
    with pytest.raises(StoreError, match="samples position 5 in another way than the one that made the pack"):
        open_stream(config, dataset, split_subjects(dataset.rows, 4, 1)[0])
    assert any("is not the sample that this version would cut" in line for line in verify_pack(split_pack, deep=True))
    assert verify_pack(split_pack) == []


def test_what_stands_there_is_a_pack_or_refused(dataset, tmp_path):
    config = config_for(dataset.path)
    with pytest.raises(StoreError, match="no such pack"):
        Pack.open(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"has no commit record \(pack.json\)"):
        Pack.open(tmp_path / "full")
    (tmp_path / "full" / ".tmp-precious").write_text("not a packer's")
    with pytest.raises(StoreError, match=r"holds other things \(.tmp-precious\)"):
        write_pack(config, tmp_path / "full", 0, 2)
    (tmp_path / "full" / ".tmp-precious").unlink()
    with pytest.raises(StoreError, match=r"holds other things \(notes.txt\)"):
        write_pack(config, tmp_path / "full", 0, 2)
    write_pack(config, tmp_path / "pack", 0, 2)
    before = contents(tmp_path / "pack")
    with pytest.raises(StoreError, match="holds a pack with seed 4, not 5; name another folder"):
        write_pack(config.model_copy(update={"seed": 5}), tmp_path / "pack", 0, 2)
    with pytest.raises(StoreError, match="holds a pack with to 2, not 3"):
        write_pack(config, tmp_path / "pack", 0, 3)
    assert write_pack(config, tmp_path / "pack", 0, 2).num_written == 0
    assert contents(tmp_path / "pack") == before
    with pytest.raises(ConfigError, match="positions 2 to 2: nothing to pack"):
        write_pack(config, tmp_path / "pack", 2, 2)


def test_a_copy_of_the_reader_reads_the_same_pack_or_none(dataset, pack, tmp_path):
    folder = Path(shutil.copytree(pack, tmp_path / "pack"))
    reader = PackReader(Pack.open(folder), dataset, dataset.rows, config_for(dataset.path))
    sent = pickle.dumps(reader)
    assert_equal(pickle.loads(sent).batch([2, 9]), reader.batch([2, 9]))
    shutil.rmtree(folder)
    write_pack(config_for(dataset.path), folder, 0, 3)
    with pytest.raises(StoreError, match="holds another pack here than at the sender"):
        pickle.loads(sent)


def test_webdataset_reads_it_by_the_function_in_the_format(dataset, pack, reader):
    code = re.search(r"```python\n(.*?)```", PACK_MD.read_text(), re.DOTALL)
    documented = {}
    exec(code[1], documented)
    tars = sorted(str(path) for path in pack.glob("train-*.tar"))
    found = list(documented["samples"](tars))
    assert len(found) == 24
    for position, (plan, block) in enumerate(found):
        expected = reader.sample(position)
        np.testing.assert_array_equal(block, expected.block)
        assert (plan["position"], plan["volume"]) == (position, expected.key)
        assert plan["box"]["start"] == list(expected.plan.box.start)
        for level, twin in zip(plan["levels"], expected.plan.levels, strict=True):
            assert level.keys() == vars(twin).keys()
            for name, values in level.items():
                np.testing.assert_array_equal(values, getattr(twin, name))
    with tarfile.open(tars[0]) as tar:
        assert {(entry.mode, entry.mtime, entry.uid, entry.uname) for entry in tar} == {(0o644, 0, 0, "")}


def test_open_dataset_gives_what_the_run_needs_without_the_store(dataset, split_pack, tmp_path):
    config = config_for(tmp_path / "nowhere", 1, split_pack)
    held = open_dataset(config.data)
    assert (held.fingerprint, held.rows) == (dataset.fingerprint, dataset.rows)
    with pytest.raises(StoreError, match="no such store"):
        open_dataset(config.data.model_copy(update={"pack": None}))
