"""The reference from stock layers is the same network, and the benchmark says what it measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_scale.bench import commands, step
from mim_scale.bench.arithmetic import measure_work, visible_flops
from mim_scale.bench.step import benchmark_config, compare, encoder_sides, step_sides
from mim_scale.bench.stock import StockDecoder, StockEncoder
from mim_scale.cli import run
from mim_scale.config_file import config_values, dump_config
from mim_scale.errors import ConfigError
from tests.golden_numbers import Golden, golden_method
from tests.models.small import changed, small_config
from tests.models.small_methods import method_config
from tests.models.test_chunks import ragged_config
from tests.models.test_golden import volumes


def small_yaml(folder: Path, **train: Any) -> Path:
    # JSON is YAML.
    path = folder / "small.yaml"
    path.write_text(json.dumps(config_values(changed(small_config(), train=train))))
    return path


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_encoders_agree_on_outputs_and_gradients(ratio: float) -> None:
    compared = compare("encoder", encoder_sides(benchmark_config(small_config()), ratio), runs=2)
    assert compared.outputs_apart < 1e-5
    assert compared.gradients_apart < 1e-5
    assert {name: len(seconds) for name, seconds in compared.seconds.items()} == {"ours": 2, "dense": 2, "stock": 2}


@pytest.mark.parametrize("ragged", [False, True])
def test_steps_agree_also_where_levels_hide_different_numbers(ragged: bool) -> None:
    config = benchmark_config(ragged_config() if ragged else small_config())
    compared = compare("step", step_sides(config), runs=1)
    assert compared.gradients_apart < 1e-5


def test_sides_that_differ_are_not_timed() -> None:
    sides = encoder_sides(benchmark_config(small_config()), 0.5)
    module, _ = sides["ours"]
    with torch.no_grad():
        next(module.parameters()).mul_(1.01)
    with pytest.raises(AssertionError, match="encoder: outputs differ by"):
        compare("encoder", sides, runs=1)


@torch.no_grad()
def test_reference_is_golden() -> None:
    """Against the numbers of the method's release itself, not only against ours."""
    golden, method = Golden("tiny"), golden_method("tiny")
    view, token = (96, 96, 96), (16, 16, 16)
    encoder = StockEncoder(method.config.model, view, token)
    encoder.load_state_dict(method.encoder.state_dict())
    decoder = StockDecoder(method.config.method.decoder, method.encoder.width, (6, 6, 6), token)
    decoder.load_state_dict(method.decoder.state_dict())
    visible, hidden = golden.masks("view0.6")
    latent = encoder(volumes("input96", 2, 96), visible)
    assert golden.error("view0.6.latent", latent) < 1e-5
    assert golden.error("view0.6.pred", decoder(latent, visible, hidden)) < 1e-5


def test_ratio_is_the_median_of_turns() -> None:
    compared = step.Comparison("", {"ours": [1.0, 2.0, 1.0], "stock": [3.0, 10.0, 4.0]}, 0.0, 0.0)
    assert compared.ratio("stock") == 4.0


def test_arithmetic_by_formula_is_what_torch_counts() -> None:
    """But for attention, which torch counts on no CPU, the input's gradient, which nobody needs, and zero planes."""
    config = benchmark_config(changed(small_config(), model={"depth": 1}))
    module, passes = step_sides(config)["ours"]
    needed, work = visible_flops(config), measure_work(passes)
    assert needed is not None
    assert work.flops == pytest.approx(needed, rel=0.15)
    assert work.moved_bytes > 4 * sum(parameter.numel() for parameter in module.parameters())


def test_command_prints_numbers_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_yaml(tmp_path)
    options = [
        "--config",
        str(config),
        "--ratios",
        "0.5",
        "--runs",
        "1",
        "--no-memory",
        "--default-allocator",
        "--json",
    ]
    assert run(["bench", "step", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["configs"][str(config)]["parts"]
    assert [part["part"] for part in parts] == ["encoder, 4 views, 0.5 hidden", "step, one sample"]
    assert found["freed_memory_kept"] is False
    assert set(parts[0]["ratio"]) == {"dense", "stock"}


def test_networks_without_a_reference_are_refused_in_one_line() -> None:
    config = Path(__file__).parents[2] / "configs" / "mae_vit_b.yaml"
    with pytest.raises(ConfigError, match="on vit: take --ours-only"):
        run(["bench", "step", "--config", str(config), "--default-allocator"])


def test_a_method_that_compares_samples_is_measured_on_a_group(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "simclr.yaml"
    path.write_text(dump_config(method_config("simclr", "vit", method={"group": 4}, train={"micro_batch": 4})))
    options = ["--config", str(path), "--runs", "1", "--default-allocator", "--views-at-once", "3"]
    with pytest.raises(ConfigError, match="not simclr on vit: take --ours-only"):
        run(["bench", "step", *options])
    assert run(["bench", "step", *options, "--ours-only"]) == 0
    assert "samples a second" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_stays_only_where_asked() -> None:
    """In processes of their own: the setting holds to a process's end."""
    code = (
        "import sys, torch\n"
        "from mim_scale.training.allocator import keep_freed_memory\n"
        "def resident():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS'))\n"
        "done = sys.argv[1] == 'keep' and keep_freed_memory()\n"
        "before = resident()\n"
        "torch.ones(2**25)\n"
        "print(done, (resident() - before) * 1024)\n"
    )
    kept = {}
    for way in ("keep", "default"):
        result = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True)
        done, count = result.stdout.split()
        if way == "keep" and done == "False":
            pytest.skip("no glibc")
        kept[way] = int(count)
    block = 4 * 2**25
    assert kept["default"] < 0.5 * block < 0.9 * block < kept["keep"]


@pytest.mark.parametrize(
    ("words", "has_gpu", "told"),
    [
        (["--bf16", "--against", "CONFIG"], False, "give one of them"),
        (["--bf16"], True, "--bf16 compares CPU seconds"),
        (["--against", "CONFIG"], True, "--against compares CPU seconds"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(
    words: list[str], has_gpu: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(small_yaml(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    with pytest.raises(ConfigError, match=told):
        run(["bench", "step", "--config", config, *(config if word == "CONFIG" else word for word in words)])


def test_the_first_line_names_the_precisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_of_precisions", lambda *values: {})
    assert run(["bench", "step", "--config", str(small_yaml(tmp_path)), "--bf16", "--default-allocator"]) == 0
    assert ", fp32 and bf16, one thread" in capsys.readouterr().out


def test_long_comparisons_tell_how_many_passes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(commands.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> Any:
        def once() -> float:
            now[0] += seconds
            return seconds

        return (torch.nn.Identity(), once)

    lines: list[str] = []
    sides = commands._shown("base step", {"ours": passes(2), "stock": passes(10)}, 2, lines.append)
    results = [run() for _ in range(2) for _, run in sides.values()]
    assert results == [2, 10, 2, 10]
    assert lines == ["base step: 2 of 4 passes, 12 s left"], "and not after the last"
