"""A masked autoencoder: one level of crops; hidden tokens are dropped, and reconstructed by a light decoder.

Method: section 6; He et al. 2111.06377, Chen et al. WACV 2023.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mim_scale.config import Checkpointing, MaeConfig, PretrainConfig
from mim_scale.methods.masked import MaskedReconstruction, Piece, Prediction, encode_and_decode
from mim_scale.models.build import build_encoder
from mim_scale.models.decoder import Decoder


class Mae(MaskedReconstruction):
    """Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig, method: MaeConfig, checkpointing: Checkpointing) -> None:
        super().__init__(config, method.normalise_targets, method.error)
        plan = config.plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config.model, plan.view, plan.token, checkpointing)
            self.decoder = Decoder(method.decoder, self.encoder.width, plan.grid, plan.token, checkpointing)

    def predict(self, pieces: Sequence[Piece]) -> list[Prediction]:
        """Encode, decode and predict all pieces at once."""
        return encode_and_decode(self.encoder, self.decoder, pieces)

    def voxels_of(self, features: Tensor, piece: Piece) -> Tensor:
        """A prediction's voxels [B, H, P] from its features alone."""
        return self.decoder.predict(features[:, piece.group.visible.shape[1] :])
