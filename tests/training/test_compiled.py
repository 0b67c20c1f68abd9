"""train.compile: the same numbers as without, or a word and no run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mim_scale.errors import ConfigError
from mim_scale.methods.build import build_method
from mim_scale.training.compiled import blocks_of, compile_blocks
from mim_scale.training.journal import read_journal
from tests.models.small_methods import method_config
from tests.synthetic import make_dataset
from tests.training.jobs import PRETRAIN, errors_of, python, run, write_config

COMPILED = {"compile": True, "engine": "plain", "steps": 3}


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_journal(output / "journal.jsonl") if row["kind"] == "step"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.soak)])
def test_loss_and_gradient_stay(cache: str, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Of one shape and one block: what takes time here is the C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    config = method_config("simmim", "vit", train=COMPILED | {"precision": precision}, model={"depth": 1})
    assert "1 blocks compiled" in compile_blocks(build_method(config), config)


@pytest.mark.soak
def test_a_run_has_the_losses_of_one_without(tmp_path: Path, cache: str) -> None:
    make_dataset(tmp_path / "store")
    config = method_config("mask_in_mask", "hybrid", data={"store": str(tmp_path / "store")}, train=COMPILED)
    path = write_config(config, tmp_path)
    for name, compiled in (("with", "true"), ("without", "false")):
        overrides = [f"train.compile={compiled}", f"output={tmp_path / name}"]
        job = run([*python(), PRETRAIN, "--config", str(path), *overrides], timeout=500, TORCHINDUCTOR_CACHE_DIR=cache)
        assert job.returncode == 0, job.stderr
        assert ("2 blocks compiled" in job.stdout) == (name == "with")
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_without_a_compiler_it_is_refused_in_one_line(tmp_path: Path) -> None:
    make_dataset(tmp_path / "store")
    config = method_config("mae", "vit", data={"store": str(tmp_path / "store")}, train=COMPILED)
    job = run(
        [*python(), PRETRAIN, "--config", str(write_config(config, tmp_path)), f"output={tmp_path / 'run'}"],
        CXX=str(tmp_path / "none"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert job.returncode == 2, job.stderr
    (line,) = errors_of(job)
    assert "train.compile: torch.compile failed here" in line
    assert line.endswith("set train.compile to false")


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_another_loss_or_gradient_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    config = method_config("mae", "vit", train=COMPILED)

    def falsify(block: nn.Module, **_: object) -> None:
        right = block.forward

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = right(tokens)
            return found * 1.001 if wrong == "loss" else found.detach() + 0.9 * (found - found.detach())

        monkeypatch.setattr(block, "forward", forward)

    monkeypatch.setattr(nn.Module, "compile", falsify)
    with pytest.raises(ConfigError, match=r"compiled blocks change the loss by .* set train.compile to false"):
        compile_blocks(build_method(config), config)


@pytest.mark.parametrize(
    ("pair", "count"),
    [(("mask_in_mask", "hybrid"), 2), (("mae", "primus"), 3), (("mae", "resenc"), 1), (("simmim", "swin"), 4)],
)
def test_transformer_blocks_are_what_is_compiled(pair: tuple[str, str], count: int) -> None:
    assert len(list(blocks_of(build_method(method_config(*pair))))) == count


def test_a_network_without_any_is_refused() -> None:
    config = method_config("simclr", "resenc", train=COMPILED)
    with pytest.raises(ConfigError, match="no blocks to compile"):
        compile_blocks(build_method(config), config)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"compile": True, "engine": "deepspeed", "zero_stage": 3}}, "zero_stage 3"),
        (
            {"train": {"compile": True}, "plan": {"levels": [{"hidden_ratio": [0.5, 0.75], "views": 2}]}},
            "number of visible tokens",
        ),
    ],
)
def test_what_cannot_keep_its_promises_is_refused(sections: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        method_config("mae", "vit", **sections)
