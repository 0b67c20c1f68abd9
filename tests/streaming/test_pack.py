"""A pack gives the batches of its store, bit for bit; it is whole or absent, and no byte of it changes unseen."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mim_scale.cli import run as cli
from mim_scale.config_file import dump_config
from mim_scale.errors import ConfigError, DamagedError, StoreError
from mim_scale.sampling import plan as sampling
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming.pack import Pack, PackReader
from mim_scale.streaming.pack_verify import verify_pack
from mim_scale.streaming.pack_write import write_pack
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream import open_dataset, open_stream
from mim_scale.streaming.stream_threads import ThreadStream
from tests.streaming.test_stream import CONFIG, StreamContract, assert_equal, schedule
from tests.synthetic import make_dataset, make_plan_config
from tests.training.standin import small_config

SHARD_BYTES = 300_000
"""A few samples of a 48 box."""
PACK_MD = Path(__file__).parents[2] / "mim_scale" / "streaming" / "PACK.md"


def config_for(store, held_out_subjects=0, pack=None, **changes):
    config = small_config(str(store))
    data = config.data.model_copy(
        update={"held_out_subjects": held_out_subjects, "pack": pack and str(pack), "workers": 2}
    )
    return config.model_copy(update={"data": data, "plan": CONFIG, "seed": 4, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pack(dataset, tmp_path_factory):
    """Positions 0 to 23, nothing held out: what the contract of streams reads."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    outcome = write_pack(config_for(dataset.path), folder, 0, 24, SHARD_BYTES)
    assert outcome.num_written > 3
    return folder


@pytest.fixture(scope="module")
def split_pack(dataset, tmp_path_factory):
    """Positions 5 to 12, one subject held out."""
    folder = tmp_path_factory.mktemp("packs") / "split"
    write_pack(config_for(dataset.path, 1), folder, 5, 13, SHARD_BYTES)
    return folder


@pytest.fixture
def copy(split_pack, tmp_path):
    return Path(shutil.copytree(split_pack, tmp_path / "copy"))


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


# --- equal bytes ---


def pack_command(dataset, folder, config_path, *more):
    config_path.write_text(dump_config(config_for(dataset.path, 1)))
    words = ["data", "pack", "--config", str(config_path), "data.read_ahead=1", "--from", "5", "--to", "13"]
    return [*words, "--shard-bytes", "300kB", str(folder), *more]


def test_equal_bytes_whatever_the_machine(dataset, split_pack, tmp_path):
    """Another umask, order of hashes, number of threads, time; by the command line."""
    words = pack_command(dataset, tmp_path / "pack", tmp_path / "c.yaml")
    words.insert(words.index("--from"), "data.workers=5")
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-m", "mim_scale.cli", *words]
    done = subprocess.run(
        command, env=environment, umask=0o077, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"positions 5 to 12 and 3 held-out samples, \d\.\d MB in (\d) shards, \1 of them written now", done.stdout
    )
    assert contents(tmp_path / "pack") == contents(split_pack)


KILLED = """
import os, signal, sys
from mim_scale.cli import run
from mim_scale.store.tar_store import ShardWriter
from mim_scale.streaming import pack_write

what, count = sys.argv[1], int(sys.argv[2])
owner = pack_write if hasattr(pack_write, what) else ShardWriter
real = getattr(owner, what)
def call(*values):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*values)
setattr(owner, what, call)
run(sys.argv[3:])
"""


