"""Checkpoints without a run: round trips in every layout, retention, damage of every kind (tests/faults: crashes)."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mim_scale import commit, disk
from mim_scale.errors import CheckpointError, DamagedCheckpointError, OtherVersionError
from mim_scale.training import checkpoint
from mim_scale.training.checkpoint import RECORD, CheckpointFolder, Piece, check_fits, read_checkpoint
from mim_scale.training.checkpoint_write import Share, write_share
from tests.training.checkpoints import FACTS, assert_is, refuse_to_tell, save, state, whole

WEIGHTS, MOMENTS = "weights.safetensors", "moments.safetensors"
FORMAT_1, FORMAT_2 = (Path(__file__).parent / f"checkpoint_format_{version}" for version in (1, 2))


def names(folder: CheckpointFolder) -> list[str]:
    return [path.name for path in folder.folders()]


def seal_again(path: Path, **changes: object) -> None:
    """Change a record as a program of ours would write it."""
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_bytes(commit.sealed(record | changes)[0])


def test_a_whole_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    save(folder, 2, 4)
    seal_again(folder.path / "step_00000004" / RECORD, format_version=4)
    with pytest.raises(OtherVersionError, match="format version 4, this program reads 1, 2, 3"):
        folder.newest(refuse_to_tell)


def test_version_1_is_read() -> None:
    found = CheckpointFolder(FORMAT_1, keep=2).newest(refuse_to_tell)
    assert found is not None
    assert (found.step, found.record["format_version"], found.record["world"]) == (3, 1, 1)
    weights, moments = found.load()
    assert torch.equal(weights["layer.weight"], torch.arange(15.0).reshape(3, 5))
    assert torch.equal(weights["layer.bias"], torch.tensor([0.5, -1.0, 2.0]))
    assert set(moments) == {f"{name}/{moment}" for name in weights for moment in ("exp_avg", "exp_avg_sq")}
    assert torch.equal(moments["layer.bias/exp_avg"], weights["layer.bias"] * 0.1)


def test_version_2_is_read() -> None:
    found = CheckpointFolder(FORMAT_2, keep=2).newest(refuse_to_tell)
    assert_is(found, 3)
    assert found is not None
    assert (found.record["format_version"], len(found.files)) == (2, 4)


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, RECORD])
def test_damage_to_version_1_is_found(tmp_path: Path, name: str) -> None:
    shutil.copytree(FORMAT_1, tmp_path / "checkpoints")
    flip(tmp_path / "checkpoints" / "step_00000003" / name, 0.4)
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        CheckpointFolder(tmp_path / "checkpoints", keep=2).newest(lambda _: None)


def test_round_trip_and_retention(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.newest(refuse_to_tell) is None
    save(folder, 2, 4, 6, 100_000_000)
    assert names(folder) == ["step_100000000", "step_00000006"]
    assert sorted(path.name for path in (folder.path / "step_00000006").iterdir()) == [MOMENTS, RECORD, WEIGHTS]
    assert_is(folder.newest(refuse_to_tell), 100_000_000)
    record = json.loads((folder.path / "step_00000006" / RECORD).read_text())
    assert record["format_version"] == 3
    assert record["position"] == 8
    assert record["versions"]["torch"]
    with safe_open(folder.path / "step_00000006" / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(state(6)[0])


@pytest.mark.parametrize("count", [2, 3, 9])
def test_written_by_several_ranks(tmp_path: Path, count: int) -> None:
    """Also by more of them than there are tensors."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    save(folder, 1, 2, count=count)
    assert_is(folder.newest(refuse_to_tell), 2)
    files = sorted(path.name for path in (folder.path / "step_00000002").iterdir())
    parts = [f"-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert files == sorted([*(kind + part for kind in ("weights", "moments") for part in parts), RECORD])


def in_pieces(cuts: list[int], count: int) -> list[list[Piece]]:
    """The state of step 3 for `count` writers: each tensor cut at these places, pieces dealt out in turns."""
    dealt: list[list[Piece]] = [[] for _ in range(count)]
    for kind, tensors in zip(("weights", "moments"), state(3), strict=True):
        for name, tensor in tensors.items():
            places = sorted({0, tensor.numel(), *(min(place, tensor.numel()) for place in cuts[: count - 1])})
            if tensor.numel() == 0:
                dealt[0].append(whole(kind, name, tensor))
            for number, (start, end) in enumerate(pairwise(places)):
                numbers = tensor.flatten()[start:end]
                dealt[(len(name) + number) % count].append(Piece(kind, name, tuple(tensor.shape), start, numbers))
    return dealt


def write(folder: CheckpointFolder, dealt: list[list[Piece]]) -> None:
    for number, pieces in reversed(list(enumerate(dealt))):
        write_share(folder, Share(3, "token", number, len(dealt), pieces, FACTS), Event())


@given(cuts=st.lists(st.integers(0, 16), min_size=4, max_size=4), count=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_pieces_make_the_whole_wherever_they_are_cut(cuts: list[int], count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = CheckpointFolder(Path(name) / "checkpoints", keep=2)
        write(folder, in_pieces(cuts, count))
        assert_is(folder.newest(refuse_to_tell), 3)


@pytest.mark.parametrize("fault", ["missing", "twice", "overlapping", "another shape"])
def test_pieces_that_make_no_whole_are_refused(tmp_path: Path, fault: str) -> None:
    first, second = in_pieces([7], 2)
    piece = next(piece for piece in second if piece.name == "layer.weight")
    others = [one for one in second if one is not piece]
    if fault == "overlapping":
        others.append(replace(piece, start=piece.start + (1 if piece.start == 0 else -1)))
    elif fault == "another shape":
        others.append(replace(piece, shape=(5, 3)))
    elif fault == "twice":
        first, others = [one for one in first if one.name != "layer.weight"] + [piece], [*others, piece]
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    write(folder, [first, others])
    found = folder.newest(refuse_to_tell)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"its pieces of layer.weight do not make a whole"):
        found.load()


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * share), len(data) - 1)] ^= 1 << int(share * 100) % 8
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" ")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(path: Path) -> None:
    """With the same file of the checkpoint before."""
    commit.disk.exchange(path, path.parent.with_name("step_00000002") / path.name)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def put(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


ANY_FILE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: cut(path, 0),
    **{f"cut at {share:.0%}": lambda path, share=share: cut(path, share) for share in (0.01, 0.3, 0.6, 0.99)},
    **{f"bit at {share:.0%}": lambda path, share=share: flip(path, share) for share in (0, 0.02, 0.2, 0.5, 0.8, 1)},
    "longer": lengthen,
    "a folder": make_folder,
    "swapped": swap,
    "a link to nowhere": dangle,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
RECORD_ONLY: dict[str, Callable[[Path], object]] = {
    "{}": put(b"{}"),
    "[1]": put(b"[1]"),
    "no text": put(b"\xff"),
    "brackets": put(b"[" * 100_000),
    "null": put(b"null"),
    "other spaces": lambda path: path.write_bytes(path.read_bytes().replace(b" ", b"  ")),
    "a step more": lambda path: path.write_bytes(path.read_bytes().replace(b'"step": 3', b'"step": 4')),
    "a version more": lambda path: path.write_bytes(path.read_bytes().replace(b'version": 3', b'version": 4')),
}


DAMAGES = [
    *[(name, file, damage) for name, damage in ANY_FILE.items() for file in (WEIGHTS, MOMENTS, RECORD)],
    *[(name, RECORD, damage) for name, damage in RECORD_ONLY.items()],
    ("the folder is empty", RECORD, lambda path: [entry.unlink() for entry in path.parent.iterdir()]),
    ("the folder is a file", RECORD, lambda path: (shutil.rmtree(path.parent), path.parent.write_bytes(b""))),
    ("the folder is a link to nowhere", RECORD, lambda path: (shutil.rmtree(path.parent), dangle_folder(path.parent))),
    ("another step's, whole", RECORD, lambda path: copy_other(path.parent)),
]


def dangle_folder(path: Path) -> None:
    path.symlink_to("nowhere")


def copy_other(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step_00000001"), path)


@pytest.mark.parametrize(("name", "file", "damage"), DAMAGES, ids=[f"{file}: {name}" for name, file, _ in DAMAGES])
def test_damaged_one_is_named_and_skipped(
    tmp_path: Path, name: str, file: str, damage: Callable[[Path], object]
) -> None:
    save(CheckpointFolder(tmp_path, keep=4), 1, 2, 3)
    damage(tmp_path / "step_00000003" / file)
    told: list[str] = []
    folder = CheckpointFolder(tmp_path, keep=2)
    # What is swapped with the one before damages both.
    expected = 1 if name == "swapped" else 2
    assert_is(folder.newest(told.append), expected)
    assert len(told) == 3 - expected
    assert all("\n" not in line and "checkpoint skipped: " in line for line in told)
    assert "step_00000003" in told[0]
    # The damaged one does not count as kept: two good ones remain, and the next save takes its name.
    save(folder, 3)
    assert_is(folder.newest(refuse_to_tell), 3)
    assert [path.name for path in folder.folders() if path.name != "step_00000002"] == ["step_00000003"] + [
        "step_00000001"
    ] * (name == "swapped")


@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS, RECORD])
@pytest.mark.parametrize("operation", ["read", "digest"])
def test_one_that_may_not_be_read_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, operation: str
) -> None:
    """Permissions bind everybody but the superuser, as whom tests may run: the refusal is put in."""
    save(CheckpointFolder(tmp_path, keep=3), 1, 2, 3)
    real = getattr(disk, operation)

    def refusing(path: Path) -> object:
        if path == tmp_path / "step_00000003" / file:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(disk, operation, refusing)
    told: list[str] = []
    is_read = (file == RECORD) == (operation == "read")
    assert_is(CheckpointFolder(tmp_path, keep=3).newest(told.append), 2 if is_read else 3)
    assert [f"{file} is unreadable (Permission denied)" in line for line in told] == [True] * is_read


