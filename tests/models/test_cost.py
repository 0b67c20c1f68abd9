"""What a step is predicted to cost, against what it does cost."""

import functools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mim_scale.cli import run
from mim_scale.config_file import dump_config
from mim_scale.methods import cost
from mim_scale.methods.build import build_method
from mim_scale.methods.cost import FEWEST_FIRST, choose_policy, cost_of
from tests.models.small import changed, small_batch, small_config
from tests.models.small_methods import method_config

LEVELS = [{"hidden_ratio": 0.5}, {"hidden_ratio": 0.6}]
METHOD = {"alignment": "none", "level_weights": [1.0, 1.0]}
SMALL = changed(small_config(), model={"blocks": [2], "depth": 2}, plan={"levels": LEVELS}, method=METHOD)


@functools.cache
def predicted_cost(policy) -> cost.Cost:
    return cost_of(SMALL, policy)


@pytest.mark.parametrize("policy", FEWEST_FIRST)
def test_arithmetic_and_memory_are_those_of_a_real_step(policy) -> None:
    predicted = predicted_cost(policy)
    method, batch = build_method(SMALL, policy), small_batch(SMALL, 1)
    with FlopCounterMode(display=False) as counted:
        method(batch).total.backward()
    assert predicted.flops == counted.get_total_flops()
    assert predicted.parameters == sum(parameter.numel() for parameter in method.parameters())
    method.zero_grad()
    live = cost._Live()
    with live:
        method(batch).total.backward()
    assert predicted.activation_bytes == pytest.approx(live.most, rel=0.02)


def test_policies_trade_arithmetic_for_memory() -> None:
    costs = {policy: predicted_cost(policy) for policy in FEWEST_FIRST}
    assert costs["none"].flops < costs["second"].flops < costs["all"].flops
    assert costs["all"].bytes < costs["stem"].bytes < costs["none"].bytes
    assert costs["none"].gradient_bytes == 4 * costs["none"].parameters
    assert (
        costs["none"].bytes
        == costs["none"].activation_bytes + 16 * costs["none"].parameters + costs["none"].batch_bytes
    )
    chunked = cost_of(changed(SMALL, train={"views_at_once": 1}), "none")
    assert chunked.activation_bytes < 0.7 * costs["none"].activation_bytes


def test_auto_takes_the_first_that_fits_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(cost, "cost_of", lambda config, policy: predicted_cost(policy))
    needed = {policy: predicted_cost(policy).bytes for policy in FEWEST_FIRST}
    policy, why = choose_policy(SMALL, 100 * needed["none"])
    assert policy == "none"
    assert "none fits" in why
    policy, why = choose_policy(SMALL, int(needed["all"] / 0.79))
    assert policy == min(FEWEST_FIRST, key=lambda one: needed[one])
    policy, why = choose_policy(SMALL, 1000)
    assert policy == "all"
    assert "lower train.views_at_once" in why


def test_estimate_prints_a_table_and_json(capsys, tmp_path) -> None:
    (tmp_path / "small.yaml").write_text(dump_config(SMALL))
    config = ["--config", str(tmp_path / "small.yaml")]
    assert run(["estimate", *config]) == 0
    shown = capsys.readouterr().out
    assert f"{predicted_cost('none').parameters:,} parameters" in shown
    assert [line.split()[0] for line in shown.splitlines()[3:-1]] == list(FEWEST_FIRST)
    copied = predicted_cost("none").state_bytes / 2**30
    assert shown.splitlines()[-1].startswith(f"besides, in host memory, for saves in the background: {copied:.2f} GiB")
    assert run(["estimate", *config, "--json", "--measure"]) == 0
    values = json.loads(capsys.readouterr().out)
    for policy in FEWEST_FIRST:
        found = values["policies"][policy]
        assert found["measured"]["flops"] == found["flops"]
        assert found["measured"]["peak_bytes"] > 0
    assert not torch.is_autocast_enabled("cpu")


def test_the_lowest_of_drawn_ratios_counts() -> None:
    plans = [{"levels": [{"hidden_ratio": ratio, "views": 2}]} for ratio in ([0.25, 0.75], 0.25, 0.75)]
    drawn, low, high = (cost_of(method_config("mae", "vit", plan=plan), "none") for plan in plans)
    assert drawn == low
    assert drawn.bytes > high.bytes
