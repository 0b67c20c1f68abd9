"""Mask in Mask: nested levels of views, each reconstructed, neighbouring levels aligned (method: section 1).

The module draws no random number in training: which boxes, cells and tokens is decided by the plan.
N samples, B = N * views of a level, V visible and H hidden tokens, P voxels of a token, D the decoder's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.methods.alignment import Alignment
from mim_scale.methods.targets import at_least_float32, hidden_targets, mean_squared, token_statistics, trivial_loss
from mim_scale.methods.views import make_views
from mim_scale.models.blocks import initialise
from mim_scale.models.decoder import Decoder
from mim_scale.models.hybrid import HybridEncoder
from mim_scale.models.patches import gather_tokens, in_grid_order, patchify, pool_cells, unpatchify, visible_grid
from mim_scale.streaming.device import TensorBatch, TensorLevel


@dataclass(frozen=True)
class Losses:
    """What is minimised, and what it is made of before weighting."""

    total: Tensor
    parts: dict[str, Tensor]
    """`level_1` ... reconstruction, `alignment_1_2` ... of neighbouring levels: scalars."""


@dataclass(frozen=True)
class LevelOutput:
    """What the network says about one level's views."""

    features: Tensor
    """[B, V + H, D] decoder features, visible tokens first."""
    prediction: Tensor
    """[B, H, P] voxels of the hidden tokens, normalised where the targets are."""
    loss: Tensor


@dataclass(frozen=True)
class LevelPreview:
    """One level's views as pictures [views, Z, Y, X], values in [0, 1] but for the prediction's own errors."""

    input: NDArray[np.float32]
    masked: NDArray[np.float32]
    """The input with hidden voxels at 0."""
    reconstruction: NDArray[np.float32]
    """Visible voxels of the input, hidden voxels of the prediction."""
    hidden: NDArray[np.bool_]


