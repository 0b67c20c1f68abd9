"""Saves in the background: what they keep and wait for, and how they end when the disk or the run does not go on."""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mim_scale import disk
from mim_scale.config import PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import CheckpointError, ConfigError
from mim_scale.training.checkpoint import read_checkpoint
from mim_scale.training.engine import Engine, build_engine
from mim_scale.training.journal import read_journal
from mim_scale.training.progress import Progress
from mim_scale.training.ranks import Ranks
from mim_scale.training.records import Records
from mim_scale.training.saving import Saver
from tests.synthetic import make_dataset
from tests.training.checkpoints import refuse_to_tell, state_of
from tests.training.jobs import PRETRAIN, errors_of, python, run, torchrun, write_config
from tests.training.standin import StandIn, small_config, standin_batch, whole_state

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return small_config(output=str(tmp_path / "run"), engine="plain", batch=2, micro_batch=2)


@pytest.fixture
def engine(config: PretrainConfig) -> Engine:
    torch.manual_seed(5)
    return build_engine(StandIn(), config, ALONE)


@pytest.fixture
def records(config: PretrainConfig) -> Iterator[Records]:
    with Records(config, "f" * 64, [(1.0, 1.0, 1.0)] * 2, 1, is_kept_here=True) as records:
        records.take_up()
        yield records


def saver_of(engine: Engine, records: Records, background: bool = True) -> Saver:
    return Saver(engine, ALONE, records, Progress(0, 1, 1, is_shown=False), (0,), background)


def advance(engine: Engine) -> None:
    engine.set_rates(0.1)
    engine.forward_backward(standin_batch(range(2)), last=True)
    engine.update()


