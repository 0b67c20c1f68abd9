"""Views in chunks: the same loss and the same gradients as all at once, whatever the chunks cut through."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_scale.config import PretrainConfig
from mim_scale.methods.build import build_method
from mim_scale.methods.masked import cut
from mim_scale.methods.views import make_views
from tests.models.small import changed, small_batch, small_config

LEVELS = [{"hidden_ratio": [0.25, 0.8], "cells": 2}, {"hidden_ratio": [0.2, 0.8], "views": 2}, {"hidden_ratio": 0.5}]


def ragged_config(**train: Any) -> PretrainConfig:
    """Samples that hide different numbers of tokens."""
    return changed(small_config(), plan={"levels": LEVELS}, train=train)


def run(config: PretrainConfig, samples: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    method = build_method(config).double()
    method.encoder.position_table = method.encoder.position_table.double()
    batch = small_batch(config, samples)
    with torch.no_grad():
        views = [level.double() for level in make_views(batch, config.plan, config.data.window_hu)]
    losses = method.losses(views, batch.levels)
    (losses.total * 0.5).backward()
    values = {name: float(part.detach()) for name, part in losses.parts.items()} | {
        "loss": float(losses.total.detach())
    }
    return values, {name: parameter.grad for name, parameter in method.named_parameters()}


@settings(max_examples=12, deadline=None)
@given(at_once=st.integers(1, 15), samples=st.integers(1, 3), stage=st.sampled_from([1, 3]))
def test_loss_and_gradients_are_those_of_all_at_once(at_once: int, samples: int, stage: int) -> None:
    values, gradients = run(ragged_config(), samples)
    assert list(values) == ["level_1", "level_2", "level_3", "alignment_1_2", "alignment_2_3", "loss"]
    config = ragged_config(views_at_once=at_once)
    # Refused in a run, whose ranks would meet at other layers; chunks compute the same all the same.
    config = config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": stage})})
    cut_values, cut_gradients = run(config, samples)
    assert cut_values.keys() == values.keys()
    for name, value in values.items():
        assert cut_values[name] == pytest.approx(value, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-9, atol=1e-14)


def test_chunks_hold_every_view_once_and_in_order() -> None:
    config = ragged_config()
    batch = small_batch(config, 4)
    views = make_views(batch, config.plan, config.data.window_hu)
    for at_once in (1, 2, 3, 5, None):
        chunks = cut(views, batch.levels, at_once)
        seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for chunk in chunks:
            sizes = [piece.group.views.stop - piece.group.views.start for piece in chunk]
            assert at_once is None or sum(sizes) <= at_once
            for piece in chunk:
                assert torch.equal(piece.views, views[piece.level][piece.group.views])
                tokens = torch.cat([piece.group.visible, piece.group.hidden], dim=1)
                assert torch.equal(tokens, batch.levels[piece.level].tokens.flatten(0, 1)[piece.group.views])
                seen[piece.level] += range(piece.group.views.start, piece.group.views.stop)
        assert [seen[level] == list(range(len(views[level]))) for level in range(3)] == [True] * 3
    assert len({level.num_visible for level in batch.levels}) == 3
    assert len(set(batch.levels[1].num_visible)) > 1


def test_chunks_hold_less_memory_than_all_views() -> None:
    """Counted in what autograd keeps, which is what a chunk is for."""

    def kept(config: PretrainConfig) -> int:
        method, batch, most, held = build_method(config), small_batch(config, 2), 0, 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal most, held
            held += tensor.numel()
            most = max(most, held)
            return tensor

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held -= tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            method(batch).total.backward()
        return most

    plain = {"activation_checkpointing": "none"}
    assert kept(changed(small_config(), train={**plain, "views_at_once": 2})) < 0.35 * kept(
        changed(small_config(), train=plain)
    )
