"""Mask in Mask: nested levels of views, each reconstructed, neighbouring levels aligned (method: section 1).

All levels go through one encoder and one decoder side by side; what is hidden and where views lie was decided by the
plan. B views of a piece, V visible and H hidden tokens, P voxels of a token, D the decoder's width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, MaskInMaskConfig, PretrainConfig
from mim_scale.methods.alignment import Alignment
from mim_scale.methods.masked import EncoderDecoder, Memory, Piece, Prediction, num_views
from mim_scale.methods.targets import at_least_float32
from mim_scale.models.blocks import initialise
from mim_scale.models.build import build_encoder
from mim_scale.models.decoder import Decoder
from mim_scale.models.patches import in_grid_order, pool_cells
from mim_scale.streaming.device import TensorLevel


class MaskInMask(EncoderDecoder):
    """One encoder and one decoder for all levels. Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig, method: MaskInMaskConfig, checkpointing: Checkpointing) -> None:
        super().__init__(config, method.normalise_targets, "l2")
        plan = config.plan
        self.method = method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config.model, plan.view, plan.token, checkpointing)
            self.decoder = Decoder(method.decoder, self.encoder.width, plan.grid, plan.token, checkpointing)
            self.alignment = nn.ModuleDict()
            if method.alignment != "none":
                for number, weight in enumerate(method.alignment_weights, start=1):
                    if weight:
                        pair = Alignment(method.alignment, method.decoder.width, method.temperature)
                        self.alignment[f"{number}_{number + 1}"] = pair
            initialise(self.alignment)

    def weights(self) -> dict[str, float]:
        """Of every level and of every pair of neighbours."""
        found = {f"level_{number}": weight for number, weight in enumerate(self.method.level_weights, start=1)}
        for number, weight in enumerate(self.method.alignment_weights, start=1):
            found[f"alignment_{number}_{number + 1}"] = weight
        return found

    def more_losses(
        self, pieces: Sequence[Piece], predictions: Sequence[Prediction], levels: Sequence[TensorLevel], memory: Memory
    ) -> dict[str, Tensor]:
        """The alignment losses by name. A parent stands in an earlier piece than its children, or in the same chunk."""
        parts: dict[str, Tensor] = {}
        for name, inputs, num_children in self._pairs(pieces, predictions, levels, memory):
            # In full precision whatever the network ran in: similarities are divided by a small temperature.
            with torch.autocast(inputs[0].device.type, enabled=False):
                share = self.alignment[name](*inputs).sum() / num_children
            part = f"alignment_{name}"
            parts[part] = parts[part] + share if part in parts else share
        return parts

    @torch.no_grad()
    def more_watch(
        self, pieces: Sequence[Piece], predictions: Sequence[Prediction], levels: Sequence[TensorLevel]
    ) -> dict[str, Tensor]:
        """`found_1_2`: share of children whose own cell is most alike of their parent's; `chance_1_2`: by guessing."""
        found: dict[str, Tensor] = {}
        for name, inputs, num_children in self._pairs(pieces, predictions, levels, Memory()):
            with torch.autocast(inputs[0].device.type, enabled=False):
                hits = self.alignment[name](*inputs, find=True) == inputs[3]
            found[f"found_{name}"] = found.get(f"found_{name}", 0.0) + hits.sum() / num_children
            found[f"chance_{name}"] = torch.full_like(hits[0], 1 / inputs[1].shape[1], dtype=torch.float32)
        return found

    def _pairs(
        self, pieces: Sequence[Piece], predictions: Sequence[Prediction], levels: Sequence[TensorLevel], memory: Memory
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, Tensor], int]]:
        """Children to be aligned: (the pair's name, what its `Alignment` takes, children of all samples)."""
        for piece, prediction in zip(pieces, predictions, strict=True):
            number, views = piece.level, piece.group.views
            if f"{number + 1}_{number + 2}" in self.alignment:
                tokens = in_grid_order(prediction.features.detach(), piece.group.visible, piece.group.hidden)
                cells = pool_cells(tokens, self.config.plan.grid, self.config.plan.cells(number))
                memory[number, views.start] = at_least_float32(cells)
            if f"{number}_{number + 1}" not in self.alignment:
                continue
            # Views stand in the order (parent, child), so a parent's children are neighbours.
            siblings = num_views(levels[number]) // num_views(levels[number - 1])
            first, last = views.start // siblings, (views.stop - 1) // siblings
            parent = torch.arange(views.start, views.stop, device=piece.views.device) // siblings - first
            children = at_least_float32(prediction.features).mean(dim=1)
            cells, cell = memory.rows(number - 1, first, last + 1), levels[number].cell.flatten()[views]
            yield f"{number}_{number + 1}", (children, cells, parent, cell), num_views(levels[number])
