"""What a rank holds, on its device and in the host's memory, by engine and ZeRO stage: arithmetic on a step's cost.

Weights, gradients and both moments are float32 throughout, in bf16 runs too.
"""

from dataclasses import dataclass

from mim_scale.config import PretrainConfig
from mim_scale.methods.cost import Cost

WORD = 4
STATE_WORDS = 3
"""A weight and two moments: what a checkpoint has of a parameter."""
BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer of gradients under way (reduce_bucket_size), made whole on a GPU."""
LIVE = 100_000_000
"""Weights that stage 3 has gathered at once, about: those at work, and those fetched ahead (twice 5e7)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of a step."""

    weights: float
    optimizer: float
    """Moments, and the optimizer's own copy of the weights where ZeRO keeps one."""
    gradients: float
    buffers: float
    """Gradients under way, weights fetched for a while."""
    activations: float
    batch: float
    host_optimizer: float
    """Offloaded; in the host's memory."""
    host_copy: float
    """Of a save that is written while training goes on; in the host's memory."""

    @property
    def device(self) -> float:
        """On the device that computes."""
        return self.weights + self.optimizer + self.gradients + self.buffers + self.activations + self.batch

    @property
    def host(self) -> float:
        """In the host's memory, where the device is a GPU; on a CPU both are one."""
        return self.host_optimizer + self.host_copy

    def needed(self, is_on_host: bool) -> float:
        """What the memory of the device must hold, which on a CPU is the host's."""
        return self.device + (self.host if is_on_host else 0.0)


def rank_memory(cost: Cost, config: PretrainConfig, world: int, writers: int, is_on_host: bool) -> RankMemory:
    """What a rank of `world` holds while it trains.

    Args:
        cost: Of a micro-batch of the config.
        writers: Ranks that share the writing of checkpoints; the one with the largest share counts.
        is_on_host: Whether ranks compute on cores; memory that is reserved and never touched costs nothing there.
    """
    train = config.train
    whole = float(cost.parameters * WORD)
    part = whole / world
    is_accumulated = train.batch > train.micro_batch * world
    bucket = float(min(cost.parameters, BUCKET) if is_on_host else BUCKET) * WORD
    weights, optimizer, gradients, buffers = {
        # The gradient flat beside the gradients comes after the last backward pass, when activations are gone.
        0: (whole, 2 * whole, whole, 0.0),
        1: (whole, 3 * part, whole, bucket),
        # Several micro-batches' gradients are added up whole, so that they are exchanged once.
        2: (whole, 3 * part, whole if is_accumulated else part, bucket),
        3: (part, 3 * part, part, bucket + min(whole, LIVE * WORD)),
    }[train.stage]
    is_offloaded = train.offload_optimizer and train.stage > 0
    copies = config.checkpoint.background
    return RankMemory(
        weights=weights,
        optimizer=0.0 if is_offloaded else optimizer,
        gradients=gradients,
        buffers=buffers,
        activations=float(cost.activation_bytes),
        batch=float(cost.batch_bytes),
        host_optimizer=optimizer + part if is_offloaded else 0.0,
        host_copy=STATE_WORDS * whole / writers if copies else 0.0,
    )


def checkpoint_bytes(parameters: int) -> int:
    """Of one checkpoint."""
    return STATE_WORDS * WORD * parameters