@pytest.mark.parametrize("damage", ANY_FILE.values(), ids=list(ANY_FILE))
def test_damage_to_a_share_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    folder = CheckpointFolder(tmp_path, keep=4)
    save(folder, 1, 2, 3, count=2)
    damage(tmp_path / "step_00000003" / "moments-00001-of-00002.safetensors")
    told: list[str] = []
    found = folder.newest(told.append)
    assert found is not None
    assert "moments-00001-of-00002.safetensors" in told[0]
    assert_is(found, found.step)


def test_damaged_ones_do_not_push_good_ones_out(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1, 2)
    flip(tmp_path / "step_00000002" / WEIGHTS, 0.5)
    again = CheckpointFolder(tmp_path, keep=2)
    save(again, 5)
    assert names(again) == ["step_00000005", "step_00000002", "step_00000001"]


def test_all_damaged_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 1, 2)
    for name in names(folder):
        cut(tmp_path / name / MOMENTS, 0.5)
    with pytest.raises(DamagedCheckpointError, match="none of 2 checkpoints is whole"):
        CheckpointFolder(tmp_path, keep=2).newest(lambda text: None)


def test_other_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    save(CheckpointFolder(tmp_path, keep=2), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 99, this program reads 1, 2, 3"):
        read_checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"layer.weight": (3, 5), "scale": (), "none": (0, 4)}, "the model has no layer.bias"),
        ({"layer.weight": (3, 4), "layer.bias": (3,)}, r"layer.weight is \[3, 5\], the model's is \[3, 4\]"),
        ({"layer.weight": (3, 5), "layer.bias": (3,), "head": (1,)}, "has no tensor head"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    save(CheckpointFolder(tmp_path, keep=2), 1)
    with pytest.raises(CheckpointError, match=words):
        check_fits(read_checkpoint(tmp_path / "step_00000001"), state(1)[0], shapes)
