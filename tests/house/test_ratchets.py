"""What keeps the house small: sizes, light imports, errors that end well."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mim_scale.errors import ConfigError, DamagedError, exit_with

ROOT = Path(__file__).parents[2]
FOLDERS = ("mim_scale", "data_pipeline", "launch", "examples", "benchmarks", "tests")
HEAVY = ("torch", "ray", "deepspeed", "mlflow", "monai", "tensorstore", "matplotlib")


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob("*.py")


def test_no_file_is_over_400_lines() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_no_function_is_over_60_lines() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("mim_scale", ()),
        ("mim_scale.cli", ()),
        ("mim_scale.config_file", ()),
        ("mim_scale.sampling.plan", ()),
        ("mim_scale.sampling.order", ()),
        ("mim_scale.training.supervise", ()),
        ("mim_scale.store.dataset", ("tensorstore",)),
        ("mim_scale.streaming.stream_threads", ("tensorstore",)),
        ("data_pipeline.commands.build", ("tensorstore",)),
    ],
)
def test_light_modules_stay_light(module: str, allowed: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(result.stdout)) - set(allowed)
    assert loaded == set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad"), 2),
        (DamagedError("bad"), 3),
        (FileNotFoundError(2, "no such file", "a/b"), 2),
        (OSError(28, "No space left on device"), 2),
        (BrokenPipeError(32, "a socket of ours"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(75), 75),
        (ValueError("bug"), 1),
    ],
)
def test_an_error_ends_in_one_line_and_its_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_with(fail)
    assert caught.value.code == code
    text = capsys.readouterr().err
    assert ("please report" in text) == (code == 1)
    if isinstance(error, ConfigError | DamagedError):
        assert text == "error: bad\n"
    if isinstance(error, FileNotFoundError):
        assert text == "error: a/b: no such file; mend that and start again\n"


@pytest.mark.parametrize("skip_teardown", [False, True])
@pytest.mark.parametrize("length", [1, 1_000_000])
def test_a_reader_that_has_gone_is_no_bug(skip_teardown: bool, length: int) -> None:
    """What `mim-scale data stats --json | true` meets, at once or only at the last flush."""
    code = f"from mim_scale.errors import exit_with; exit_with(lambda: print('x' * {length}) or 0, {skip_teardown})"
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == (141 if length > 1 else 0)


def test_an_interrupt_at_the_end_changes_no_exit_code() -> None:
    """Ctrl-C after "the store is complete", or a second one after "interrupted"."""
    code = (
        "import atexit, os, signal; from mim_scale.errors import exit_with; "
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); exit_with(lambda: 7, skip_teardown=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