def test_killed_anywhere_it_ends_in_the_same_bytes(dataset, split_pack, tmp_path):
    """kill -9: before the first byte, inside a shard, between a tar and its index, before the record."""
    folder = tmp_path / "pack"
    words = pack_command(dataset, folder, tmp_path / "c.yaml")
    for what, count in (("write_file", 0), ("add", 3), ("write_index", 1), ("add", 7), ("_commit", 0)):
        done = subprocess.run([sys.executable, "-c", KILLED, what, str(count), *words], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
        with pytest.raises(StoreError):
            Pack.open(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("train-*")}
    assert len(kept) >= 4
    assert write_pack(config_for(dataset.path, 1), folder, 5, 13, SHARD_BYTES).num_written == 0
    assert contents(folder) == contents(split_pack)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


FULL = """
import resource, sys
from mim_scale import cli
from mim_scale.errors import exit_with

resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
exit_with(lambda: cli.run(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(dataset, split_pack, tmp_path):
    folder = tmp_path / "pack"
    words = pack_command(dataset, folder, tmp_path / "c.yaml")
    done = subprocess.run(
        [sys.executable, "-c", FULL, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {folder}: File too large; finished shards are kept: make room and start the same again\n"
    )
    assert sorted(contents(folder)) == ["packing.json"]
    assert cli(words) == 0
    assert contents(folder) == contents(split_pack)


def test_two_packers_at_once_are_refused(dataset, tmp_path):
    from mim_scale.streaming.pack_write import _kept_alone

    with _kept_alone(tmp_path / "pack"), pytest.raises(StoreError, match="another `data pack` is writing in it"):
        write_pack(config_for(dataset.path), tmp_path / "pack", 0, 2)


# --- damage ---


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def regions(folder):
    """(region, file, offsets) of everything in a pack."""
    for name in ("pack.json", "manifest.parquet", "train-00000.json", "held_out-00000.json"):
        yield name, name, range((folder / name).stat().st_size)
    for name in ("train-00000", "train-00001", "held_out-00000"):
        index = json.loads((folder / f"{name}.json").read_text())
        for label, offset, length, _ in index["members"][:4]:
            yield f"header of {label}", f"{name}.tar", range(offset - 512, offset)
            yield label, f"{name}.tar", range(offset, offset + length)
            if length % 512:
                yield f"after {label}", f"{name}.tar", range(offset + length, offset + length + 512 - length % 512)
        yield f"end of {name}", f"{name}.tar", range(index["bytes"] - 1024, index["bytes"])


def test_one_flipped_bit_anywhere_is_found_and_named(copy):
    """Three bits of every region: first and last byte and one between."""
    chance = random.Random(10)
    flips = 0
    for region, name, offsets in list(regions(copy)):
        before = (copy / name).read_bytes()
        for offset in (offsets[0], offsets[-1], chance.choice(offsets)):
            flip(copy / name, offset, chance.randrange(8))
            problems = verify_pack(copy)
            assert problems, (region, offset)
            assert all(str(copy / name) in line for line in problems), (region, problems)
            if region.startswith(("train-0", "held_out-0")) and name.endswith(".tar"):
                assert [f"member {region}:" in line for line in problems] == [True]
                side, _, position = region.split(".")[0].rpartition("-")
                with pytest.raises(DamagedError, match=rf"{name}: member {region}: fails its checksum; run the same"):
                    Pack.open(copy).sample(side, int(position))
            (copy / name).write_bytes(before)
            flips += 1
    assert flips > 100
    assert verify_pack(copy, deep=True) == []


@pytest.mark.parametrize(
    ("name", "shorten", "words"),
    [
        ("train-00001.tar", True, "bytes, .* were committed"),
        ("train-00001.tar", False, "No such file"),
        ("train-00001.json", True, "is damaged"),
        ("train-00001.json", False, "No such file"),
        ("manifest.parquet", False, "is missing or damaged"),
    ],
)
def test_what_is_short_or_missing_is_named_and_mended_by_packing_again(
    dataset, split_pack, copy, name, shorten, words, capsys
):
    path = copy / name
    if shorten:
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    problems = verify_pack(copy)
    assert len(problems) == 1
    assert re.search(rf"{name}: .*{words}", problems[0])
    assert cli(["data", "verify", str(copy)]) == 3
    assert problems[0] in capsys.readouterr().out
    if name.endswith(".tar"):
        held = Pack.open(copy)
        last = next(shard.stop - 1 for shard in held.shards["train"] if shard.name == path.stem)
        with pytest.raises(
            DamagedError, match=rf"{name}: member train-{last:012d}\..*: (the file ends|cannot be read)"
        ):
            held.sample("train", last)
    write_pack(config_for(dataset.path, 1), copy, 5, 13, SHARD_BYTES)
    assert contents(copy) == contents(split_pack)


def test_a_damaged_record_costs_no_shard(dataset, split_pack, copy):
    flip(copy / "pack.json", 40)
    with pytest.raises(DamagedError, match=r"pack\.json: is damaged"):
        Pack.open(copy)
    assert write_pack(config_for(dataset.path, 1), copy, 5, 13, SHARD_BYTES).num_written == 0
    assert contents(copy) == contents(split_pack)


def test_a_shard_of_another_pack_is_not_taken_for_ones_own(dataset, split_pack, copy):
    """Same names, same positions, another seed: only the record or the note, both gone, would have told."""
    (copy / "pack.json").write_text("{}")
    other = config_for(dataset.path, 1, seed=5)
    outcome = write_pack(other, copy, 5, 13, SHARD_BYTES)
    assert outcome.num_written == sum(map(len, outcome.record["shards"].values()))
    assert verify_pack(copy, deep=True) == []


def test_verify_says_that_a_pack_is_whole(split_pack, capsys):
    for more, words in (([], "every byte"), (["--deep"], "every sample was decoded")):
        assert cli(["data", "verify", str(split_pack), *more]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard-bytes", "0"], "no size"),
        (["--shard-bytes", "7 furlongs"], "no size"),
        (["--config", "c.yaml", "oops"], "'oops' stands behind --config and is no key=value"),
        (["--config", "c.yaml", "data.sore=x"], "no such config file"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(ConfigError, match=message):
        cli(["data", "pack", "out", "--config", "c.yaml", "--to", "3", *words])


# --- training ---


def test_training_from_a_pack_is_training_from_its_store(tmp_path):
    """Three steps and their held-out losses through launch/pretrain.py, the store taken away: equal to the last bit."""
    from safetensors.torch import load_file

    from mim_scale.training.journal import read_journal
    from tests.training.jobs import PRETRAIN, python, write_config
    from tests.training.jobs import run as run_job

    dataset = make_dataset(tmp_path / "store")
    runs = {name: str(tmp_path / name) for name in ("from_store", "from_pack")}
    config = small_config(str(dataset.path), runs["from_store"], engine="plain", steps=3)
    path = write_config(config, tmp_path)
    write_pack(config, tmp_path / "pack", 0, 12)
    start = [*python(), PRETRAIN, "--config", str(path)]
    done = [run_job(start)]
    shutil.move(dataset.path, tmp_path / "elsewhere")
    done.append(run_job([*start, f"output={runs['from_pack']}", f"data.pack={tmp_path / 'pack'}"]))
    assert [job.returncode for job in done] == [0, 0], done[-1].stderr
    told = [
        [
            {name: value for name, value in row.items() if name not in ("time", "samples_per_second", "data_wait")}
            for row in read_journal(Path(run) / "journal.jsonl")
            if row["kind"] in ("step", "held_out")
        ]
        for run in runs.values()
    ]
    assert told[0] == told[1]
    assert [row["kind"] for row in told[0]].count("held_out") == 2
    weights = [load_file(Path(run) / "checkpoints" / "step_00000003" / "weights.safetensors") for run in runs.values()]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_goes_on_from_a_pack_of_its_later_positions(tmp_path):
    from mim_scale.training.loop import pretrain
    from mim_scale.training.stop import StopRequest

    dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 3)
    config = small_config(str(dataset.path), str(tmp_path / "run"), engine="plain", steps=3)
    asked = [False, True]
    stop = StopRequest()
    type(stop).is_set, original = property(lambda self: asked.pop(0) if asked else True), type(stop).is_set
    try:
        assert pretrain(config, stop) == 75
    finally:
        type(stop).is_set = original
    write_pack(config, tmp_path / "pack", 8, 12)
    data = config.data.model_copy(update={"pack": str(tmp_path / "pack")})
    assert pretrain(config.model_copy(update={"data": data})) == 0


def test_open_dataset_gives_what_the_run_needs_without_the_store(dataset, split_pack, tmp_path):
    config = config_for(tmp_path / "nowhere", 1, split_pack)
    held = open_dataset(config.data)
    assert (held.fingerprint, held.rows) == (dataset.fingerprint, dataset.rows)
    with pytest.raises(StoreError, match="no such store"):
        open_dataset(config.data.model_copy(update={"pack": None}))
    assert isinstance(held, Dataset)
