"""Packed tokens by both of their ways: windows with a rim, and whole grids; against plain loops and stock layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mim_scale.config import Size3
from mim_scale.models import depthwise, packed
from mim_scale.models.depthwise import DepthwiseConv
from mim_scale.models.hybrid import HybridEncoder
from mim_scale.models.packed import Places, Standing, Windows, places, standing, windows
from mim_scale.models.patches import patchify, unpatchify, visible_grid
from tests.models.small import model_config, random_masks

RIM = 2
sizes = st.integers(1, 3)
grids = st.tuples(sizes, sizes, sizes)


def draw_tokens(views: int, grid: Size3, share: float, seed: int) -> Tensor:
    """Some tokens of all views, at least one, in no order."""
    every = views * math.prod(grid)
    order = torch.randperm(every, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(share * every))]


def numbered_grids(tokens: Tensor, views: int, grid: Size3, positions: int) -> Tensor:
    """Whole grids [B, Z, Y, X] that hold each visible position's packed row, -1 where hidden: by plain loops."""
    held = torch.full((views, *(count * positions for count in grid)), -1)
    row = 0
    for token in tokens.tolist():
        view, inner = divmod(token, math.prod(grid))
        z, rest = divmod(inner, grid[1] * grid[2])
        y, x = divmod(rest, grid[2])
        cube = torch.arange(row, row + positions**3).view(positions, positions, positions)
        corner = [slice(at * positions, (at + 1) * positions) for at in (z, y, x)]
        held[view][tuple(corner)] = cube
        row += positions**3
    return held


