"""Numbers about collapse: right where the answer is known, and told by every method."""

import pytest
import torch

from mim_scale.config import PretrainConfig
from mim_scale.methods.build import build_method
from mim_scale.methods.watch import constant_share, deviation, effective_rank
from tests.models.small import changed, small_batch, small_config


def test_rank_counts_the_directions_that_are_used() -> None:
    draw = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(16, 5, generator=draw)).Q
    spread = torch.randn(4000, 5, generator=draw) @ axes.T + 3.0
    assert float(effective_rank(spread)) == pytest.approx(5, rel=0.01)
    assert float(effective_rank(torch.ones(50, 16))) == 1
    assert float(effective_rank(torch.outer(torch.arange(50.0), torch.randn(16, generator=draw)))) == pytest.approx(
        1, abs=1e-3
    )


def test_deviation_is_one_where_features_are_spread_and_zero_where_alike() -> None:
    draw = torch.Generator().manual_seed(0)
    assert float(deviation(torch.randn(4000, 64, generator=draw))) == pytest.approx(1, abs=0.02)
    assert float(deviation(torch.ones(10, 64))) == pytest.approx(0, abs=1e-6)


def test_constant_tokens_are_counted() -> None:
    voxels = torch.rand(2, 4, 27)
    voxels[0, :3] = 0.25
    assert float(constant_share(voxels)) == pytest.approx(3 / 8)


def watched(config: PretrainConfig) -> dict[str, float]:
    method, batch = build_method(config), small_batch(config, 2)
    with torch.no_grad():
        return {name: float(value) for name, value in method.watch(batch).items()}


def test_mask_in_mask_tells_of_every_level_pair_and_part() -> None:
    config = small_config()
    found = watched(config)
    parts = ["level_1", "level_2", "level_3", "alignment_1_2", "alignment_2_3"]
    assert {name for name in found if name.startswith("gradient_")} == {f"gradient_{part}" for part in parts}
    assert found["chance_1_2"] == pytest.approx(1 / 8)
    assert found["chance_2_3"] == pytest.approx(1 / 64)
    assert found["found_1_2"] in {0, 0.25, 0.5, 0.75, 1}
    for number in (1, 2, 3):
        assert 1 < found[f"rank_level_{number}"] <= 24
        assert 0 <= found[f"air_level_{number}"] <= 1
    at_once = watched(changed(config, train={"views_at_once": 1}))
    assert at_once == pytest.approx(found, rel=1e-4)


def test_gradient_of_a_part_is_that_of_the_loss_itself() -> None:
    config = changed(small_config(), method={"level_weights": [1.0, 3.0, 0.5]})
    method, batch = build_method(config), small_batch(config, 2)
    kept: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: list[torch.Tensor]) -> None:
        for rows in output:
            rows.retain_grad()
            kept.append(rows)

    hook = method.decoder.register_forward_hook(keep)
    losses = method(batch)
    hook.remove()
    (losses.parts["level_2"] * 3.0).backward()
    expected = torch.cat([rows.grad.flatten() for rows in kept if rows.grad is not None]).norm()
    with torch.no_grad():
        assert float(method.watch(batch)["gradient_level_2"]) == pytest.approx(float(expected), rel=1e-5)
