"""The network's promises beyond its numbers: nothing hidden leaks, gradients are right, sizes follow the config."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.config import Checkpointing, Size3
from mim_scale.errors import ConfigError
from mim_scale.models import depthwise
from mim_scale.models.depthwise import DepthwiseConv
from mim_scale.models.hybrid import HybridEncoder
from mim_scale.models.patches import in_grid_order, patchify, pool_cells, unpatchify, visible_grid
from mim_scale.models.positions import position_table
from tests.models.small import model_config, random_masks

sizes = st.integers(1, 3)
grids = st.tuples(sizes, sizes, sizes).filter(lambda grid: np.prod(grid) > 1)


@settings(max_examples=25, deadline=None)
@given(
    grid=grids,
    widths=st.sampled_from([(12,), (3, 12), (5, 7, 24), (4, 6, 8, 12)]),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_hidden_voxels_change_no_visible_feature(grid: Size3, widths: tuple[int, ...], share: float, seed: int) -> None:
    torch.manual_seed(seed)
    stride = 2 ** len(widths)
    token, view = (stride,) * 3, tuple(stride * size for size in grid)
    encoder = HybridEncoder(model_config(*widths), view, token)
    tokens = int(np.prod(grid))
    visible, hidden = random_masks(2, tokens, min(tokens - 1, 1 + int(share * (tokens - 1))), seed)
    views = torch.rand(2, 1, *view)
    shown = visible_grid(visible, grid, views.dtype).view(2, -1, 1)
    noise = torch.randn(2, tokens, stride**3) * 100
    noisy = unpatchify(patchify(views, token) * shown + noise * (1 - shown), grid, token)
    with torch.no_grad():
        assert torch.equal(encoder(views, visible), encoder(noisy, visible))
    noisy.requires_grad_()
    encoder(noisy, visible).square().sum().backward()
    assert noisy.grad is not None
    assert patchify(noisy.grad, token).gather(1, hidden[..., None].expand(-1, -1, stride**3)).abs().max() == 0


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)),
    kernel=st.sampled_from([3, 5]),
)
def test_depthwise_gradients_are_those_of_autograd(shape: tuple[int, ...], kernel: int) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv(shape[-1], kernel).double()
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(shape, dtype=torch.float64)
    stock = F.conv3d(rows.movedim(-1, 1), layer.weight, layer.bias, padding=kernel // 2, groups=shape[-1]).movedim(
        1, -1
    )
    inputs = (rows, layer.weight, layer.bias)
    expected = torch.autograd.grad(stock, inputs, gradient)
    ours = layer(rows)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    for computed, wanted in zip(torch.autograd.grad(ours, inputs, gradient), expected, strict=True):
        torch.testing.assert_close(computed, wanted, rtol=1e-11, atol=1e-11)
    # What a GPU takes for the weight, run here on the CPU.
    on_gpu = depthwise._stock_weight_gradient(rows.detach(), gradient, kernel)
    torch.testing.assert_close(on_gpu, expected[1], rtol=1e-11, atol=1e-11)


def test_depthwise_gradients_over_many_slabs() -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv(16, 5)
    rows = torch.randn(2, 24, 24, 24, 16, requires_grad=True)
    stock = F.conv3d(rows.movedim(-1, 1), layer.weight, layer.bias, padding=2, groups=16).movedim(1, -1)
    gradient = torch.randn_like(stock)
    expected = torch.autograd.grad(stock, (layer.weight, rows), gradient)
    computed = torch.autograd.grad(layer(rows), (layer.weight, rows), gradient)
    for ours, wanted in zip(computed, expected, strict=True):
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_depthwise_under_autocast_gives_gradients_in_the_weights_type() -> None:
    layer = DepthwiseConv(4, 5)
    rows = torch.randn(1, 6, 6, 6, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(rows)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_anisotropic_views_have_a_grid_and_table_of_their_own() -> None:
    encoder = HybridEncoder(model_config(4, 6, 12), (16, 24, 40), (8, 8, 8))
    assert encoder.grid == (2, 3, 5)
    views = torch.rand(2, 1, 16, 24, 40)
    assert encoder(views).shape == (2, 30, 12)
    shapes = [tuple(found.shape) for found in encoder.features(views)]
    assert shapes == [(2, 4, 8, 12, 20), (2, 6, 4, 6, 10), (2, 12, 2, 3, 5)]
    table = position_table((2, 3, 5), 12).view(2, 3, 5, 12)
    for axis, part in enumerate(table.split(4, dim=-1)):
        first = part.movedim(axis, 0)[:, 0, 0]
        assert torch.equal(part.movedim(axis, 0), first[:, None, None].expand_as(part.movedim(axis, 0)))
        assert torch.equal(first[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@settings(max_examples=25, deadline=None)
@given(
    grid=grids,
    widths=st.sampled_from([(12,), (3, 12), (5, 7, 24), (4, 6, 8, 12)]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_packed_tokens_equal_masked_whole_grids(
    grid: Size3, widths: tuple[int, ...], shares: list[float], seed: int
) -> None:
    """From one visible token to all, in groups of other counts at once: outputs and every gradient."""
    torch.manual_seed(seed)
    stride, tokens = 2 ** len(widths), int(np.prod(grid))
    encoder = HybridEncoder(model_config(*widths), tuple(stride * size for size in grid), (stride,) * 3).double()
    counts = [1 + int(share * (tokens - 1)) for share in shares]
    visible = [random_masks(2, tokens, count, seed + n)[0].flip(1) for n, count in enumerate(counts)]
    views = [torch.rand(2, 1, *encoder.view, dtype=torch.float64, requires_grad=True) for _ in visible]
    packed = encoder.encode_groups(views, visible)
    whole = [encoder.on_whole_grids(*group) for group in zip(views, visible, strict=True)]
    inputs = [*views, *encoder.parameters()]
    weights = [torch.randn_like(group) for group in packed]
    gradients = [torch.autograd.grad(run, inputs, weights) for run in (packed, whole)]
    for ours, reference in zip([*packed, *gradients[0]], [*whole, *gradients[1]], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_all_tokens_shown_equals_nothing_hidden() -> None:
    """Packed tokens against whole grids: other kernels, so the last digits differ."""
    encoder = HybridEncoder(model_config(4, 6, 12), (16, 16, 16), (8, 8, 8))
    views = torch.rand(2, 1, 16, 16, 16)
    everything = torch.arange(8).expand(2, -1)
    torch.testing.assert_close(encoder(views), encoder(views, everything), rtol=1e-5, atol=1e-5)
    shuffled = everything.flip(1)
    torch.testing.assert_close(encoder(views, shuffled), encoder(views).flip(1), rtol=1e-5, atol=1e-5)


def test_recomputation_changes_no_number() -> None:
    results = []
    policies = [policy for policy in get_args(Checkpointing) if policy != "auto"]
    for checkpointing in policies:
        torch.manual_seed(0)
        encoder = HybridEncoder(model_config(4, 6, 12), (16, 16, 16), (8, 8, 8), checkpointing)
        views = torch.rand(2, 1, 16, 16, 16)
        output = encoder(views, random_masks(2, 8, 3, 0)[0])
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in encoder.parameters())])
    assert len(results) == 4
    for plain, *recomputed in zip(*results, strict=True):
        assert plain is not None
        assert all(torch.equal(plain, other) for other in recomputed)


def test_views_of_another_size_are_refused_in_one_line() -> None:
    encoder = HybridEncoder(model_config(4, 6, 12), (16, 16, 16), (8, 8, 8))
    with pytest.raises(ConfigError, match=r"views are \[1, 1, 8, 16, 16\], this encoder takes \[any, 1, 16, 16, 16\]"):
        encoder(torch.rand(1, 1, 8, 16, 16))
    with pytest.raises(ConfigError, match=r"views are torch\.int16: scale HU from the window to \[0, 1\] first"):
        encoder(torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16))


@given(grid=grids, token=st.tuples(sizes, sizes, sizes))
def test_patches_are_blocks_in_row_major_order(grid: Size3, token: Size3) -> None:
    view = tuple(a * b for a, b in zip(grid, token, strict=True))
    views = torch.arange(2 * int(np.prod(view))).float().view(2, 1, *view)
    tokens = patchify(views, token)
    assert torch.equal(unpatchify(tokens, grid, token), views)
    number = 0
    for z in range(grid[0]):
        for y in range(grid[1]):
            for x in range(grid[2]):
                corner = (z * token[0], y * token[1], x * token[2])
                block = views[1, 0][tuple(slice(c, c + t) for c, t in zip(corner, token, strict=True))]
                assert torch.equal(tokens[1, number], block.flatten())
                number += 1


def test_tokens_return_to_grid_order_and_cells_are_their_means() -> None:
    visible, hidden = random_masks(2, 36, 10, 1)
    tokens = torch.randn(2, 36, 5)
    order = torch.cat([visible, hidden], dim=1)
    shuffled = tokens.gather(1, order[..., None].expand(-1, -1, 5))
    assert torch.equal(in_grid_order(shuffled, visible, hidden), tokens)
    pooled = pool_cells(tokens, (2, 6, 3), (2, 3, 1))
    grid = tokens.view(2, 2, 6, 3, 5)
    expected = [grid[:, z, 2 * y : 2 * y + 2].mean(dim=(1, 2)) for z in range(2) for y in range(3)]
    torch.testing.assert_close(pooled, torch.stack(expected, dim=1))