class MaskInMask(nn.Module):
    """The method: one encoder and one decoder for all levels. Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config
        plan, model, loss = config.plan, config.model, config.loss
        checkpointing = config.train.activation_checkpointing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = HybridEncoder(model, plan.view, plan.token, checkpointing)
            self.decoder = Decoder(model, plan.grid, plan.token, recompute=checkpointing == "all")
            self.alignment = nn.ModuleDict()
            if loss.alignment != "none":
                for number, weight in enumerate(loss.alignment_weights, start=1):
                    if weight:
                        pair = Alignment(loss.alignment, model.decoder.width, loss.temperature)
                        self.alignment[f"{number}_{number + 1}"] = pair
            initialise(self.alignment)

    def forward(self, batch: TensorBatch) -> Losses:
        """The losses of a micro-batch, means over its samples: micro-batches of equal size average exactly."""
        return self.losses(make_views(batch, self.config.plan, self.config.data.window_hu), batch.levels)

    def losses(self, views: Sequence[Tensor], levels: Sequence[TensorLevel]) -> Losses:
        """The losses of ready views: every level's [B, 1, Z, Y, X], and its indices."""
        visible, hidden = zip(*map(_flat_masks, levels), strict=True)
        outputs = self.run_levels(views, visible, hidden)
        parts = {f"level_{number}": output.loss for number, output in enumerate(outputs, start=1)}
        weights = dict(zip(parts, self.config.loss.level_weights, strict=True))
        if len(self.alignment):
            pair_weights = zip(range(1, len(outputs)), self.config.loss.alignment_weights, strict=True)
            weights |= {f"alignment_{number}_{number + 1}": weight for number, weight in pair_weights}
            parts |= self.align([output.features for output in outputs], levels)
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return Losses(total, parts)

    def run_level(self, views: Tensor, visible: Tensor, hidden: Tensor) -> LevelOutput:
        """Encode, decode, predict and compare views [B, 1, Z, Y, X] with visible [B, V] and hidden [B, H] tokens."""
        return self.run_levels([views], [visible], [hidden])[0]

    def run_levels(
        self, views: Sequence[Tensor], visible: Sequence[Tensor], hidden: Sequence[Tensor]
    ) -> list[LevelOutput]:
        """`run_level` for every level at once: plans do not depend on features, so no level waits for another."""
        latents = self.encoder.encode_groups(views, visible)
        # By a call, not by another method: ZeRO-3 gathers what a module itself owns when it is called.
        features = self.decoder(latents, visible, hidden)
        kept = [found[:, shown.shape[1] :] for found, shown in zip(features, visible, strict=True)]
        rows = torch.cat([part.flatten(0, 1) for part in kept])
        predicted = torch.split(self.decoder.predict(rows), [masked.numel() for masked in hidden])
        outputs = []
        for level_views, masked, found, flat in zip(views, hidden, features, predicted, strict=True):
            prediction = flat.view(*masked.shape, -1)
            targets = hidden_targets(level_views, masked, self.config.plan.token, self.config.loss.normalise_targets)
            outputs.append(LevelOutput(found, prediction, mean_squared(prediction - targets)))
        return outputs

    def align(self, features: Sequence[Tensor], levels: Sequence[TensorLevel]) -> dict[str, Tensor]:
        """The alignment losses by name, from every level's decoder features (visible tokens first)."""
        plan = self.config.plan
        parts = {}
        for number in range(1, len(levels)):
            if f"{number}_{number + 1}" not in self.alignment:
                continue
            parent, child = levels[number - 1], levels[number]
            # Views stand in the order (parent, child), so a parent's children are neighbours.
            children = features[number].mean(dim=1).view(len(features[number - 1]), -1, features[number].shape[-1])
            tokens = in_grid_order(features[number - 1].detach(), *_flat_masks(parent))
            cells = pool_cells(tokens, plan.grid, plan.cells(number - 1))
            # In full precision whatever the network ran in: similarities are divided by a small temperature.
            with torch.autocast(children.device.type, enabled=False):
                parts[f"alignment_{number}_{number + 1}"] = self.alignment[f"{number}_{number + 1}"](
                    at_least_float32(children), at_least_float32(cells), child.cell.view(len(children), -1)
                )
        return parts

    @torch.no_grad()
    def trivial(self, batch: TensorBatch) -> dict[str, Tensor]:
        """What a predictor that has learnt nothing would reach on the same hidden tokens: scalars `level_1` ...

        Raw targets: the better of the view's visible mean and the nearest visible tokens' means. Normalised targets:
        the constant 0. `trivial_loss` has the formulas.
        """
        plan = self.config.plan
        views = make_views(batch, plan, self.config.data.window_hu)
        return {
            f"level_{number}": trivial_loss(
                level_views, *_flat_masks(level), plan.token, self.config.loss.normalise_targets
            )
            for number, (level_views, level) in enumerate(zip(views, batch.levels, strict=True), start=1)
        }

    @torch.no_grad()
    def preview(self, batch: TensorBatch) -> list[LevelPreview]:
        """Every level's views as pictures, samples outermost.

        With normalised targets a prediction has no brightness and contrast of its own: it is drawn with the hidden
        token's own mean and deviation, which the network never saw. With raw targets nothing is borrowed.
        """
        views = make_views(batch, self.config.plan, self.config.data.window_hu)
        return [
            self._preview_level(level_views, *_flat_masks(level))
            for level_views, level in zip(views, batch.levels, strict=True)
        ]

    def _preview_level(self, views: Tensor, visible: Tensor, hidden: Tensor) -> LevelPreview:
        plan = self.config.plan
        prediction = self.run_level(views, visible, hidden).prediction.float()
        voxels = patchify(views, plan.token)
        if self.config.loss.normalise_targets:
            mean, deviation = token_statistics(gather_tokens(voxels, hidden))
            prediction = prediction * deviation + mean
        drawn = voxels.scatter(1, hidden[:, :, None].expand_as(prediction), prediction)
        shown = visible_grid(visible, plan.grid, voxels.dtype).flatten(1)[:, :, None].expand_as(voxels)
        visible_voxels = unpatchify(shown, plan.grid, plan.token)
        reconstruction = unpatchify(drawn, plan.grid, plan.token)
        return LevelPreview(
            _picture(views), _picture(views * visible_voxels), _picture(reconstruction), _picture(visible_voxels) == 0
        )


def _flat_masks(level: TensorLevel) -> tuple[Tensor, Tensor]:
    """(visible, hidden) of every view, samples and views on one axis."""
    return level.visible.flatten(0, 1), level.hidden.flatten(0, 1)


def _picture(views: Tensor) -> NDArray[np.float32]:
    pictures: NDArray[np.float32] = views[:, 0].cpu().numpy()
    return pictures
