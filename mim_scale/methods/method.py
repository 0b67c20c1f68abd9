"""What every method is to the training loop: losses of a batch, those of one that has learnt nothing, pictures."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mim_scale.streaming.device import TensorBatch


@dataclass(frozen=True)
class Losses:
    """What is minimised, and what it is made of before weighting."""

    total: Tensor
    parts: dict[str, Tensor]
    """`level_1` ... reconstruction, `alignment_1_2` ... of neighbouring levels, `contrast`: scalars."""


@dataclass(frozen=True)
class LevelPreview:
    """One level's views as pictures [views, Z, Y, X], values in [0, 1] but for the prediction's own errors."""

    input: NDArray[np.float32]
    masked: NDArray[np.float32]
    """The input with hidden voxels at 0."""
    reconstruction: NDArray[np.float32]
    """Visible voxels of the input, hidden voxels of the prediction."""
    hidden: NDArray[np.bool_]


@dataclass(frozen=True)
class SimilarityPreview:
    """Augmented views as pictures [views, Z, Y, X], and the cosine of each one's features with every other's."""

    views: NDArray[np.float32]
    similarity: NDArray[np.float32]
    """[views, views]; the two views of a sample are neighbours."""


Preview = list[LevelPreview] | SimilarityPreview


class Method(Protocol):
    """A module that learns. Weights depend on the config alone."""

    def __call__(self, batch: TensorBatch) -> Losses:
        """The losses of a micro-batch, means over its samples: micro-batches of equal size average exactly."""

    def trivial(self, batch: TensorBatch) -> dict[str, Tensor]:
        """What a predictor that has learnt nothing would reach, by the names of the parts that it has a number for."""

    def watch(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Scalars that tell whether the network collapses (`methods/watch.py`); called without gradients."""

    def preview(self, batch: TensorBatch) -> Preview:
        """The samples as pictures."""
