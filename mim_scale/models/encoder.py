"""What every backbone is to the methods: views in, one feature vector a token out; hidden voxels reach none of them.

B views, Z Y X voxels of a view, L tokens of it, V visible and H hidden ones, C features of a token.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mim_scale.config import Checkpointing
from mim_scale.errors import ConfigError
from mim_scale.store.geometry import Size3, size3


class Encoder(nn.Module):
    """The base of all backbones. One with parameters of its own keeps them in submodules.

    ZeRO-3 gathers a module's parameters when the module is called, and methods call `encode_groups`, not the encoder.
    """

    width: int
    """C"""
    mask_width = 0
    """Channels of the mask token that `encode_filled` takes."""

    def __init__(self, view: Size3, token: Size3) -> None:
        super().__init__()
        self.view = view
        self.token = token
        self.grid = size3(length // size for length, size in zip(view, token, strict=True))

    def forward(self, views: Tensor, visible: Tensor | None = None) -> Tensor:
        """Features of the visible tokens, in the order given.

        Args:
            views: [B, 1, Z, Y, X], values in [0, 1].
            visible: Token indices [B, V], row-major (z, y, x); None for all L tokens in row-major order.

        Returns:
            [B, V, C]; they depend on voxels of visible tokens only.

        Raises:
            ConfigError: the views are not of the size that the encoder was built for.
        """
        raise NotImplementedError

    def encode_groups(self, views: Sequence[Tensor], visible: Sequence[Tensor]) -> list[Tensor]:
        """`forward` for groups of views that differ in V; in few and large calls where the backbone can."""
        return [self(*group) for group in zip(views, visible, strict=True)]

    def encode_filled(self, views: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
        """Features of all tokens [B, L, C]; `mask_token` [mask_width] stands at the input for each of hidden [B, H]."""
        raise NotImplementedError

    def features(self, views: Tensor) -> list[Tensor]:
        """What a segmentation head reads, nothing hidden: channels-first maps [B, C', z, y, x], finest first."""
        raise NotImplementedError

    def check(self, views: Tensor) -> None:
        """Raise ConfigError where views are not what the encoder takes."""
        if not views.is_floating_point():
            raise ConfigError(f"views are {views.dtype}: scale HU from the window to [0, 1] first")
        if views.ndim != 5 or tuple(views.shape[1:]) != (1, *self.view):
            raise ConfigError(
                f"views are {list(views.shape)}, this encoder takes [any, 1, {', '.join(map(str, self.view))}]: "
                "resize or crop to that"
            )


def is_recomputed(policy: Checkpointing, number: int, in_stem: bool) -> bool:
    """Whether a block keeps only its input and runs again in the backward pass.

    Args:
        policy: One of the named ones; `auto` was resolved before.
        number: Of the block among its like.
        in_stem: Whether it is a convolution block.
    """
    return {"none": False, "stem": in_stem, "second": number % 2 == 1, "all": True}[policy]