@settings(max_examples=30, deadline=None)
@given(
    grid=grids,
    views=st.integers(1, 2),
    positions=st.sampled_from([1, 2, 4]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_indices_are_those_of_plain_loops(grid: Size3, views: int, positions: int, share: float, seed: int) -> None:
    tokens = draw_tokens(views, grid, share, seed)
    held = numbered_grids(tokens, views, grid, positions)
    rows = torch.arange(len(tokens) * positions**3).view(-1, positions, positions, positions, 1)
    spread = places(tokens, views, grid, positions).spread(rows + 1)
    assert torch.equal(spread[..., 0] - 1, held)
    rim = min(RIM, positions)
    found = windows(tokens, views, grid, positions, rim)
    wide = F.pad(held, (rim,) * 6, value=-1)
    for number, token in enumerate(tokens.tolist()):
        view, inner = divmod(token, math.prod(grid))
        corner = [inner // (grid[1] * grid[2]), inner // grid[2] % grid[1], inner % grid[2]]
        cut = wide[view][tuple(slice(at * positions, (at + 1) * positions + 2 * rim) for at in corner)]
        expected = torch.where(cut < 0, rows.numel(), cut)
        assert torch.equal(found.index[number].view(cut.shape), expected)


@settings(max_examples=40, deadline=None)
@given(
    grid=grids,
    views=st.integers(1, 2),
    positions=st.sampled_from([1, 2, 4, 8]),
    channels=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_both_ways_are_the_stock_convolution_with_zeros_where_hidden(
    grid: Size3, views: int, positions: int, channels: int, share: float, seed: int
) -> None:
    """Outputs and all gradients, in double precision, from one token to all of them."""
    torch.manual_seed(seed)
    tokens = draw_tokens(views, grid, share, seed)
    layer = DepthwiseConv(channels, 2 * RIM + 1).double()
    shape = (len(tokens), *[positions] * 3, channels)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(shape, dtype=torch.float64)
    inputs = (rows, layer.weight, layer.bias)
    held = numbered_grids(tokens, views, grid, positions)
    filled = torch.cat([rows.reshape(-1, channels), rows.new_zeros(1, channels)])[held]
    stock = F.conv3d(filled.movedim(-1, 1), layer.weight, layer.bias, padding=RIM, groups=channels).movedim(1, -1)
    order = held.flatten().argsort()[-rows.numel() // channels :]
    expected = stock.reshape(-1, channels)[order].view(shape)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    ways: list[Standing] = [places(tokens, views, grid, positions)]
    if positions >= RIM:
        ways.append(windows(tokens, views, grid, positions, RIM))
    for way in ways:
        ours = layer(rows, way)
        found = torch.autograd.grad(ours, inputs, gradient)
        for computed, right in zip([ours, *found], [expected, *wanted], strict=True):
            torch.testing.assert_close(computed, right, rtol=1e-11, atol=1e-11)
        again = layer(rows, way)
        assert all(
            torch.equal(*pair)
            for pair in zip([ours, *found], [again, *torch.autograd.grad(again, inputs, gradient)], strict=True)
        )


def test_many_windows_and_stacks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than are cut at once, and a last stack that is not full, in single precision."""
    torch.manual_seed(0)
    tokens = draw_tokens(2, (4, 4, 4), 0.55, 0)
    monkeypatch.setattr(depthwise, "WINDOW_TOKENS", 16)
    monkeypatch.setattr(depthwise, "STACK_POSITIONS", 9 * 64)
    layer = DepthwiseConv(16, 5)
    rows = torch.randn(len(tokens), 4, 4, 4, 16, requires_grad=True)
    assert len(tokens) % 9
    assert len(tokens) > 64
    results = []
    for way in (places(tokens, 2, (4, 4, 4), 4), windows(tokens, 2, (4, 4, 4), 4, 2)):
        output = layer(rows, way)
        results.append([output, *torch.autograd.grad(output, (rows, layer.weight, layer.bias), rows.detach().sin())])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 1e-5 * reference.abs().max()


def test_windows_under_autocast_give_gradients_in_the_weights_type() -> None:
    torch.manual_seed(0)
    tokens = draw_tokens(1, (2, 2, 2), 0.5, 0)
    layer, rows = DepthwiseConv(8, 5), torch.randn(len(tokens), 4, 4, 4, 8, requires_grad=True)
    found = []
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            result = layer(rows, windows(tokens, 1, (2, 2, 2), 4, 2))
        assert result.dtype == (torch.bfloat16 if narrow else torch.float32)
        found.append(torch.autograd.grad(result.float().square().mean(), (rows, layer.weight)))
    for wide, small in zip(*found, strict=True):
        assert small.dtype == torch.float32
        assert (wide - small).norm() < 0.02 * wide.norm()


def test_the_way_is_the_quicker_one() -> None:
    for share, positions, kind in (
        (0.4, 8, Windows),
        (0.9, 8, Places),
        (0.4, 4, Windows),
        (0.5, 2, Places),
        (0.1, 1, Places),
    ):
        found = standing(draw_tokens(1, (4, 4, 4), share, 0), 1, (4, 4, 4), positions, 2)
        assert isinstance(found, kind), (share, positions)


@settings(max_examples=10, deadline=None)
@given(
    grid=grids.filter(lambda grid: math.prod(grid) > 1),
    widths=st.sampled_from([(3, 5, 6, 12), (8, 4, 16, 24), (6, 9, 3, 12)]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    way=st.sampled_from(["windows", "grids", "as measured"]),
    seed=st.integers(0, 99),
)
def test_encoder_on_packed_tokens_equals_masked_whole_grids(
    grid: Size3, widths: tuple[int, ...], shares: list[float], way: str, seed: int
) -> None:
    """At 16^3 tokens (f = 8, 4, 2), float32: outputs, every gradient; noise where hidden changes nothing."""
    torch.manual_seed(seed)
    tokens = math.prod(grid)
    encoder = HybridEncoder(model_config(*widths), tuple(16 * size for size in grid), (16, 16, 16))
    counts = [1 + round(share * (tokens - 1)) for share in shares]
    visible = [random_masks(2, tokens, count, seed + number)[0] for number, count in enumerate(counts)]
    views = [torch.rand(2, 1, *encoder.view) for _ in visible]
    share = {"windows": 2.0, "grids": 0.0, "as measured": None}[way]
    with pytest.MonkeyPatch.context() as patch:
        if share is not None:
            patch.setattr(packed, "WINDOWS_BELOW", tuple((positions, share) for positions in (8, 4, 2)))
        outputs = encoder.encode_groups(views, visible)
        noisy = []
        for inner, shown in zip(views, visible, strict=True):
            mask = visible_grid(shown, grid, inner.dtype).view(2, -1, 1)
            noise = 100 * torch.randn(2, tokens, 16**3) * (1 - mask)
            noisy.append(unpatchify(patchify(inner, encoder.token) * mask + noise, grid, encoder.token))
        again = encoder.encode_groups(noisy, visible)
        assert all(torch.equal(*pair) for pair in zip(outputs, again, strict=True))
        weights = [torch.randn_like(output) for output in outputs]
        found = torch.autograd.grad(outputs, list(encoder.parameters()), weights)
        repeated = torch.autograd.grad(again, list(encoder.parameters()), weights)
    assert all(torch.equal(*pair) for pair in zip(found, repeated, strict=True))
    whole = [encoder.on_whole_grids(*group) for group in zip(views, visible, strict=True)]
    wanted = torch.autograd.grad(whole, list(encoder.parameters()), weights)
    pairs = list(zip([*outputs, *found], [*whole, *wanted], strict=True))
    largest = max(float(reference.detach().norm()) for _, reference in pairs)
    for ours, reference in pairs:
        # What cancels to nearly nothing is as exact as what it is the rest of.
        assert (ours - reference).norm() <= 1e-5 * (reference.norm() + 0.01 * largest)
