"""Launches as they are written in manifests and pages: taken apart and looked at, not run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mim_scale.config import BuildConfig, PretrainConfig
from mim_scale.config_file import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = {"pretrain": PretrainConfig, "build_shards": BuildConfig}
TAKES_NO_VALUE = {"--no_ssh", "--kill-on-bad-exit=1"}


def check_launch(words: Sequence[str]) -> None:
    """A launch of one of our programs: it exists, and its config and settings can be read."""
    numbers = [n for n, word in enumerate(words) if word.endswith((".py", ".sbatch")) and "supervise" not in word]
    assert len(numbers) == 1, f"not one program in {words}"
    (at,) = numbers
    name = Path(words[at]).name
    (script,) = (ROOT / "launch").rglob(name)
    assert words[at].removeprefix("/opt/mim-scale/") == str(script.relative_to(ROOT))
    options, settings = options_of(words[at + 1 :])
    config = ROOT / options.pop("--config").removeprefix("/opt/mim-scale/")
    assert set(options) <= {"--nodes"}
    load_config(CONFIGS[script.stem], config, settings)


def options_of(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--name value` pairs, and what stands for itself."""
    options: dict[str, str] = {}
    alone = []
    rest = iter(words)
    for word in rest:
        if word in TAKES_NO_VALUE or not word.startswith("--"):
            alone.append(word)
        else:
            options[word] = next(rest)
    return options, alone


def without_supervisor(words: Sequence[str]) -> list[str]:
    """The command that a supervisor is given; the words themselves where none is."""
    if "launch/supervise.py" not in words:
        return list(words)
    at = words.index("--")
    options, alone = options_of(words[words.index("launch/supervise.py") + 1 : at])
    assert set(options) <= {"--restarts", "--within"}
    assert alone == []
    assert all(float(value) > 0 for value in options.values())
    return list(words[at + 1 :])


def split(command: str) -> list[str]:
    """The words of a command line."""
    return shlex.split(command, comments=True)
