"""Files that `mim-scale estimate` is given: what no program of ours writes is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mim_scale.cli import run
from mim_scale.errors import ConfigError
from mim_scale.estimate.link import read_links
from mim_scale.estimate.pace import read_calibration
from mim_scale.estimate.projection import find_corpus
from tests.training.standin import small_config

TIMED = {"latency_s": 1e-5, "bytes_per_s": 1e9, "members": 2, "sizes": [4, 1024], "seconds": [1e-5, 2e-5]}
LINK = {"kind": "mim-scale link", "device": "cpu", "cores": 8, "within": TIMED, "between": None}
PACE = dict.fromkeys(
    ("spread_s", "update_s", "read_s", "read_core_s", "crowding", "copy_s", "write_s", "held_out_s"), 0.1
)
PACE |= {"micro_batch_s": 0.5, "is_on_cores": True}
MEASURED = {"source": "20 steps", "device": "cpu", "cores": 2, "steps": 20, "policy": "none", "peak_bytes": 0}
CALIBRATION = {"calibration": MEASURED | {"pace": PACE}, "run": {}}
PLAN = {"num_sources": 110, "num_refused": 10, "bytes_stored": 5e9, "core_hours": 1.0}


def written(path: Path, good: dict[str, Any], key: str, raw: str) -> Path:
    """The file with `raw` in the place of one value: JSON as it stands there."""
    values = json.loads(json.dumps(good))
    *parents, last = key.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = "HERE"
    path.write_text(json.dumps(values).replace('"HERE"', raw))
    return path


def line_of(caught: pytest.ExceptionInfo[ConfigError], told: str) -> None:
    line = str(caught.value)
    assert told in line
    assert "\n" not in line
    assert len(line) < 300
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("key", "raw"),
    [
        *(("cores", raw) for raw in ("0", "1e999", "2.5", '"many"', "null")),
        pytest.param("cores", "1" * 500, id="cores-long"),
        *(("within.members", raw) for raw in ("-2", "0", "1", "true")),
        *(("within.latency_s", raw) for raw in ("NaN", "-1", "1e999", "null")),
        *(("within.bytes_per_s", raw) for raw in ("0", "Infinity", "1e-320")),
        *(("within.seconds", raw) for raw in ("[0, 0]", "3")),
        *(("device", raw) for raw in ('"tpu"', "1", "null")),
        pytest.param("within", "[" * 100_000, id="deep"),
        ("within", "{}"),
        ("within", json.dumps(TIMED | {"sizes": []})),
        ("kind", '"other"'),
    ],
)
def test_an_odd_link_is_refused(key: str, raw: str, tmp_path: Path) -> None:
    assert read_links(written(tmp_path / "link.json", LINK, "cores", "8")).cores == 8
    with pytest.raises(ConfigError, match=r"is not what launch/measure_link.py --out writes") as caught:
        read_links(written(tmp_path / "link.json", LINK, key, raw))
    line_of(caught, key if len(raw) < 100_000 else "no JSON")


@pytest.mark.parametrize(
    ("key", "raw"),
    [
        *(("pace.micro_batch_s", raw) for raw in ("0", "-1", '"x"', "null", "NaN", "1e999")),
        *(("cores", raw) for raw in ("0", '"many"')),
        ("pace.crowding", "-1"),
        ("pace.is_on_cores", "false"),
        ("peak_bytes", '"x"'),
        ("device", '"tpu"'),
        ("policy", '"some"'),
        ("pace", "3"),
    ],
)
def test_an_odd_pace_is_refused(key: str, raw: str, tmp_path: Path) -> None:
    assert read_calibration(written(tmp_path / "pace.json", CALIBRATION, "run", "{}")).pace.micro_batch_s == 0.5
    with pytest.raises(ConfigError, match=r"is neither a run's folder nor what") as caught:
        read_calibration(written(tmp_path / "pace.json", CALIBRATION, f"calibration.{key}", raw))
    line_of(caught, key)


@pytest.mark.parametrize(
    ("key", "raw"),
    [
        ("num_refused", "111"),
        ("num_refused", "-1"),
        ("num_sources", '"x"'),
        *(("bytes_stored", raw) for raw in ("NaN", "-1", "Infinity", "null")),
    ],
)
def test_an_odd_plan_is_refused(key: str, raw: str, tmp_path: Path) -> None:
    assert find_corpus(small_config(), None, written(tmp_path / "plan.json", PLAN, "num_refused", "10")).volumes == 100
    with pytest.raises(ConfigError, match="is not what `mim-scale data plan --json` prints") as caught:
        find_corpus(small_config(), None, written(tmp_path / "plan.json", PLAN, key, raw))
    line_of(caught, key)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "1e308", "--volumes", "10"], "--epochs is 1e+308, expected more than 0, up to 1e+12"),
        (["--epochs", "nan", "--volumes", "10"], "--epochs is nan"),
        pytest.param(["--world", "9" * 400], "up to 1e+12", id="world"),
        (["--mtbf", "1e308"], "--mtbf is 1e+308"),
    ],
)
def test_a_number_beyond_all_use_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(["estimate", "--config", "configs/tiny.yaml", *words])
    assert told in str(caught.value)
