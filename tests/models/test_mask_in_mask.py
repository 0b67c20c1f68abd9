"""The method: what it cuts, hides, compares and sums, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mim_scale.methods.alignment import Alignment, cosine, infonce
from mim_scale.methods.build import build_method
from mim_scale.methods.masked import Memory, Piece, Prediction
from mim_scale.methods.targets import hidden_targets, trivial_loss
from mim_scale.methods.views import make_views, resize, window
from mim_scale.models.patches import patchify
from tests.golden_numbers import golden_config
from tests.models.small import changed, one_sample, random_masks, small_batch, small_config


def test_views_are_cut_where_the_plan_says() -> None:
    config = small_config()
    batch = small_batch(config, 3)
    views = make_views(batch, config.plan, config.data.window_hu)
    assert [view.shape for view in views] == [(3, 1, 16, 16, 16), (6, 1, 16, 16, 16), (12, 1, 16, 16, 16)]
    scaled = window(batch.blocks, (-1000, 1000))
    assert 0 == scaled.min() < scaled.max() == 1
    halved = scaled.view(3, 16, 2, 16, 2, 16, 2).mean(dim=(2, 4, 6))
    torch.testing.assert_close(views[0][:, 0], halved, rtol=0, atol=2e-7)
    for number in (1, 2):
        region = config.plan.region(number)
        starts = batch.levels[number].starts
        for sample in range(3):
            for view in range(starts.shape[1]):
                where = tuple(slice(s, s + r) for s, r in zip(starts[sample, view].tolist(), region, strict=True))
                expected = resize(scaled[sample][where][None, None], config.plan.view)[0]
                assert torch.equal(views[number][sample * starts.shape[1] + view], expected)


def unit_rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(parents=st.integers(1, 4), children=st.integers(1, 3), cells=st.integers(1, 9), temperature=st.floats(0.05, 2))
def test_alignment_is_the_sum_over_pairs(parents: int, children: int, cells: int, temperature: float) -> None:
    rng = np.random.default_rng(parents * 100 + children * 10 + cells)
    child = rng.normal(size=(parents, children, 7))
    cell = rng.normal(size=(parents, cells, 7))
    label = rng.integers(0, cells, (parents, children))
    contrast, similarity = 0.0, 0.0
    for parent in range(parents):
        for k in range(children):
            scores = [unit_rows(child[parent, k]) @ unit_rows(cell[parent, m]) for m in range(cells)]
            exponents = [np.exp(score / temperature) for score in scores]
            contrast -= np.log(exponents[label[parent, k]] / sum(exponents)) / (parents * children)
            similarity += (2 - 2 * scores[label[parent, k]]) / (parents * children)
    whose = torch.arange(parents).repeat_interleave(children)
    tensors = torch.from_numpy(child).flatten(0, 1), torch.from_numpy(cell), whose, torch.from_numpy(label).flatten()
    assert float(infonce(*tensors, temperature).mean()) == pytest.approx(contrast, rel=1e-9, abs=1e-9)
    assert float(cosine(*tensors).mean()) == pytest.approx(similarity, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["infonce", "cosine"])
def test_alignment_sends_no_gradient_into_the_parent(kind: str) -> None:
    alignment = Alignment(kind, 6, 0.2)  # type: ignore[arg-type]
    children, cells = torch.randn(6, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    alignment(children, cells, torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6, dtype=torch.int64)).sum().backward()
    assert children.grad is not None
    assert cells.grad is None
    assert all(parameter.grad is not None for parameter in alignment.parameters())


@torch.no_grad()
def test_alignment_pairs_a_child_with_the_cell_it_was_cut_from() -> None:
    config = small_config()
    batch = small_batch(config, 2)
    method = build_method(config)
    names = {"1_2": (8, (2, 2, 2)), "2_3": (64, (4, 4, 4))}
    features = [torch.randn(2 * config.plan.num_views(level), 64, 24) for level in range(3)]
    groups = [level.groups()[0] for level in batch.levels]
    pieces = [Piece(number, torch.empty(0), group) for number, group in enumerate(groups)]
    predictions = [Prediction(found, torch.empty(0)) for found in features]
    parts = method.more_losses(pieces, predictions, batch.levels, Memory())
    for number, (pair, (count, cells)) in enumerate(names.items(), start=1):
        parent, child = batch.levels[number - 1], batch.levels[number]
        total, views = 0.0, child.cell.shape[1]
        for sample in range(2):
            for view in range(views):
                above = int(child.parent[view])
                row = sample * parent.tokens.shape[1] + above
                order = parent.tokens[sample, above]
                tokens = torch.empty(64, 24)
                tokens[order] = features[number - 1][row]
                blocks = tokens.view(cells[0], 4 // cells[0], cells[1], 4 // cells[1], cells[2], 4 // cells[2], 24)
                candidates = method.alignment[pair].parent(blocks.mean(dim=(1, 3, 5)).view(count, 24))
                mine = method.alignment[pair].child(features[number][sample * views + view].mean(dim=0))
                logits = torch.nn.functional.cosine_similarity(mine[None], candidates) / config.method.temperature
                total += float(-logits.log_softmax(0)[child.cell[sample, view]]) / (2 * views)
        assert float(parts[f"alignment_{pair}"].detach()) == pytest.approx(total, rel=1e-5)


def test_total_is_the_weighted_sum_and_every_parameter_learns() -> None:
    config = changed(small_config(), method={"level_weights": [1.0, 2.0, 0.5], "alignment_weights": [0.3, 0.7]})
    method = build_method(config)
    losses = method(small_batch(config, 2))
    weights = {"level_1": 1.0, "level_2": 2.0, "level_3": 0.5, "alignment_1_2": 0.3, "alignment_2_3": 0.7}
    assert losses.parts.keys() == weights.keys()
    expected = sum(weight * float(losses.parts[name].detach()) for name, weight in weights.items())
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-6)
    losses.total.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_batch_is_the_mean_of_its_samples() -> None:
    config = small_config()
    method = build_method(config)
    batch = small_batch(config, 3)
    whole = method(batch).parts
    alone = []
    for sample in range(3):
        alone.append(method(one_sample(batch, sample)).parts)
    for name, part in whole.items():
        assert float(part.detach()) == pytest.approx(sum(float(parts[name].detach()) for parts in alone) / 3, rel=1e-5)


def test_alignment_that_weighs_nothing_is_not_built() -> None:
    none = build_method(changed(small_config(), method={"alignment": "none", "alignment_weights": []}))
    assert not any(name.startswith("alignment") for name, _ in none.named_parameters())
    batch = small_batch(none.config, 1)
    assert list(none(batch).parts) == ["level_1", "level_2", "level_3"]
    second = build_method(changed(small_config(), method={"alignment": "cosine", "alignment_weights": [0.0, 0.1]}))
    assert {name.split(".")[1] for name, _ in second.named_parameters() if name.startswith("alignment")} == {"2_3"}
    assert list(second(batch).parts) == ["level_1", "level_2", "level_3", "alignment_2_3"]


def test_weights_depend_on_the_seed_alone() -> None:
    config = small_config()
    torch.manual_seed(1)
    first = build_method(config).state_dict()
    state = torch.random.get_rng_state()
    second = build_method(config).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_method(config.model_copy(update={"seed": 4})).state_dict()
    assert not torch.equal(first["encoder.token_embed.weight"], other["encoder.token_embed.weight"])
    assert not any("position_table" in name for name in first)


@pytest.mark.parametrize(("size", "count"), [("tiny", 39_136_900), ("base", 71_047_696)])
def test_presets_have_the_published_number_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        method = build_method(golden_config(size))
    assert sum(parameter.numel() for parameter in method.parameters()) == count


def test_bf16_autocast_stays_near_fp32() -> None:
    config = small_config()
    method, batch = build_method(config), small_batch(config, 2)
    full = method(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = method(batch)
    assert half.total.dtype == torch.float32
    half.total.backward()
    for name, part in full.parts.items():
        assert float(half.parts[name].detach()) == pytest.approx(float(part.detach()), rel=2e-2)


def test_trivial_loss_on_normalised_targets_is_the_variance_that_is_left() -> None:
    views = torch.rand(2, 1, 8, 8, 8) * 0.01
    views[0, :, :4, :4, :4] = 0.5
    visible, hidden = random_masks(2, 8, 3, 0)
    expected = []
    for view in range(2):
        for token in hidden[view].tolist():
            voxels = patchify(views, (4, 4, 4))[view, token].double().numpy()
            variance = voxels.var(ddof=1)
            expected.append(63 / 64 * variance / (variance + 1e-6))
    loss = trivial_loss(views, visible, hidden, (4, 4, 4), normalise=True, error="l2")
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)


def test_trivial_loss_on_raw_targets_is_the_better_of_two_predictors() -> None:
    token, (visible, hidden) = (4, 4, 4), random_masks(3, 27, 12, 0)
    slope = (torch.arange(12.0).view(12, 1, 1) / 12).expand(3, 1, 12, 12, 12)
    loss = float(trivial_loss(slope, visible, hidden, token, normalise=False, error="l2"))
    tokens = patchify(slope, token)
    shown = tokens.gather(1, visible[..., None].expand(-1, -1, 64)).mean(dim=(1, 2), keepdim=True)
    constant = float((hidden_targets(slope, hidden, token, False) - shown).square().mean())
    assert loss < 0.8 * constant
    noise = torch.rand(3, 27, generator=torch.Generator().manual_seed(0))
    blocks = noise[:, None].view(3, 1, 3, 3, 3)
    jumps = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    means = noise.gather(1, visible).mean(dim=1, keepdim=True)
    constant = float((noise.gather(1, hidden) - means).square().mean())
    assert float(trivial_loss(jumps, visible, hidden, token, normalise=False, error="l2")) <= constant + 1e-7


@pytest.mark.parametrize("normalise", [False, True])
def test_preview_shows_visible_voxels_as_they_are(normalise: bool) -> None:
    config = changed(small_config(), method={"normalise_targets": normalise})
    method, batch = build_method(config), small_batch(config, 2)
    assert method.trivial(batch).keys() == {"level_1", "level_2", "level_3"}
    for number, level in enumerate(method.preview(batch)):
        assert level.input.shape == (2 * config.plan.num_views(number), 16, 16, 16)
        assert level.hidden.mean() == config.plan.num_hidden(number)[0] / 64
        assert (level.masked[level.hidden] == 0).all()
        for picture in (level.masked, level.reconstruction):
            assert (picture[~level.hidden] == level.input[~level.hidden]).all()
        views = make_views(batch, config.plan, config.data.window_hu)[number]
        group = batch.levels[number].groups()[0]
        prediction = method.predict([Piece(number, views, group)])[0].voxels
        if not normalise:
            loss = (prediction - hidden_targets(views, group.hidden, config.plan.token, False)).square().mean()
            wrong = ((level.reconstruction - level.input)[level.hidden] ** 2).mean()
            assert wrong == pytest.approx(float(loss.detach()), rel=1e-4)
