"""Building again over what went wrong: passing errors, damaged records, lost files, a full disk."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.plan import make_tasks
from data_pipeline.build.run import Outcome, Silent, run_build
from data_pipeline.commands.build import build
from data_pipeline.commands.plan import plan as plan_verb
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.sources.inventory import find_sources
from mim_scale.cli import run
from mim_scale.errors import SourceError, StoreError
from mim_scale.store.dataset import Dataset, volume_folder
from mim_scale.store.verify import verify
from tests.pipeline.sources import Series, config, phantom, write_image, write_series
from tests.pipeline.test_build import Inline
from tests.synthetic import change_record


def nobody_named(outcome: Outcome) -> str:
    """What every build of files without a patient says last."""
    count = len(outcome.rows)
    return (
        f"{count} volumes name no patient: each counts as its own subject; "
        "a subjects.csv in the source, or a list's column subject, says more"
    )


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.build.run.make_executor", lambda config: Inline())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for seed in range(2):
        write_image(tmp_path / "in" / f"{seed}.nii.gz", phantom(seed))
    return tmp_path / "in"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _build(source: Path, store: Path, **settings: Any) -> Outcome:
    return run_build(config(source, store, **settings), Silent())


def _failing(real: Any, name: str) -> Any:
    """An opener that meets a failing disk at one file."""

    def call(path: Any, *values: Any, **named: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *values, **named)

    return call


def test_an_error_of_the_system_is_tried_again_and_its_volume_kept(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _build(source, store)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", _failing(open, "1.nii.gz"))
        shutil.rmtree(store / "build")
        outcome = _build(source, store)
        assert build(config(source, store)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "whole without 1 input that could not be read this time: run the same build again" in told
    assert "complete" not in told
    assert [(row.reason, row.detail) for row in outcome.quarantine] == [
        ("io_error", "the file cannot be read (Input/output error); the next build tries it again")
    ]
    assert outcome.notes == (
        "1 volumes of the last build are left out until their sources can be read again",
        nobody_named(outcome),
    )
    assert all(volume_folder(store, row.key).is_dir() for row in first.rows)
    again = _build(source, store)
    assert again.fingerprint == first.fingerprint
    assert not again.quarantine


@pytest.mark.parametrize(
    ("name", "broken"),
    [("a.mha", "data_pipeline.sources.itk._header"), ("s", "data_pipeline.sources.dicom_read._look_at")],
    ids=["itk", "dicom"],
)
def test_errors_of_the_system_are_told_from_damage(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: str
) -> None:
    def fails(*values: Any, **named: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    root = tmp_path / "in"
    write_image(root / "good.nii", phantom(0))
    if name == "s":
        write_series(root / name, Series(phantom(1)))
    else:
        write_image(root / name, phantom(1))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fails)
        assert set(_build(root, store).reasons) == {"io_error"}
    assert len(_build(root, store).rows) == 2


def test_a_folder_that_nobody_vouches_for_is_written_again(source: Path, store: Path) -> None:
    first = _build(source, store)
    shard = next((volume_folder(store, first.rows[0].key) / "0" / "c").rglob("0"))
    shard = next(path for path in shard.parent.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    shutil.rmtree(store / "build")
    _build(source, store)
    assert verify(store, deep=True) == []


def test_equal_voxels_under_nearly_equal_affines_have_equal_bytes(tmp_path: Path, store: Path) -> None:
    write_image(tmp_path / "in" / "a.nrrd", phantom(), "PIR")
    write_image(tmp_path / "in" / "b.nii", phantom())
    _build(tmp_path / "in", store)
    assert verify(store, deep=True) == []


def test_a_lost_shard_is_seen_and_mended(source: Path, store: Path) -> None:
    first = _build(source, store)
    assert _build(source, store).was_complete
    next(path for path in volume_folder(store, first.rows[0].key).rglob("c/*/*/*") if path.is_file()).unlink()
    outcome = _build(source, store)
    assert not outcome.was_complete
    assert verify(store, deep=True) == []


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet", "quarantine.parquet"])
def test_a_damaged_record_is_written_anew(source: Path, store: Path, name: str) -> None:
    first = _build(source, store)
    whole = (store / name).read_bytes()
    (store / name).write_bytes(whole[: len(whole) // 2])
    assert [problem.key for problem in verify(store)] == [""]
    outcome = _build(source, store)
    assert outcome.notes == ("the record of the last build was damaged: it was written anew", nobody_named(outcome))
    assert outcome.fingerprint == first.fingerprint
    assert verify(store, deep=True) == []
    assert _build(source, store).was_complete


def test_a_damaged_record_does_not_give_the_store_to_another_source(source: Path, store: Path, tmp_path: Path) -> None:
    rows = _build(source, store).rows
    (store / "dataset.json").write_text("{")
    write_image(tmp_path / "other" / "a.nii", phantom(7))
    with pytest.raises(StoreError, match="none of them is in this source"):
        _build(tmp_path / "other", store)
    assert {path.name for path in (store / "volumes").iterdir()} == {f"{row.key}.zarr" for row in rows}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "dataset.json").write_text("{}")
    with pytest.raises(StoreError, match="is no store; nothing was touched"):
        _build(source, tmp_path / "foreign")


def test_a_store_of_an_older_pipeline_is_built_again(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.build import plan

    with monkeypatch.context() as patch:
        patch.setattr(plan, "PIPELINE_VERSION", plan.PIPELINE_VERSION - 1)
        first = _build(source, store)
    outcome = _build(source, store)
    assert outcome.notes == (
        "the last build was made by an older program: every volume was built again",
        nobody_named(outcome),
    )
    assert outcome.fingerprint == first.fingerprint
    assert _build(source, store).was_complete
    monkeypatch.setattr(plan, "PIPELINE_VERSION", plan.PIPELINE_VERSION - 1)
    with pytest.raises(StoreError, match="was built by a newer mim-scale"):
        _build(source, store)


def test_verify_says_what_mends_what(source: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = _build(source, store).rows[0]
    shutil.rmtree(volume_folder(store, row.key))
    assert run(["data", "verify", str(store)]) == 3
    shown = capsys.readouterr().out
    assert "--repair SOURCE" in shown
    assert " -1 " not in shown
    (store / "manifest.parquet").write_bytes(b"")
    assert run(["data", "verify", str(store)]) == 3
    shown = capsys.readouterr().out
    assert "--repair" not in shown
    assert "run the same `data build`" in shown


def test_volumes_whose_sources_are_gone_are_named(source: Path, store: Path) -> None:
    _build(source, store)
    (source / "1.nii.gz").unlink()
    outcome = _build(source, store)
    assert outcome.notes == ("1 volumes of the last build are no longer in the source: removed", nobody_named(outcome))
    assert len(list((store / "volumes").iterdir())) == 1


def test_a_folder_that_cannot_be_read_ends_the_build(
    source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(source / "shut" / "2.nii", phantom(2))
    first = _build(source, store)
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(SourceError, match=r"shut: cannot be read \(Permission denied\)"):
            _build(source, store)
    assert Dataset.open(store).fingerprint == first.fingerprint


@pytest.mark.parametrize("line", ["./0.nii.gz", "0.nii.gz", "sub\\2.nii", "/sub/", "."])
def test_paths_in_the_subjects_table_may_be_spelled_freely(source: Path, store: Path, line: str) -> None:
    write_image(source / "sub" / "2.nii", phantom(2))
    alone = {row.subject for row in _build(source, store).rows}
    (source / "subjects.csv").write_text(f"path,subject\n{line},Jane Roe\n")
    subjects = {row.subject for row in _build(source, store).rows}
    assert len(subjects - alone) == 1
    assert len(subjects) == (1 if line == "." else 3)


@pytest.mark.parametrize("line", ["0.nii", "sub/0.nii.gz", "../in/0.nii.gz", "O.nii.gz"])
def test_a_path_in_the_subjects_table_that_names_nothing_is_refused(source: Path, store: Path, line: str) -> None:
    (source / "subjects.csv").write_text(f"path,subject\n1.nii.gz,Jane Roe\n{line},Jane Roe\n")
    with pytest.raises(SourceError, match="line 3 names neither a file nor a folder"):
        _build(source, store)


def test_any_slice_of_a_series_may_name_its_subject(tmp_path: Path, store: Path) -> None:
    paths = write_series(tmp_path / "in" / "s", Series(phantom(1)))
    alone = _build(tmp_path / "in", store).rows[0].subject
    (tmp_path / "in" / "subjects.csv").write_text(f"path,subject\ns/{max(paths).name},Jane Roe\n")
    assert _build(tmp_path / "in", store).rows[0].subject != alone


def test_memory_is_asked_for_the_resampled_volume(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", phantom())
    write_image(tmp_path / "b.mha", phantom())
    write_series(tmp_path / "c", Series(phantom()))
    sources = find_sources(tmp_path).sources
    assert [source.voxel_mm3 for source in sources] == pytest.approx([0.8 * 0.9 * 2.5] * 3, rel=1e-4)
    plain, fine = (
        make_tasks(tmp_path, sources, config(tmp_path, tmp_path, spacing=spacing), PseudonymKey(b"key"))
        for spacing in (None, (0.1,) * 3)
    )
    for before, after in zip(plain, fine, strict=True):
        assert after.memory_bytes - before.memory_bytes == pytest.approx(phantom().size * 1801 * 8, rel=0.01)


def test_places_for_a_store_that_cannot_be_one(source: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        _build(source, tmp_path / "file" / "store")
    _build(source, store)
    shutil.rmtree(store / "volumes")
    (store / "volumes").touch()
    with pytest.raises(StoreError, match="volumes: cannot be made a folder"):
        _build(source, store)


def test_a_cache_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    from data_pipeline.commands.example_data import example_data

    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(SourceError, match="cannot be used"):
            example_data(cache)


_FILL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from pathlib import Path
from mim_scale.errors import exit_with
from mim_scale.store.array_store import write_volume
from tests.synthetic import make_volume
exit_with(lambda: write_volume(Path(sys.argv[1]), make_volume((64, 64, 64))))
"""


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _FILL, str(tmp_path / "k.zarr")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a volume cannot be written (File too large); make room there, build again" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_is_no_text_is_scanned_and_shown(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.nii", phantom())
    folder = os.fsencode(tmp_path) + b"/b\xe4d"
    os.rename(tmp_path / "in", folder)
    command = [sys.executable, "-c", "from mim_scale.cli import main; main()", "data", "scan", folder]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"b\xe4d STORE" in done.stdout


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, store = tmp_path / "in [bold] [/x]", tmp_path / "out [bold] [/x]"
    write_image(root / "a.nii", phantom())
    assert run(["data", "scan", str(root)]) == 0
    assert run(["data", "build", str(root), str(store), "--executor", "local", "--workers", "1"]) == 0
    change_record(store, files={})
    assert run(["data", "verify", str(store)]) == 3
    shown = capsys.readouterr().out
    assert shown.count("[bold] [/x]") >= 5


