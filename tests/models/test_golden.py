"""The network against numbers of the method's own release (tests/golden/extract.py says how they were made).

The measure is the largest |difference| over the largest |value| of an array, and the same for its sums; losses are
relative. All is float32, as the reference is. The base network's other ratios and all its 21 views are in `make soak`.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_scale.methods.targets import hidden_targets
from mim_scale.methods.views import cut_regions, resize
from mim_scale.models.patches import in_grid_order, pool_cells
from mim_scale.models.positions import position_table
from mim_scale.transfer.released import released_names
from tests.golden_numbers import Golden, channels_first, golden_method, golden_output, golden_volume, unit

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RATIOS = ("0.0", "0.5", "0.6", "0.75")


def volumes(tag: str, count: int, size: int) -> Tensor:
    return torch.from_numpy(np.stack([golden_volume(tag, sample, size) for sample in range(count)]))[:, None]


def module_input(tag: str, *shape: int) -> Tensor:
    return torch.from_numpy(unit(tag, *shape).astype(np.float32))


@torch.no_grad()
def test_every_module_gives_the_golden_output() -> None:
    golden, method = Golden("tiny"), golden_method("tiny")
    encoder = method.encoder
    rows = module_input("mod:patch_embed1", 2, 1, 16, 16, 16).movedim(1, -1)
    assert golden.error("mod.patch_embed1", channels_first(encoder.embeds[0](rows))) < TOLERANCE
    rows = module_input("mod:blocks1.0", 2, 12, 8, 8, 8).movedim(1, -1).contiguous()
    visible = golden.ids("mod.cblock_mask_1_is_visible").float()
    block = encoder.stages[0][0]
    assert golden.error("mod.cblock_masked", channels_first(block(rows, visible))) < TOLERANCE
    assert golden.error("mod.cblock_unmasked", channels_first(block(rows, None))) < TOLERANCE
    assert golden.error("mod.block4_0", encoder.blocks[0](module_input("mod:blocks4.0", 2, 20, 96))) < TOLERANCE
    decoded = method.decoder.blocks[0](module_input("mod:decoder_blocks.0", 1, 10, 576))
    assert golden.error("mod.dec_block0", decoded) < TOLERANCE
    aggregated = method.alignment["1_2"].child(module_input("mod:aggregate_mid", 3, 576))
    assert golden.error("mod.mlp_aggregate_mid", aggregated) < TOLERANCE
    assert golden.error("pos_embed", position_table((6, 6, 6), 96)[None]) < 1e-6
    assert golden.error("decoder_pos_embed", position_table((6, 6, 6), 576)[None]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "count", "ratio"),
    [
        *[("tiny", 2, ratio) for ratio in RATIOS],
        ("base", 1, "0.6"),
        *[pytest.param("base", 1, ratio, marks=pytest.mark.soak) for ratio in RATIOS if ratio != "0.6"],
    ],
)
def test_every_activation_and_loss_of_a_view_is_golden(size: str, count: int, ratio: str) -> None:
    golden, method = Golden(size), golden_method(size)
    name, encoder, views = f"view{ratio}", method.encoder, volumes("input96", count, 96)
    visible, hidden = golden.masks(name)
    rows = views.movedim(1, -1)
    *stages, embedded = encoder.stage_rows(views, visible)
    for number, stage in enumerate(stages, start=1):
        rows = encoder.embeds[number - 1](rows)
        assert golden.error(f"{name}.act.patch_embed{number}", channels_first(rows)) < TOLERANCE
        assert golden.error(f"{name}.act.blocks{number}", channels_first(stage)) < TOLERANCE
        fused = encoder.fuse(number - 1, stage, None).view(count, 6, 6, 6, -1)
        assert golden.error(f"{name}.act.stage{number}_output_decode", channels_first(fused)) < TOLERANCE
        rows = stage
    assert golden.error(f"{name}.act.patch_embed4", channels_first(embedded)) < TOLERANCE
    assert golden.error(f"{name}.act.blocks4", encoder.transform(embedded, visible)) < TOLERANCE
    latent = encoder(views, visible)
    assert golden.error(f"{name}.latent", latent) < TOLERANCE
    features = in_grid_order(method.decoder([latent], [visible], [hidden])[0], visible, hidden)
    assert golden.error(f"{name}.decoder_feature", features) < TOLERANCE
    assert golden.error(f"{name}.pred", method.decoder.predict(features)) < TOLERANCE
    if len(hidden[0]):
        output, loss = golden_output(method, views, visible, hidden)
        assert float(loss) == pytest.approx(golden.loss(f"{name}.loss", "norm_pix"), rel=TOLERANCE)
        raw = (output.voxels - hidden_targets(views, hidden, (16, 16, 16), normalise=False)).square().mean()
        assert float(raw) == pytest.approx(golden.loss(f"{name}.loss", "raw"), rel=TOLERANCE)


@pytest.mark.parametrize(("size", "count"), [("tiny", 2), ("base", 1)])
def test_every_gradient_is_golden(size: str, count: int) -> None:
    golden, method = Golden(size), golden_method(size)
    _, loss = golden_output(method, volumes("input96", count, 96), *golden.masks("view0.6"))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(golden.about["losses"]["grad.loss"], rel=TOLERANCE)
    ours = {released: name for name, released in released_names(method.config).items()}
    parameters = dict(method.named_parameters())
    stored = [name.removeprefix("grad.") for name in golden.about["arrays"] if name.startswith("grad.")]
    assert len(stored) >= 15
    for name in stored:
        gradient = parameters[ours[name]].grad
        assert gradient is not None
        assert golden.error(f"grad.{name}", gradient) < TOLERANCE, name
    for name, (total, absolute, norm) in golden.about.get("gradients", {}).items():
        stored_as = parameters[ours[name]].grad
        assert stored_as is not None, name
        # Summed in float64: a float32 norm of half a million numbers is itself off by the tolerance.
        gradient = stored_as.double()
        assert abs(float(gradient.sum()) - total) < TOLERANCE * absolute, name
        assert float(gradient.abs().sum()) == pytest.approx(absolute, rel=TOLERANCE), name
        assert float(gradient.norm()) == pytest.approx(norm, rel=TOLERANCE), name


def mim_views(golden: Golden, samples: int) -> list[Tensor]:
    """The three levels' views, cut as the plan would, from the stored cells and tokens."""
    boxes, cells, tokens = (
        volumes("input192", samples, 192),
        golden.ids("mim.cubic.cells"),
        golden.ids("mim.cubic.tokens"),
    )
    octants = torch.stack([cells // 4, cells // 2 % 2, cells % 2], dim=-1) * 96
    inside = torch.stack([tokens // 36, tokens // 6 % 6, tokens % 6], dim=-1) * 16
    deep = (octants.flatten(0, 1)[:, None] + inside).view(samples, -1, 3)
    view = (96, 96, 96)
    return [
        resize(cut_regions(boxes[:, 0], torch.zeros(samples, 1, 3, dtype=torch.int64), (192, 192, 192)), view),
        cut_regions(boxes[:, 0], octants, view),
        resize(cut_regions(boxes[:, 0], deep, (16, 16, 16)), view),
    ]


@torch.no_grad()
@pytest.mark.parametrize("cells", ["cubic", "released"])
@pytest.mark.parametrize(("size", "samples"), [("tiny", 2), pytest.param("base", 1, marks=pytest.mark.soak)])
def test_three_levels_are_golden(size: str, samples: int, cells: str) -> None:
    golden, method = Golden(size), golden_method(size)
    views = mim_views(golden, samples)
    assert golden.error("mim.img_up", views[0]) < 1e-6
    assert golden.error("mim.img_down", views[2]) < 1e-6
    features = []
    for level, level_views in zip(("up", "mid", "down"), views, strict=True):
        visible, hidden = golden.masks(f"mim.{cells}.{level}")
        chunks = zip(level_views.split(4), visible.split(4), hidden.split(4), strict=True)
        outputs = [(*golden_output(method, *chunk), *chunk) for chunk in chunks]
        loss = sum(float(loss) * len(chunk) for _, loss, chunk, *_ in outputs) / len(level_views)
        assert loss == pytest.approx(golden.loss(f"mim.{cells}.loss_{level}", "norm_pix"), rel=TOLERANCE)
        raw = [
            (o.voxels - hidden_targets(v, h, (16, 16, 16), False)).square().mean() * len(v) for o, _, v, _, h in outputs
        ]
        expected = golden.loss(f"mim.{cells}.loss_{level}", "raw")
        assert float(sum(raw)) / len(level_views) == pytest.approx(expected, rel=TOLERANCE)
        features.append(torch.cat([in_grid_order(o.features, s, h) for o, _, v, s, h in outputs]))
    assert golden.error("mim.cubic.pool_mid", features[1].mean(dim=1)) < TOLERANCE
    assert golden.error("mim.cubic.pool_down", features[2].mean(dim=1)) < TOLERANCE
    if cells == "cubic":
        assert golden.error("mim.cubic.pool_up_cells", pool_cells(features[0], (6, 6, 6), (2, 2, 2))) < TOLERANCE
