"""Backbones by libraries: exact masks, the stock networks' numbers and names, and one line where sizes are wrong."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, PretrainConfig, ResEncConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError
from mim_scale.methods.build import build_method
from mim_scale.models.build import build_encoder
from mim_scale.models.encoder import Encoder
from mim_scale.models.patches import gather_tokens
from tests.models.small_backbones import (
    SIZES,
    called_modules,
    masks_of,
    model_section,
    resenc_by_hand,
    small_encoder,
    stock_primus,
    stock_resenc,
    stock_swin,
    views_of,
    vit_by_torch,
    voxels_of,
)
from tests.models.small_methods import method_config

DROPPING = ("vit", "primus", "resenc")
FILLING = ("vit", "swin")
WAYS = [(name, "dropped") for name in DROPPING] + [(name, "filled") for name in FILLING]
POLICIES: tuple[Checkpointing, ...] = ("stem", "second", "all")


def visible_tokens(encoder: Encoder, views: int) -> int:
    return encoder.grid[0] * encoder.grid[1] * encoder.grid[2] // 4 + 1


def encode(encoder: Encoder, way: str, views: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    if way == "dropped":
        return encoder(views, visible)
    return encoder.encode_filled(views, hidden, torch.linspace(-1, 1, encoder.mask_width, dtype=views.dtype))


@pytest.mark.parametrize(("backbone", "way"), WAYS)
def test_hidden_voxels_have_no_influence(backbone: str, way: str) -> None:
    encoder, views = small_encoder(backbone), views_of(backbone)
    visible, hidden = masks_of(encoder, 2, visible_tokens(encoder, 2))
    inside = voxels_of(encoder, hidden)
    assert 0 < inside.sum() < inside.numel()
    expected = encode(encoder, way, views, visible, hidden)
    for noise in (torch.randn_like(views) * 1e3, torch.full_like(views, torch.nan)):
        assert torch.equal(encode(encoder, way, torch.where(inside, noise, views), visible, hidden), expected)
    changed = torch.where(inside, views, views + 0.1 * torch.randn_like(views))
    assert not torch.isclose(encode(encoder, way, changed, visible, hidden), expected).any(dim=(0, 1)).all()
    views.requires_grad_()
    found = encode(encoder, way, views, visible, hidden)
    (found * torch.randn_like(found)).sum().backward()
    assert views.grad is not None
    assert (views.grad[inside] == 0).all()
    assert (views.grad[~inside] != 0).float().mean() > 0.9


@pytest.mark.parametrize("backbone", DROPPING)
def test_all_tokens_visible_is_nothing_hidden(backbone: str) -> None:
    encoder, views = small_encoder(backbone), views_of(backbone)
    visible, _ = masks_of(encoder, 2, encoder.grid[0] * encoder.grid[1] * encoder.grid[2])
    torch.testing.assert_close(encoder(views, visible), gather_tokens(encoder(views), visible), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backbone", FILLING)
def test_nothing_filled_is_nothing_hidden(backbone: str) -> None:
    encoder, views = small_encoder(backbone), views_of(backbone)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    filled = encoder.encode_filled(views, nothing, torch.ones(encoder.mask_width, dtype=torch.float64))
    torch.testing.assert_close(filled, encoder(views), rtol=1e-9, atol=1e-11)


def test_vit_is_the_transformer_of_torch() -> None:
    encoder, views = small_encoder("vit"), views_of("vit")
    visible, hidden = masks_of(encoder, 2, 7)
    every, mask_token = torch.arange(24).expand(2, -1), torch.randn(24, dtype=torch.float64)
    with torch.no_grad():
        for found, of, filled in [
            (encoder(views), every, None),
            (encoder(views, visible), visible, None),
            (encoder.encode_filled(views, hidden, mask_token), every, hidden),
        ]:
            expected = vit_by_torch(encoder, views, of, filled, mask_token)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_primus_is_the_librarys() -> None:
    encoder, views = small_encoder("primus"), views_of("primus")
    stock = stock_primus(24, 3, 2, *SIZES["primus"][1:]).double()
    missing = stock.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith(("up_projection.", "mask_token")) for name in missing.missing_keys)
    with torch.no_grad():
        torch.testing.assert_close(stock.up_projection(encoder.features(views)[0]), stock(views))
        visible, _ = masks_of(encoder, 2, 7)
        found = encoder(views, visible)
        embedded = stock.down_projection(views).flatten(2).mT + stock.eva.pos_embed
        for view, row in enumerate(visible):
            tokens = embedded[view : view + 1, row]
            for block in stock.eva.blocks:
                tokens = block(tokens, rope=stock.eva.rope.get_embed()[row])
            torch.testing.assert_close(found[view : view + 1], stock.eva.norm(tokens), rtol=1e-9, atol=1e-10)


def test_resenc_is_nnunets_and_its_masks_are_exact() -> None:
    encoder, views = small_encoder("resenc"), views_of("resenc")
    stock = stock_resenc([8, 12, 12], [1, 2, 1]).double().encoder
    second = stock.load_state_dict(encoder.state_dict(), strict=False).missing_keys
    assert all(".all_modules." in name for name in second)
    visible, _ = masks_of(encoder, 2, 7)
    with torch.no_grad():
        for ours, theirs in zip(encoder.features(views), stock(views), strict=True):
            torch.testing.assert_close(ours, theirs)
        found, shown = encoder(views, visible), voxels_of(encoder, visible)
        for view, row in enumerate(visible):
            last = resenc_by_hand(encoder, views[view], shown[view, 0])[-1]
            torch.testing.assert_close(found[view], last.flatten(1).mT[row], rtol=1e-8, atol=1e-10)
    twin = copy.deepcopy(encoder)
    assert torch.equal(twin(views, visible), found)
    assert not {id(part) for part in twin.modules()} & {id(part) for part in encoder.modules()}


def test_swin_is_monais() -> None:
    encoder, views = small_encoder("swin"), views_of("swin")
    stock = stock_swin().double()
    missing = stock.load_state_dict(encoder.state_dict(), strict=False)
    assert not missing.unexpected_keys
    _, hidden = masks_of(encoder, 2, 2)
    mask_token = torch.randn(12, dtype=torch.float64)

    def fill(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        inside = voxels_of(encoder, hidden)  # A patch is a voxel here.
        return torch.where(inside, mask_token[:, None, None, None], embedded)

    with torch.no_grad():
        for ours, theirs in zip(encoder.features(views), stock.swinViT(views), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(encoder(views), stock.swinViT(views)[-1].flatten(2).mT)
        stock.swinViT.patch_embed.register_forward_hook(fill)
        filled = encoder.encode_filled(views, hidden, mask_token)
        torch.testing.assert_close(filled, stock.swinViT(views)[-1].flatten(2).mT)


def test_names_are_those_of_the_stock_networks() -> None:
    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in module.state_dict().items()}

    primus = shapes(stock_primus(24, 3, 2, *SIZES["primus"][1:]))
    kept = {name: shape for name, shape in primus.items() if not name.startswith(("up_projection.", "mask_token"))}
    assert shapes(small_encoder("primus")) == kept
    resenc = shapes(stock_resenc([8, 12, 12], [1, 2, 1]))
    kept = {
        name.removeprefix("encoder."): shape
        for name, shape in resenc.items()
        if name.startswith("encoder.") and ".all_modules." not in name
    }
    assert shapes(small_encoder("resenc")) == kept
    swin = shapes(stock_swin())
    kept = {
        name: shape
        for name, shape in swin.items()
        if name.startswith("swinViT.") and not name.endswith(".relative_position_index")
    }
    assert shapes(small_encoder("swin")) == kept


def test_stock_sizes_have_the_stock_number_of_weights() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    features, blocks = [32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6]
    with torch.device("meta"):
        config = ResEncConfig(backbone="resenc", features=tuple(features), blocks=tuple(blocks))
        resenc = count(build_encoder(config, (160, 160, 160), (32, 32, 32)))
        assert resenc == count(stock_resenc(features, blocks).encoder)
        section = model_section("primus", width=864, depth=16, heads=12)
        primus = count(build_encoder(section, (160, 160, 160), (8, 8, 8)))
        stock = stock_primus(864, 16, 12, (160, 160, 160), (8, 8, 8))
        assert primus == count(stock.down_projection) + count(stock.eva)
    assert 90e6 < resenc < 95e6
    assert 145e6 < primus < 155e6


@pytest.mark.parametrize("backbone", DROPPING)
def test_groups_of_differing_visible_tokens_are_as_one_by_one(backbone: str) -> None:
    encoder = small_encoder(backbone)
    views = [views_of(backbone, count, seed) for seed, count in enumerate((2, 1, 3))]
    visible = [masks_of(encoder, len(v), number, number)[0] for v, number in zip(views, (5, 9, 5), strict=True)]
    together = encoder.encode_groups(views, visible)
    for found, view, shown in zip(together, views, visible, strict=True):
        for number in range(len(view)):
            alone = encoder(view[number : number + 1], shown[number : number + 1])
            torch.testing.assert_close(found[number : number + 1], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("backbone", "way"), WAYS)
def test_checkpointing_changes_memory_and_no_gradient(backbone: str, way: str) -> None:
    def run(policy: Checkpointing) -> tuple[int, dict[str, Tensor]]:
        encoder = small_encoder(backbone, policy)
        visible, hidden = masks_of(encoder, 2, visible_tokens(encoder, 2))
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = encode(encoder, way, views_of(backbone), visible, hidden)
        (found * torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)).sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        assert len(gradients) == len(list(encoder.parameters()))
        return sum(kept.values()), gradients

    kept, expected = run("none")
    for policy in POLICIES:
        kept_now, gradients = run(policy)
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), (policy, name)
        less = policy != "stem" or backbone == "resenc"
        assert (kept_now < 0.9 * kept) == less, (policy, kept_now / kept)


@pytest.mark.parametrize(("backbone", "way"), WAYS)
def test_every_weight_is_used_inside_a_call_of_its_owner(backbone: str, way: str) -> None:
    """What ZeRO-3 needs: it gathers a module's weights when that module is called."""
    encoder, views = small_encoder(backbone), views_of(backbone)
    visible, hidden = masks_of(encoder, 2, visible_tokens(encoder, 2))
    owners = {name for name, module in encoder.named_modules() if list(module.parameters(recurse=False))}
    assert "" not in owners
    everything = encoder.named_modules(remove_duplicate=False)
    assert len(owners) == sum(bool(list(module.parameters(recurse=False))) for _, module in everything)
    runs: list[Any] = [lambda: encode(encoder, way, views, visible, hidden), lambda: encoder.features(views)]
    if way == "dropped":
        runs.append(lambda: encoder.encode_groups([views], [visible]))
    for run in runs:
        assert owners <= called_modules(encoder, run)


