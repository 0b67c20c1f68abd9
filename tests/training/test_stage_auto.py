"""`train.zero_stage: auto`: the lowest stage that fits, with the reason; the run's own record keeps `auto`."""

import functools
from pathlib import Path

import pytest
import torch

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.methods.cost import USABLE, Cost, cost_of
from mim_scale.training import memory
from mim_scale.training import rank_memory as rank_memory_module
from mim_scale.training.memory import choose_stage, resolve_stage, with_stage
from mim_scale.training.rank_memory import rank_memory
from mim_scale.training.ranks import Ranks
from tests.models.small import changed, small_config

WORLD = 8
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _small_models_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 3 keeps some weights whole, more than this model has: as if it did not."""
    monkeypatch.setattr(rank_memory_module, "LIVE", 0)
    monkeypatch.setattr(memory, "cost_of", lambda config, policy: traced(policy))


@functools.cache
def traced(policy: Checkpointing) -> Cost:
    """The cost of the one network of these tests: it is the same at every stage."""
    return cost_of(auto(), policy)


def auto(**train: object) -> PretrainConfig:
    sections = {"engine": "deepspeed", "zero_stage": "auto", "batch": WORLD, "micro_batch": 1, "precision": "fp32"}
    # Wide, so that weights count beside activations.
    wide = {"widths": [12, 384], "depth": 6, "heads": 3}
    return changed(small_config(), model=wide, train=sections | {"activation_checkpointing": "none"} | train)


def needed(config: PretrainConfig, stage: int) -> float:
    policy = config.train.activation_checkpointing
    assert policy != "auto"
    return rank_memory(traced(policy), with_stage(config, stage), WORLD, WORLD, True).needed(True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_lowest_that_fits(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "USABLE_AT_3", USABLE)
    config = auto()
    sizes = {one: needed(config, one) for one in (1, 2, 3)}
    assert sizes[1] > sizes[2] > sizes[3]
    found, why = choose_stage(config, "none", int(sizes[stage] / USABLE) + 1, WORLD, WORLD, True)
    assert found == stage
    assert why.startswith(f"ZeRO stage auto: {stage} fits (GiB: 1 ")
    assert "\n" not in why


def test_where_none_fits_it_says_so() -> None:
    found, why = choose_stage(auto(), "none", 1000, WORLD, WORLD, True)
    assert found == 3
    assert "3 is the least there is" in why


def test_stage_3_is_left_out_where_it_needs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network's weights are all gathered at once."""
    monkeypatch.setattr(rank_memory_module, "LIVE", 100_000_000)
    found, why = choose_stage(auto(), "none", 1000, WORLD, WORLD, True)
    assert found == 2
    assert "2 is the least there is" in why
    assert "3 " not in why.split("GiB: ")[1].split(" of ")[0]


def test_a_refusal_ends_all_ranks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found on rank 0 alone; were it raised inside an exchange, the others would call it a lost rank."""
    asked: list[str] = []

    class Other(Ranks):
        def on_first(self, action: object) -> tuple[int, str]:  # type: ignore[override]
            asked.append("on_first")
            return 3, "why"

        def gather(self, values: list[float]) -> object:  # type: ignore[override]
            return torch.tensor([values, values]).numpy()

        def gather_objects(self, value: object) -> list[object]:  # type: ignore[override]
            return [value, value]

    assert resolve_stage(auto(), Other(1, 2, 1, torch.device("cpu")))[0].train.zero_stage == 3
    assert asked == ["on_first"]


def test_only_auto_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    config, why = resolve_stage(auto(), ALONE)
    assert (config.train.zero_stage, config.train.stage) == (1, 1)
    assert why
    assert resolve_stage(config, ALONE) == (config, "")
    plain = auto(engine="plain")
    assert resolve_stage(plain, ALONE) == (plain, "")
    assert plain.train.stage == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert resolve_stage(auto(), ALONE)[0].train.zero_stage == 1, "alone there is nobody to share with"


def test_stage_3_is_not_taken_where_another_setting_rules_it_out() -> None:
    found, why = choose_stage(auto(compile=True), "none", 1000, WORLD, WORLD, True)
    assert found == 2
    assert "2 is the least there is" in why


def test_a_run_may_go_on_with_it(tmp_path: Path) -> None:
    from mim_scale.training.run_folder import refuse_other_run

    refuse_other_run(with_stage(auto(), 1), auto(), str(tmp_path))
