"""MAE, SimMIM and SimCLR: their losses against plain loops and stored numbers, and what they must not depend on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mim_scale.config import PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.methods import simmim
from mim_scale.methods.build import build_method
from mim_scale.methods.masked import Piece
from mim_scale.methods.simclr import nt_xent
from mim_scale.methods.views import make_views
from mim_scale.models.encoder import Encoder
from mim_scale.models.patches import patchify
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Sample, collate
from mim_scale.streaming.device import TensorBatch, TensorLevel, to_device
from tests.golden_numbers import unit
from tests.models.small import changed, one_sample
from tests.models.small_methods import method_config

NAMES = ("mae", "simmim", "simclr")


class Mixing(Encoder):
    """The least that a backbone can be: a linear map of each token's voxels, plus the mean over what is seen."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about[1:3])
        self.width = 6
        self.mask_width = math.prod(self.token)
        self.embed = nn.Linear(self.mask_width, self.width)

    def encode_filled(self, views: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        voxels = patchify(views, self.token)
        is_hidden = torch.zeros(voxels.shape[:2], dtype=torch.bool, device=voxels.device).scatter(1, hidden, True)
        embedded = self.embed(torch.where(is_hidden[..., None], mask_token.to(voxels.dtype), voxels))
        return embedded + embedded.mean(dim=1, keepdim=True)


@pytest.fixture(autouse=True)
def _smallest_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simmim, "build_encoder", Mixing)


def config_of(name: str, /, **sections: dict[str, Any]) -> PretrainConfig:
    return method_config(name, "vit" if name == "simmim" else "hybrid", **sections)


def batch_of(config: PretrainConfig, samples: int) -> TensorBatch:
    """Blocks from names, with true plans."""
    drawn: list[Sample] = []
    for position in range(samples):
        noise = unit(f"block{position}", *config.plan.box)
        block = (250 * (noise.cumsum(axis=0) - 1)).clip(-1024, 3000).astype(np.int16)
        drawn.append(Sample(position, f"volume{position}", block, plan(7, position, (64, 64, 64), config.plan)))
    return to_device(collate(drawn), "cpu")


def named_weights(method: nn.Module) -> nn.Module:
    """The method with weights that come from their names."""
    for name, parameter in method.named_parameters():
        values = 0.3 * unit(name, *parameter.shape) + (name.endswith("norm.weight"))
        parameter.data.copy_(torch.from_numpy(values))
    return method


def loss_of(method: nn.Module, batch: TensorBatch) -> float:
    with torch.no_grad():
        return float(method(batch).total)


GOLDEN = {"mae": 1.744306, "simmim": 1.010805, "simclr": 1.120058}
"""Losses of named weights on two (simclr: four) named blocks."""


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_stored_ones(name: str) -> None:
    config = config_of(name)
    method = named_weights(build_method(config))
    batch = batch_of(config, 4 if name == "simclr" else 2)
    losses = method(batch)
    assert float(losses.total.detach()) == pytest.approx(GOLDEN[name], rel=1e-5)
    assert list(losses.parts) == ["contrast" if name == "simclr" else "level_1"]


def looped_nt_xent(projected: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    found = np.zeros(projected.shape[:2])
    for group, rows in enumerate(projected):
        for one in range(len(rows)):
            scores = {}
            for other in range(len(rows)):
                if other != one:
                    cosine = rows[one] @ rows[other] / np.sqrt((rows[one] @ rows[one]) * (rows[other] @ rows[other]))
                    scores[other] = math.exp(cosine / temperature)
            sibling = one + 1 if one % 2 == 0 else one - 1
            found[group, one] = -math.log(scores[sibling] / sum(scores.values()))
    return found


NT_XENT = {0.5: 1.8440473664018613, 0.1: 4.973149690760689}


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 4, 7), (2, 16, 3)])
def test_nt_xent_is_the_plain_loop(temperature: float, shape: tuple[int, int, int]) -> None:
    projected = unit("projected", *shape)
    expected = looped_nt_xent(projected, temperature)
    np.testing.assert_allclose(nt_xent(torch.from_numpy(projected), temperature).numpy(), expected, rtol=1e-12)
    single = nt_xent(torch.from_numpy(projected).float(), temperature)
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-5, atol=1e-5)
    if shape == (3, 6, 5):
        assert expected.mean() == pytest.approx(NT_XENT[temperature], rel=1e-9)