@pytest.mark.parametrize("backbone", SIZES)
def test_weights_follow_torchs_seed_alone(backbone: str) -> None:
    def weights(seed: int, other: int) -> dict[str, Tensor]:
        np.random.seed(other)
        torch.manual_seed(seed)
        return build_encoder(model_section(backbone), *SIZES[backbone][1:]).state_dict()

    first, again, different = weights(3, 0), weights(3, 1), weights(4, 0)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    drawn = [name for name, value in first.items() if not torch.equal(value, different[name])]
    matrices = {name for name, value in first.items() if value.ndim > 1}
    assert set(drawn) >= matrices


@pytest.mark.parametrize(
    ("method", "backbone"), [("mae", "vit"), ("mae", "primus"), ("mae", "resenc"), ("simmim", "swin")]
)
def test_a_methods_weights_follow_the_config_alone(method: str, backbone: str) -> None:
    config = method_config(method, backbone)
    torch.manual_seed(1)
    first = build_method(config).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[name]) for name, value in build_method(config).state_dict().items())


@pytest.mark.parametrize(("backbone", "way"), WAYS)
def test_bf16_stays_close(backbone: str, way: str) -> None:
    encoder, views = small_encoder(backbone).float(), views_of(backbone).float()
    visible, hidden = masks_of(encoder, 2, visible_tokens(encoder, 2))
    with torch.no_grad():
        expected = encode(encoder, way, views, visible, hidden)
        with torch.autocast("cpu", torch.bfloat16):
            found = encode(encoder, way, views, visible, hidden).float()
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backbone", SIZES)
def test_maps_for_a_segmentation_head(backbone: str) -> None:
    encoder, views = small_encoder(backbone), views_of(backbone)
    maps, tokens = encoder.features(views), encoder(views)
    assert tokens.shape == (2, encoder.grid[0] * encoder.grid[1] * encoder.grid[2], encoder.width)
    assert torch.equal(maps[-1].flatten(2).mT, tokens)
    sizes = [tuple(rows.shape[2:]) for rows in maps]
    assert sizes == sorted(sizes, reverse=True)
    assert len(maps) == {"vit": 3, "primus": 1, "resenc": 3, "swin": 5}[backbone]


