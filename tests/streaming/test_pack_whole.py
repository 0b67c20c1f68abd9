"""A pack is whole or absent, of equal bytes wherever it was interrupted, and no byte of it changes unseen."""

import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest

from mim_scale.cli import run as cli
from mim_scale.errors import ConfigError, DamagedError, StoreError
from mim_scale.streaming.pack import Pack
from mim_scale.streaming.pack_verify import verify_pack
from mim_scale.streaming.pack_write import write_pack
from tests.streaming.packs import SHARD_BYTES, config_for, contents, flip, pack_command


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
        with pytest.raises(StoreError, match=r"no such pack|has no commit record"):
            Pack.open(folder)
        with pytest.raises(StoreError, match=r"dataset.json|its making was interrupted"):
            cli(["data", "verify", str(folder)])
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