def test_simmim_loss_is_the_explicit_one() -> None:
    for error in ("l1", "l2"):
        config = config_of("simmim", method={"error": error})
        method, batch = named_weights(build_method(config)), batch_of(config, 2)
        weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
        views = make_views(batch, config.plan, config.data.window_hu)[0].double().numpy()
        level = batch.levels[0]
        tokens = level.tokens.flatten(0, 1).numpy()
        losses = []
        for view, order in zip(views[:, 0], tokens, strict=True):
            blocks = [view[z : z + 4, y : y + 4, x : x + 4] for z in _steps for y in _steps for x in _steps]
            true = np.stack([block.ravel() for block in blocks])
            hidden = order[level.num_visible[0] :]
            seen = true.copy()
            seen[hidden] = weights["mask_token.value"]
            embedded = seen @ weights["encoder.embed.weight"].T + weights["encoder.embed.bias"]
            features = embedded + embedded.mean(axis=0)
            predicted = features[hidden] @ weights["to_voxels.weight"].T + weights["to_voxels.bias"]
            difference = predicted - true[hidden]
            losses.append(np.mean(np.abs(difference) if error == "l1" else difference**2))
        assert loss_of(method, batch) == pytest.approx(np.mean(losses), rel=1e-5)


_steps = range(0, 16, 4)


def test_mae_on_one_view_is_one_level_of_mask_in_mask() -> None:
    plan_values = {"crop": None, "box": 16, "levels": [{"hidden_ratio": 0.6}]}
    mae = config_of("mae", method={"error": "l2", "normalise_targets": True}, plan=plan_values)
    of_levels = {"normalise_targets": True, "level_weights": [1.0], "alignment": "none", "alignment_weights": []}
    nested = config_of("mask_in_mask", method=of_levels, plan=plan_values)
    one, other = build_method(mae), build_method(nested)
    assert one.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(named_weights(one).state_dict())
    batch = batch_of(mae, 3)
    losses = one(batch), other(batch)
    assert torch.equal(losses[0].total, losses[1].total)
    for each in losses:
        each.total.backward()
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_what_is_hidden_reaches_no_prediction(name: str) -> None:
    config = config_of(name)
    method, batch = named_weights(build_method(config)), batch_of(config, 2)
    group = batch.levels[0].groups()[0]
    views = make_views(batch, config.plan, config.data.window_hu)[0].requires_grad_()
    prediction = method.predict([Piece(0, views, group)])[0].voxels
    prediction.square().sum().backward()
    gradient = patchify(views.grad, config.plan.token)
    for view, visible, hidden in zip(gradient, group.visible, group.hidden, strict=True):
        assert (view[hidden] == 0).all()
        assert (view[visible] != 0).any(dim=1).all()
    noisy = patchify(views.detach(), config.plan.token)
    for view, hidden in zip(noisy, group.hidden, strict=True):
        view[hidden] = torch.rand(len(hidden), noisy.shape[2])
    there = noisy.view(-1, 4, 4, 4, 4, 4, 4).permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, 16, 16, 16)
    assert torch.equal(method.predict([Piece(0, there, group)])[0].voxels, prediction)


def slice_of(batch: TensorBatch, samples: slice) -> TensorBatch:
    alone = [one_sample(batch, sample) for sample in range(*samples.indices(len(batch.positions)))]
    levels = tuple(
        TensorLevel(
            starts=torch.cat([level.starts for level in of_level]),
            parent=of_level[0].parent,
            cell=torch.cat([level.cell for level in of_level]),
            tokens=torch.cat([level.tokens for level in of_level]),
            num_visible=tuple(level.num_visible[0] for level in of_level),
            draws=torch.cat([level.draws for level in of_level]),
        )
        for of_level in zip(*(one.levels for one in alone), strict=True)
    )
    return TensorBatch(batch.positions[samples], batch.keys[samples], batch.blocks[samples], levels)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_average_to_the_whole(name: str) -> None:
    config = config_of(name)
    method, batch = named_weights(build_method(config)), batch_of(config, 6)
    parts = [loss_of(method, slice_of(batch, slice(start, start + 2))) for start in (0, 2, 4)]
    assert np.ptp(parts) > 1e-4
    assert loss_of(method, batch) == pytest.approx(np.mean(parts), rel=1e-5)