class Gate:
    """Holds every fsync up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        real = disk.fsync

        def held_up(file: object) -> None:
            self.reached.set()
            assert self._open.wait(60)
            real(file)  # type: ignore[arg-type]

        monkeypatch.setattr(disk, "fsync", held_up)

    def open(self) -> None:
        self._open.set()


def assert_published(records: Records, step: int, expected: tuple[dict[str, torch.Tensor], ...]) -> None:
    for found, wanted in zip(
        read_checkpoint(records.checkpoints.path / f"step_{step:08d}").load(), expected, strict=True
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def leftovers(records: Records) -> list[str]:
    return [path.name for path in records.checkpoints.path.iterdir() if not path.name.startswith("step_")]


def test_the_run_goes_on_and_what_is_written_is_the_state_of_then(
    engine: Engine, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance(engine)
    then = whole_state(engine)
    gate = Gate(monkeypatch)
    with saver_of(engine, records) as saver:
        saver.save(1, 1)
        assert gate.reached.wait(60)
        advance(engine)
        assert not saver.look()
        assert records.checkpoints.newest(refuse_to_tell) is None
        gate.open()
        saver.finish()
    assert_published(records, 1, then)
    assert not all(torch.equal(then[0][name], value) for name, value in whole_state(engine)[0].items())
    rows = [row for row in read_journal(records.checkpoints.path.parent / "journal.jsonl") if row["kind"] == "save"]
    assert [row["step"] for row in rows] == [1]
    assert rows[0]["stall_s"] < rows[0]["write_s"]


def test_at_most_one_is_under_way_and_its_memory_is_kept(
    engine: Engine, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with saver_of(engine, records) as saver:
        saver.save(1, 1)
        places = {key: piece.numbers.data_ptr() for key, piece in saver._buffers.items()}
        assert gate.reached.wait(60)
        advance(engine)
        now = whole_state(engine)
        second = threading.Thread(target=saver.save, args=(2, 2))
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it did not wait for the first one"
        gate.open()
        second.join(60)
        saver.finish()
        assert {key: piece.numbers.data_ptr() for key, piece in saver._buffers.items()} == places
    assert [path.name for path in records.checkpoints.folders()] == ["step_00000002", "step_00000001"]
    assert_published(records, 2, now)


def test_a_full_disk_is_told_at_the_next_step(
    engine: Engine, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    with saver_of(engine, records) as saver:
        saver.save(1, 1)
        saver.finish()
        with monkeypatch.context() as patch:
            patch.setattr(disk, "fsync", refuse)
            saver.save(2, 2)
            with pytest.raises(
                CheckpointError, match="the checkpoint of step 2 was not saved: No space left"
            ) as caught:
                saver.finish()
        assert "\n" not in str(caught.value)
        assert saver.look(), "nothing is under way any more"
    found = records.checkpoints.newest(refuse_to_tell)
    assert found is not None
    assert found.step == 1
    assert leftovers(records) == []


def refuse(file: object) -> None:
    raise OSError(28, os.strerror(28))


def test_in_the_foreground_it_is_there_when_save_returns(engine: Engine, records: Records) -> None:
    with saver_of(engine, records, background=False) as saver:
        saver.save(3, 3)
        assert_published(records, 3, whole_state(engine))
        assert not saver._buffers, "no host memory is kept"


@pytest.mark.parametrize(("error", "is_written"), [(RuntimeError, True), (KeyboardInterrupt, False)])
def test_a_run_that_ends_leaves_a_whole_one_or_none(
    engine: Engine,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    is_written: bool,
) -> None:
    advance(engine)
    gate = Gate(monkeypatch)
    timer = threading.Timer(0.2, gate.open)

    def end() -> None:
        with saver_of(engine, records) as saver:
            saver.save(1, 1)
            assert gate.reached.wait(60)
            timer.start()
            raise error

    with pytest.raises(error):
        end()
    assert leftovers(records) == []
    assert [path.name for path in records.checkpoints.folders()] == ["step_00000001"] * is_written


def test_a_run_that_would_keep_one_checkpoint_is_refused(config: PretrainConfig) -> None:
    values = config_values(config)
    values["checkpoint"]["keep"] = 1
    with pytest.raises(ConfigError, match=r"checkpoint: keep is 1: .* keep at least 2 checkpoints") as caught:
        check_config(PretrainConfig, values, "config.yaml")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    make_dataset(folder / "store")
    return write_config(small_config(str(folder / "store"), "run", engine="plain"), folder)


@pytest.fixture(scope="module")
def shared(config_path: Path) -> Path:
    """Two ranks in one folder, at first with a disk that rank 1 finds full."""
    output = config_path.parent / "shared"
    command = ["--config", str(config_path), f"output={output}"]
    program = script(
        config_path.parent,
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if RANK == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))",
    )
    done = run([*torchrun(2), str(program), *command])
    assert done.returncode != 0
    assert len(errors_of(done)) == 1, done.stdout + done.stderr
    assert "the checkpoint of step 2 was not saved: File too large" in errors_of(done)[0]
    assert list((output / "checkpoints").iterdir()) == []
    done = run([*torchrun(2), PRETRAIN, *command])
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def script(folder: Path, before: str) -> Path:
    """A program that does something on each rank, then trains."""
    path = folder / f"train_{len(list(folder.glob('*.py')))}.py"
    path.write_text(
        "import os, resource, runpy, signal, sys\n"
        f"RANK = int(os.environ.get('RANK', 0))\n{before}\n"
        f"sys.argv[0] = {PRETRAIN!r}\nrunpy.run_path({PRETRAIN!r}, run_name='__main__')\n"
    )
    return path


@pytest.mark.dist
def test_two_ranks_share_the_writing_once_both_have_room(shared: Path) -> None:
    folder = shared / "checkpoints" / "step_00000006"
    sizes = [
        sum(path.stat().st_size for path in folder.glob(f"*-0000{number}-of-00002.safetensors")) for number in (0, 1)
    ]
    assert sum(path.suffix == ".safetensors" for path in folder.iterdir()) == 4
    assert max(sizes) < 1.5 * min(sizes)
    assert leftovers_of(shared) == []


@pytest.mark.dist
@pytest.mark.soak
def test_one_rank_takes_up_what_two_wrote(shared: Path, config_path: Path, tmp_path: Path) -> None:
    shutil.copytree(shared, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    done = run([*python(), PRETRAIN, "--config", str(config_path), f"output={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000006" / "weights.safetensors").is_file()
    ours, theirs = (
        torch.cat([v.flatten() for v in state_of(run, 6)[0].values()]) for run in (tmp_path / "run", shared)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def leftovers_of(output: Path) -> list[str]:
    return [path.name for path in (output / "checkpoints").iterdir() if not path.name.startswith("step_")]


@pytest.mark.dist
@pytest.mark.soak
def test_ranks_that_do_not_see_the_folder_get_the_state_from_rank_0(
    shared: Path, config_path: Path, tmp_path: Path
) -> None:
    """Two machines with disks of their own: a relative path that leads elsewhere on each."""
    program = script(
        tmp_path,
        f"os.makedirs({str(tmp_path)!r} + f'/{{RANK}}', exist_ok=True); os.chdir({str(tmp_path)!r} + f'/{{RANK}}')",
    )
    command = [*torchrun(2), str(program), "--config", str(config_path)]
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"1 of 2 ranks see run/checkpoints", done.stdout)
    assert not (tmp_path / "1" / "run" / "checkpoints").exists()
    assert state_is(tmp_path / "0" / "run", shared)
    shutil.rmtree(tmp_path / "0" / "run" / "checkpoints" / "step_00000006")
    again = run(command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "taken up at step 4" in again.stdout
    assert state_is(tmp_path / "0" / "run", shared)


def state_is(output: Path, other: Path) -> bool:
    pairs = zip(state_of(output, 6), state_of(other, 6), strict=True)
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours) for ours, theirs in pairs
    )