@pytest.mark.parametrize("backbone", SIZES)
def test_views_of_another_size_are_one_line(backbone: str) -> None:
    encoder = small_encoder(backbone)
    visible, hidden = masks_of(encoder, 1, 1)
    wrong = [torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, *encoder.view), torch.ones(1, 1, *encoder.view).int()]
    for views in wrong:
        runs: list[Any] = [lambda v=views: encoder(v), lambda v=views: encoder.features(v)]
        if backbone in DROPPING:
            runs.append(lambda v=views: encoder.encode_groups([v], [visible]))
        if backbone in FILLING:
            runs.append(lambda v=views: encoder.encode_filled(v, hidden, torch.ones(encoder.mask_width)))
        for run in runs:
            with pytest.raises(ConfigError, match=r"^views are .*") as caught:
                run()
            assert "\n" not in str(caught.value)


def test_swin_says_that_it_cannot_drop() -> None:
    encoder = small_encoder("swin")
    with pytest.raises(ConfigError, match="swin cannot drop hidden tokens"):
        encoder(views_of("swin"), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("method", "backbone", "sections", "words"),
    [
        ("mae", "resenc", {"plan": {"token": 8}}, "this resenc makes tokens of 4 voxels; take token 4"),
        ("simmim", "swin", {"plan": {"token": 16}}, "this swin makes tokens of 32 voxels; take token 32"),
        ("mae", "primus", {"plan": {"view": 18}}, "view [18, 18, 18] is not a multiple of token [4, 4, 4]"),
        ("mae", "primus", {"model": {"heads": 5}}, "width 48 is not a multiple of its heads 5"),
        ("mae", "primus", {"model": {"heads": 6}}, "width 48 with 6 heads makes heads of 8: take a multiple of 6"),
        ("mae", "vit", {"model": {"heads": 7}}, "width 24 is not a multiple of its heads 7"),
        ("mae", "resenc", {"model": {"blocks": [1]}}, "blocks has 1 numbers and features 3"),
        ("simclr", "resenc", {"plan": {"view": 4}}, "is a single token of 4 voxels"),
        ("simmim", "swin", {"model": {"heads": [1, 2, 2, 5]}}, "the width of stage 4, 96 is not a multiple of"),
        ("simmim", "swin", {"model": {"depths": [1, 1]}}, "model.depths is [1, 1]: value should have at least 4 items"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(
    method: str, backbone: str, sections: dict[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        method_config(method, backbone, **sections)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "backbone", "words"),
    [
        ("mae", "swin", "mae drops hidden tokens, which backbone swin cannot do exactly: take hybrid or vit or primus"),
        ("mask_in_mask", "swin", "mask_in_mask drops hidden tokens, which backbone swin cannot do exactly"),
        *[
            ("simmim", other, f"which backbone {other} cannot do exactly: take vit or swin")
            for other in ("hybrid", "primus", "resenc")
        ],
    ],
)
def test_a_pair_that_cannot_work_is_one_line(method: str, backbone: str, words: str) -> None:
    plan = {"box": 64, "crop": None if method == "mask_in_mask" else 64, "view": 64} if backbone == "swin" else {}
    with pytest.raises(ConfigError) as caught:
        method_config(method, backbone, plan=plan)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vit_may_have_any_width() -> None:
    values = config_values(method_config("mae", "vit"))
    values["model"] |= {"width": 32}
    encoder = build_method(check_config(PretrainConfig, values, "test")).encoder
    assert encoder(torch.rand(1, 1, 16, 16, 16)).shape == (1, 64, 32)


def test_libraries_wait_for_their_backbone_and_need_no_torchvision() -> None:
    script = """
import sys
sys.modules["torchvision"] = None
import mim_scale.models.build, mim_scale.methods.build
heavy = {"timm", "monai", "dynamic_network_architectures", "huggingface_hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import mim_scale.models.primus
assert "timm" in sys.modules
assert not [name for name in sys.modules if name.startswith("torchvision")]
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("mim_scale")]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