def test_a_groups_loss_does_not_depend_on_other_groups() -> None:
    config = config_of("simclr", method={"group": 3}, train={"batch": 6, "micro_batch": 6}, held_out={"samples": 6})
    method, batch = named_weights(build_method(config)), batch_of(config, 6)
    alone = loss_of(method, slice_of(batch, slice(0, 3)))
    with_others = loss_of(method, batch)
    blocks = batch.blocks.clone()
    blocks[3:] = blocks[3:].flip(1) // 2
    others = TensorBatch(batch.positions, batch.keys, blocks, batch.levels)
    second = loss_of(method, slice_of(others, slice(3, 6)))
    assert loss_of(method, others) == pytest.approx((alone + second) / 2, rel=1e-6)
    assert with_others != pytest.approx(loss_of(method, others), rel=1e-4)


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_samples_that_hide_differently_count_alike(name: str) -> None:
    config = config_of(name, plan={"levels": [{"hidden_ratio": [0.2, 0.8], "views": 2}]})
    method, batch = named_weights(build_method(config)), batch_of(config, 5)
    assert len(set(batch.levels[0].num_visible)) > 2
    alone = [loss_of(method, one_sample(batch, sample)) for sample in range(5)]
    assert loss_of(method, batch) == pytest.approx(np.mean(alone), rel=1e-5)
    shares = [float(method.trivial(one_sample(batch, sample))["level_1"]) for sample in range(5)]
    assert float(method.trivial(batch)["level_1"]) > 0
    assert len(set(shares)) == 5


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    config = config_of(name)
    torch.manual_seed(1)
    first = build_method(config).state_dict()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = build_method(config).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build_method(config.model_copy(update={"seed": config.seed + 1})).state_dict()
    apart = [key for key in first if not torch.equal(first[key], other[key])]
    assert {key.split(".")[0] for key in apart} == {key.split(".")[0] for key in first}
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_asks_the_device_nothing(name: str) -> None:
    """Tensors without values: whatever would wait for one of them raises."""
    config, fake = config_of(name), FakeTensorMode()
    with fake:
        method = build_method(config)

    def without_values(part: Any) -> Any:
        return fake.from_tensor(part) if isinstance(part, Tensor) else part

    batch = batch_of(config, 2)
    level = TensorLevel(**{key: without_values(part) for key, part in vars(batch.levels[0]).items()})
    with fake:
        losses = method(TensorBatch(batch.positions, batch.keys, without_values(batch.blocks), (level,)))
        losses.total.backward()
        with pytest.raises(DataDependentOutputException):
            losses.total.item()


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_stays_near_fp32(name: str) -> None:
    config = config_of(name)
    method, batch = build_method(config), batch_of(config, 4)
    full = loss_of(method, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = method(batch).total
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(full, rel=2e-2)


@pytest.mark.parametrize("at_once", [4, 7, 8])
def test_groups_in_chunks_give_the_same_loss_and_gradients(at_once: int) -> None:
    config = config_of("simclr")
    found = []
    for views_at_once in (None, at_once):
        method = named_weights(build_method(changed(config, train={"views_at_once": views_at_once})))
        losses = method(batch_of(config, 6))
        losses.total.backward()
        found.append((losses, {name: parameter.grad for name, parameter in method.named_parameters()}))
    (whole, gradients), (cut, cut_gradients) = found
    torch.testing.assert_close(cut.total, whole.total, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_less_room_than_a_group_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="views_at_once is 3, and method simclr compares the 4 views"):
        build_method(config_of("simclr", train={"views_at_once": 3}))


def test_features_that_tell_nothing_apart_reach_the_trivial_loss() -> None:
    config = config_of("simclr", method={"group": 4}, train={"micro_batch": 4})
    method, batch = build_method(config), batch_of(config, 4)
    nn.init.zeros_(method.projection.fc2.weight)
    nn.init.ones_(method.projection.fc2.bias)
    assert float(method.trivial(batch)["contrast"]) == pytest.approx(math.log(7))
    assert loss_of(method, batch) == pytest.approx(math.log(7), rel=1e-6)


def test_preview_shows_cosines_of_the_views_that_it_shows() -> None:
    config = config_of("simclr")
    method, batch = build_method(config), batch_of(config, 2)
    preview = method.preview(batch)
    assert preview.views.shape == (4, 16, 16, 16)
    assert 0 <= preview.views.min() < preview.views.max() <= 1
    rows = method.project(torch.from_numpy(preview.views)[:, None]).detach().double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(preview.similarity, rows @ rows.T, atol=1e-5)
    assert not np.array_equal(preview.views[0], preview.views[1])
