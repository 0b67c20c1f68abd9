"""What is done to a view is what its draws say, and nothing else decides it."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from mim_scale.methods.augment import BLUR_REACH, augment
from mim_scale.sampling.plan import AUGMENT_DRAWS, DRAW_LIMIT

HALF, LAST = DRAW_LIMIT // 2, DRAW_LIMIT - 1
CONTRAST, BRIGHTNESS, HAS_GAMMA, GAMMA, HAS_BLUR, BLUR, HAS_NOISE, NOISE, WHICH = range(3, AUGMENT_DRAWS)


def some_views(count: int = 1, size: tuple[int, int, int] = (6, 10, 8)) -> Tensor:
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(5)) * 0.5 + 0.25


def no_change(**drawn: int) -> Tensor:
    """Draws [1, AUGMENT_DRAWS] that leave a view as it is, but for those given by place."""
    draws = torch.full((1, AUGMENT_DRAWS), HALF, dtype=torch.int64)
    for name, value in drawn.items():
        draws[0, int(name.removeprefix("at"))] = value
    return draws


def with_draws(values: dict[int, int]) -> Tensor:
    return no_change(**{f"at{place}": value for place, value in values.items()})


def random_draws(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, DRAW_LIMIT, (count, AUGMENT_DRAWS)))


def test_draws_in_the_middle_change_nothing() -> None:
    views = some_views()
    torch.testing.assert_close(augment(views, with_draws({})), views, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axes", [(2,), (3,), (4,), (2, 4), (2, 3, 4)])
def test_flips_do_what_they_say(axes: tuple[int, ...]) -> None:
    views = some_views()
    flipped = augment(views, with_draws({axis - 2: HALF - 1 for axis in axes}))
    torch.testing.assert_close(flipped, views.flip(axes), rtol=0, atol=1e-6)


@pytest.mark.parametrize("drawn", [0, HALF // 2, LAST])
def test_intensities_change_as_their_draws_say(drawn: int) -> None:
    views, share = some_views(), drawn / DRAW_LIMIT
    mean = views.double().mean()
    contrast = (views - mean) * (0.75 + 0.5 * share) + mean
    np.testing.assert_allclose(augment(views, with_draws({CONTRAST: drawn})), contrast.clamp(0, 1), atol=1e-5)
    brightness = views - 0.1 + 0.2 * share
    np.testing.assert_allclose(augment(views, with_draws({BRIGHTNESS: drawn})), brightness.clamp(0, 1), atol=1e-5)
    gamma = views ** (0.7 + 0.8 * share)
    np.testing.assert_allclose(augment(views, with_draws({HAS_GAMMA: 0, GAMMA: drawn})), gamma, atol=1e-5)


@pytest.mark.parametrize("drawn", [0, HALF, LAST])
def test_blur_is_a_gaussian(drawn: int) -> None:
    views = some_views()
    blurred = augment(views, with_draws({HAS_BLUR: 0, BLUR: drawn}))[0, 0].double().numpy()
    sigma = 0.3 + 1.2 * drawn / DRAW_LIMIT
    expected = gaussian_filter(views[0, 0].double().numpy(), sigma, radius=BLUR_REACH, mode="nearest")
    np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_noise_is_noise() -> None:
    flat = torch.full((1, 1, 24, 24, 24), 0.5)
    found = [
        augment(flat, with_draws({HAS_NOISE: 0, NOISE: LAST, WHICH: which}))[0, 0] - 0.5 for which in (0, 1, 10**6)
    ]
    for noise in found:
        assert abs(float(noise.mean())) < 0.002
        assert float(noise.std()) == pytest.approx(0.05, rel=0.03)
        assert float((noise.abs() > 0.1).float().mean()) == pytest.approx(0.045, abs=0.01)
        for axis in range(3):
            neighbours = noise.narrow(axis, 0, 23).flatten(), noise.narrow(axis, 1, 23).flatten()
            assert abs(float(torch.corrcoef(torch.stack(neighbours))[0, 1])) < 0.04
    between = torch.corrcoef(torch.stack([noise.flatten() for noise in found])) - torch.eye(3)
    assert between.abs().max() < 0.04


def test_a_view_depends_on_its_own_draws_alone() -> None:
    views, draws = some_views(5), random_draws(5)
    together = augment(views, draws)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert torch.equal(augment(views, draws), together)
    assert torch.equal(torch.random.get_rng_state(), state)
    for view in range(5):
        alone = augment(views[view : view + 1], draws[view : view + 1])
        torch.testing.assert_close(alone, together[view : view + 1], rtol=0, atol=1e-6)
    assert 0 <= together.min() < together.max() <= 1
    others = augment(views, random_draws(5, seed=1))
    assert (others - together).abs().mean(dim=(1, 2, 3, 4)).min() > 1e-3


def test_every_draw_is_read() -> None:
    views = some_views()
    on = {HAS_GAMMA: 0, HAS_BLUR: 0, HAS_NOISE: 0}
    first = augment(views, with_draws(on))
    for place in range(AUGMENT_DRAWS):
        changed = with_draws({**on, place: 0 if place < 3 else LAST})
        assert not torch.equal(augment(views, changed), first), place


def test_extreme_draws_stay_in_range() -> None:
    views = torch.cat([torch.zeros(1, 1, 6, 6, 6), torch.ones(1, 1, 6, 6, 6), some_views(1, (6, 6, 6))])
    for value in (0, LAST):
        changed = augment(views, torch.full((3, AUGMENT_DRAWS), value))
        assert torch.isfinite(changed).all()
        assert 0 <= changed.min() <= changed.max() <= 1
