"""The engine contract: DeepSpeed at every stage does what plain torch does, and its state fits any other engine."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from mim_scale.training.engine import parameter_groups
from tests.training.jobs import result_line, run, torchrun
from tests.training.standin import StandIn

OFFLOADED = ("offload_1", "offload_2", "offload_3")
FP32 = ("plain", "zero_0", "zero_1", "zero_2", "zero_3")


@pytest.fixture(scope="module")
def told_at(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What the checking program says at a number of ranks, without compiler or ninja on PATH: nothing is built."""

    @cache
    def tell(world: int) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"world_{world}")
        job = run(
            [*torchrun(world), "-m", "tests.training.engine_checks"],
            PATH=str(folder),
            TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
        )
        assert not (folder / "extensions").exists()
        return result_line(job)

    return tell


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_contract(world: int, told_at: Callable[[int], dict[str, Any]]) -> None:
    told = told_at(world)
    for name in (*FP32, *OFFLOADED):
        assert told[name]["from_reference"] < 1e-6, name
    # bf16 keeps 3 digits; both engines must round alike.
    for name in ("zero_1_bf16", "plain_bf16"):
        assert told[name]["from_reference"] < 5e-3, name
        assert told[name]["trace"][0] != told["plain"]["trace"][0], "autocast was not on"
    for name, found in told.items():
        assert found["round_trip"] == 0.0, name
        assert found["resumed_trace"] == 0.0, name
        assert found["resumed_state"] == 0.0, name
        assert not found["left_out_norm_is_finite"], name
        assert found["are_pieces_whole"], name
        assert found["names"] == sorted(StandIn().state_dict()), name


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_at_stage_3_no_device_holds_the_whole(world: int, told_at: Callable[[int], dict[str, Any]]) -> None:
    assert told_at(world)["zero_3"]["whole_elements"] == 0


@pytest.mark.dist
@pytest.mark.parametrize("engine", FP32)
def test_one_and_two_ranks_agree(engine: str, told_at: Callable[[int], dict[str, Any]]) -> None:
    traces = [torch.tensor(told_at(world)[engine]["trace"]) for world in (1, 2)]
    torch.testing.assert_close(*traces, rtol=1e-6, atol=0)


def test_decay_spares_biases_and_one_dimensional_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module.token = nn.Parameter(torch.zeros(1, 1, 4))
    module.fixed = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    decayed, free = parameter_groups(module, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert [p.shape for p in decayed["params"]] == [(1, 1, 4), (4, 3)]
    assert len(free["params"]) == 3
