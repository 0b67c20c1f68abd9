"""A masked autoencoder: one level of crops; hidden tokens are dropped, and reconstructed by a light decoder.

Method: section 6; He et al. 2111.06377, Chen et al. WACV 2023.
"""

import torch

from mim_scale.config import Checkpointing, MaeConfig, PretrainConfig
from mim_scale.methods.masked import EncoderDecoder
from mim_scale.models.build import build_encoder
from mim_scale.models.decoder import Decoder


class Mae(EncoderDecoder):
    """Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig, method: MaeConfig, checkpointing: Checkpointing) -> None:
        super().__init__(config, method.normalise_targets, method.error)
        plan = config.plan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config.model, plan.view, plan.token, checkpointing)
            self.decoder = Decoder(method.decoder, self.encoder.width, plan.grid, plan.token, checkpointing)
