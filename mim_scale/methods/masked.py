"""What all methods share that hide tokens and reconstruct them: views, losses, the trivial predictor, pictures.

N samples, B views of a group that hides equally many tokens, V visible and H hidden ones, P voxels of a token, D
features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.methods.chunks import losses_by_chunk
from mim_scale.methods.method import LevelPreview, Losses
from mim_scale.methods.targets import errors_of, hidden_targets, token_statistics, trivial_loss
from mim_scale.methods.views import make_views
from mim_scale.methods.watch import constant_share, deviation, effective_rank
from mim_scale.models.decoder import Decoder
from mim_scale.models.encoder import Encoder
from mim_scale.models.patches import gather_tokens, patchify, unpatchify, visible_grid
from mim_scale.streaming.device import Group, TensorBatch, TensorLevel


@dataclass(frozen=True)
class Piece:
    """Neighbouring views of one level that hide equally many tokens."""

    level: int
    """Counted from 0."""
    views: Tensor
    """[B, 1, Z, Y, X]"""
    group: Group


@dataclass(frozen=True)
class Prediction:
    """What the network says about a piece."""

    features: Tensor
    """[B, V + H, D], visible tokens first."""
    voxels: Tensor
    """[B, H, P] of the hidden tokens, normalised where the targets are."""


class MaskedReconstruction(nn.Module):
    """The base of such methods: a subclass says how hidden tokens are predicted, and what else is learnt."""

    def __init__(self, config: PretrainConfig, normalise_targets: bool, error: Literal["l1", "l2"]) -> None:
        super().__init__()
        self.config = config
        self.normalise_targets = normalise_targets
        self.error = error

    def predict(self, pieces: Sequence[Piece]) -> list[Prediction]:
        """The prediction for each piece, in as few calls as that allows."""
        raise NotImplementedError

    def voxels_of(self, features: Tensor, piece: Piece) -> Tensor:
        """A prediction's voxels [B, H, P] from its features alone."""
        raise NotImplementedError

    def more_losses(
        self,
        pieces: Sequence[Piece],
        predictions: Sequence[Prediction],
        levels: Sequence[TensorLevel],
        memory: "Memory",
    ) -> dict[str, Tensor]:
        """Further losses of some pieces, each as its share of the mean over the micro-batch."""
        return {}

    def weights(self) -> dict[str, float]:
        """The weight of each part of the loss; 1 for one that is not in it."""
        return {}

    def forward(self, batch: TensorBatch) -> Losses:
        """As every method's."""
        return self.losses(make_views(batch, self.config.plan, self.config.data.window_hu), batch.levels)

    def losses(self, views: Sequence[Tensor], levels: Sequence[TensorLevel]) -> Losses:
        """The losses of ready views: every level's [B, 1, Z, Y, X], and its indices.

        With `train.views_at_once` the views go through in chunks, whose activations are not held together.
        """
        at_once = self.config.train.views_at_once
        chunks = cut(views, levels, at_once)
        memory = Memory()
        runs = [lambda chunk=chunk: self._parts(chunk, levels, memory) for chunk in chunks]
        return losses_by_chunk(runs, self._total, self, self.config.train)

    def _total(self, parts: dict[str, Tensor]) -> Tensor:
        weights = self.weights()
        return torch.stack([weights.get(name, 1.0) * part for name, part in parts.items()]).sum()

    def _parts(self, pieces: Sequence[Piece], levels: Sequence[TensorLevel], memory: "Memory") -> dict[str, Tensor]:
        """What some pieces add to the means over the micro-batch."""
        return self._parts_of(pieces, self.predict(pieces), levels, memory)

    def _parts_of(
        self,
        pieces: Sequence[Piece],
        predictions: Sequence[Prediction],
        levels: Sequence[TensorLevel],
        memory: "Memory",
    ) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for piece, prediction in zip(pieces, predictions, strict=True):
            targets = hidden_targets(piece.views, piece.group.hidden, self.config.plan.token, self.normalise_targets)
            # A mean of each view first: views of other samples may hide another number of tokens.
            of_views = errors_of(prediction.voxels - targets, self.error).mean(dim=(1, 2))
            share = of_views.sum() / num_views(levels[piece.level])
            name = f"level_{piece.level + 1}"
            parts[name] = parts[name] + share if name in parts else share
        return parts | self.more_losses(pieces, predictions, levels, memory)

    @torch.no_grad()
    def trivial(self, batch: TensorBatch) -> dict[str, Tensor]:
        """What a predictor that has learnt nothing would reach on the same hidden tokens: scalars `level_1` ...

        Raw targets: the better of the view's visible mean and the nearest visible tokens' means. Normalised targets:
        the constant 0. `trivial_loss` has the formulas.
        """
        plan = self.config.plan
        views = make_views(batch, plan, self.config.data.window_hu)
        found = {}
        for number, (level_views, level) in enumerate(zip(views, batch.levels, strict=True), start=1):
            shares = []
            for group in level.groups():
                inner = level_views[group.views]
                loss = trivial_loss(inner, group.visible, group.hidden, plan.token, self.normalise_targets, self.error)
                shares.append(loss * (len(inner) / len(level_views)))
            found[f"level_{number}"] = torch.stack(shares).sum()
        return found

    def watch(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Of each level rank and deviation of features, and the share of hidden tokens that are air; `more_watch`'s.

        `gradient_X` is the length of the gradient of part X of the loss, weighted, with respect to the features: which
        part drives the network.
        """
        views = make_views(batch, self.config.plan, self.config.data.window_hu)
        chunks = cut(views, batch.levels, self.config.train.views_at_once)
        pieces = [piece for chunk in chunks for piece in chunk]
        with torch.no_grad():
            predictions = [found for chunk in chunks for found in self.predict(chunk)]
        found: dict[str, Tensor] = {}
        for number in range(len(batch.levels)):
            of_level = [pair for pair in zip(pieces, predictions, strict=True) if pair[0].level == number]
            features = torch.cat([prediction.features.flatten(0, 1) for _, prediction in of_level])
            hidden = [gather_tokens(patchify(p.views, self.config.plan.token), p.group.hidden) for p, _ in of_level]
            name = f"level_{number + 1}"
            found[f"rank_{name}"] = effective_rank(features)
            found[f"deviation_{name}"] = deviation(features)
            found[f"air_{name}"] = constant_share(torch.cat([voxels.flatten(0, 1) for voxels in hidden]))
        return found | self.more_watch(pieces, predictions, batch.levels) | self._gradients(pieces, predictions, batch)

    def more_watch(
        self, pieces: Sequence[Piece], predictions: Sequence[Prediction], levels: Sequence[TensorLevel]
    ) -> dict[str, Tensor]:
        """What a subclass adds to `watch`."""
        return {}

    def _gradients(
        self, pieces: Sequence[Piece], predictions: Sequence[Prediction], batch: TensorBatch
    ) -> dict[str, Tensor]:
        # From the features on, so the trunk, which is nearly all of the work, runs neither forward nor back again.
        with torch.enable_grad():
            features = [prediction.features.detach().requires_grad_() for prediction in predictions]
            again = [
                Prediction(rows, self.voxels_of(rows, piece)) for rows, piece in zip(features, pieces, strict=True)
            ]
            parts = self._parts_of(pieces, again, batch.levels, Memory())
            weights, found = self.weights(), {}
            for name, part in parts.items():
                weighted = weights.get(name, 1.0) * part
                gradients = torch.autograd.grad(weighted, features, retain_graph=True, allow_unused=True)
                squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
                found[f"gradient_{name}"] = torch.stack(squares).sum().sqrt()
        return found

    @torch.no_grad()
    def preview(self, batch: TensorBatch) -> list[LevelPreview]:
        """Every level's views as pictures, samples outermost.

        With normalised targets a prediction has no brightness and contrast of its own: it is drawn with the hidden
        token's own mean and deviation, which the network never saw. With raw targets nothing is borrowed.
        """
        views = make_views(batch, self.config.plan, self.config.data.window_hu)
        found = []
        for number, (level_views, level) in enumerate(zip(views, batch.levels, strict=True)):
            pieces = [Piece(number, level_views[group.views], group) for group in level.groups()]
            parts = [self._preview_piece(*pair) for pair in zip(pieces, self.predict(pieces), strict=True)]
            found.append(LevelPreview(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))
        return found

    def _preview_piece(self, piece: Piece, predicted: Prediction) -> tuple[NDArray[np.float32], ...]:
        plan, hidden = self.config.plan, piece.group.hidden
        prediction = predicted.voxels.float()
        voxels = patchify(piece.views, plan.token)
        if self.normalise_targets:
            mean, deviation = token_statistics(gather_tokens(voxels, hidden))
            prediction = prediction * deviation + mean
        drawn = voxels.scatter(1, hidden[:, :, None].expand_as(prediction), prediction)
        shown = visible_grid(piece.group.visible, plan.grid, voxels.dtype).flatten(1)[:, :, None].expand_as(voxels)
        visible_voxels = unpatchify(shown, plan.grid, plan.token)
        reconstruction = unpatchify(drawn, plan.grid, plan.token)
        masked = picture(piece.views * visible_voxels)
        return picture(piece.views), masked, picture(reconstruction), picture(visible_voxels) == 0


class EncoderDecoder(MaskedReconstruction):
    """Those that drop hidden tokens: a subclass builds the encoder and the decoder, in this order."""

    encoder: Encoder
    decoder: Decoder

    def predict(self, pieces: Sequence[Piece]) -> list[Prediction]:
        """Features of visible tokens, then of all of them, then voxels of the hidden ones, which alone the loss reads.

        All pieces at once: no level waits for another.
        """
        visible, hidden = [piece.group.visible for piece in pieces], [piece.group.hidden for piece in pieces]
        latents = self.encoder.encode_groups([piece.views for piece in pieces], visible)
        # By a call, not by another method: ZeRO-3 gathers what a module itself owns when it is called.
        features = self.decoder(latents, visible, hidden)
        kept = [found[:, shown.shape[1] :] for found, shown in zip(features, visible, strict=True)]
        rows = torch.cat([part.flatten(0, 1) for part in kept])
        voxels = torch.split(self.decoder.predict(rows), [masked.numel() for masked in hidden])
        return [
            Prediction(found, flat.view(*masked.shape, -1))
            for found, flat, masked in zip(features, voxels, hidden, strict=True)
        ]

    def voxels_of(self, features: Tensor, piece: Piece) -> Tensor:
        """A prediction's voxels [B, H, P] from its features alone."""
        return self.decoder.predict(features[:, piece.group.visible.shape[1] :])


class Memory(dict[tuple[int, int], Tensor]):
    """What a chunk leaves for later ones, without a gradient, by (level, first view).

    Running a chunk again leaves the same at the same place.
    """

    def rows(self, level: int, start: int, stop: int) -> Tensor:
        """Rows of the views from `start` to `stop` of a level."""
        kept = [(first, value) for (of, first), value in sorted(self.items()) if of == level]
        inside = [
            v[max(start - first, 0) : stop - first] for first, v in kept if first < stop and first + len(v) > start
        ]
        return torch.cat(inside)


def cut(views: Sequence[Tensor], levels: Sequence[TensorLevel], at_once: int | None) -> list[list[Piece]]:
    """All views in level order, as chunks of at most so many."""
    chunks: list[list[Piece]] = [[]]
    held = 0
    for number, (level_views, level) in enumerate(zip(views, levels, strict=True)):
        for group in level.groups():
            done, size = 0, len(group.visible)
            while done < size:
                if at_once is not None and held == at_once:
                    chunks.append([])
                    held = 0
                take = size - done if at_once is None else min(size - done, at_once - held)
                start = group.views.start + done
                inner = Group(
                    slice(start, start + take), group.visible[done : done + take], group.hidden[done : done + take]
                )
                chunks[-1].append(Piece(number, level_views[inner.views], inner))
                done, held = done + take, held + take
    return chunks


def num_views(level: TensorLevel) -> int:
    """Views of a level, of all samples."""
    return level.tokens.shape[0] * level.tokens.shape[1]


def picture(views: Tensor) -> NDArray[np.float32]:
    """Views [B, 1, Z, Y, X] on the host."""
    pictures: NDArray[np.float32] = views[:, 0].cpu().numpy()
    return pictures