def _tree_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def test_a_source_without_most_of_the_volumes_is_refused_before_anything_is_touched(
    source: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (5, 6):
        write_image(source / f"more{seed}.nii.gz", phantom(seed))
    first = _build(source, store)
    before = _tree_of(store)
    kept = sorted(path for path in source.rglob("*") if path.is_file())[0]
    for path in source.rglob("*"):
        if path.is_file() and path != kept:
            path.unlink()
    with pytest.raises(StoreError, match=f"{len(first.rows) - 1} of its {len(first.rows)} volumes come from files"):
        _build(source, store)
    assert _tree_of(store) == before
    assert plan_verb(config(source, store)) == 0
    assert "beware: " in capsys.readouterr().out
    assert len(_build(source, store, replace=True).rows) == 1


def test_hold_outs_are_not_let_in_by_forgetting_them(
    source: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(next(source.rglob("1.nii.gz")), held / "test.nii.gz")
    first = _build(source, store, hold_out=(str(held),))
    assert "held_out" in first.reasons
    with pytest.raises(StoreError, match="the last build had 1 x --hold-out, this one has 0"):
        _build(source, store)
    assert plan_verb(config(source, store)) == 0
    assert "beware: the last build had 1 x --hold-out" in " ".join(capsys.readouterr().out.split())
    assert "held_out" not in _build(source, store, replace=True).reasons
