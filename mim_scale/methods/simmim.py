"""SimMIM: hidden tokens are replaced at the encoder's input, and one linear map says what they show.

Method: section 6; Xie et al. 2111.09886, Chen et al. WACV 2023. B views, H hidden tokens, C features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim_scale.config import Checkpointing, PretrainConfig, SimMimConfig
from mim_scale.methods.masked import MaskedReconstruction, Piece, Prediction
from mim_scale.models.blocks import initialise
from mim_scale.models.build import build_encoder
from mim_scale.models.patches import gather_tokens


class MaskToken(nn.Module):
    """What stands at the input for a hidden token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.value, std=0.02)

    def forward(self, views: Tensor) -> Tensor:
        """[width] for these views. A copy: ZeRO-3 takes the parameter itself away when the call is over."""
        return self.value + views.new_zeros(1)


class SimMim(MaskedReconstruction):
    """Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig, method: SimMimConfig, checkpointing: Checkpointing) -> None:
        super().__init__(config, method.normalise_targets, method.error)
        plan = config.plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config.model, plan.view, plan.token, checkpointing)
            self.mask_token = MaskToken(self.encoder.mask_width)
            self.to_voxels = nn.Linear(self.encoder.width, plan.token[0] * plan.token[1] * plan.token[2])
            initialise(self.to_voxels)

    def predict(self, pieces: Sequence[Piece]) -> list[Prediction]:
        """Encode all tokens of each piece; voxels of the hidden ones, which alone the loss reads."""
        found = []
        for piece in pieces:
            visible, hidden = piece.group.visible, piece.group.hidden
            encoded = self.encoder.encode_filled(piece.views, hidden, self.mask_token(piece.views))
            features = gather_tokens(encoded, torch.cat([visible, hidden], dim=1))
            found.append(Prediction(features, self.voxels_of(features, piece)))
        return found

    def voxels_of(self, features: Tensor, piece: Piece) -> Tensor:
        """A prediction's voxels [B, H, P] from its features alone."""
        voxels: Tensor = self.to_voxels(features[:, piece.group.visible.shape[1] :])
        return voxels
