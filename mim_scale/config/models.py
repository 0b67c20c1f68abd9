"""The networks that can be pre-trained, and their sizes: one section a backbone."""

import typing
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mim_scale.config.parts import Ints, Positive, Section
from mim_scale.config.plan import PlanConfig

Mask = Literal["none", "dropped", "filled"]
MASKS: dict[Mask, str] = {
    "none": "hides nothing",
    "dropped": "drops hidden tokens",
    "filled": "puts a mask token where something is hidden",
}


class _Backbone(Section):
    """What every backbone says about itself."""

    masks: ClassVar[frozenset[Mask]]
    """Ways of hiding that it can do exactly: no hidden voxel reaches a feature."""
    sized_by: ClassVar[str] = "number of stages"
    """What `stride` follows from."""

    @property
    def stride(self) -> int | None:
        """Voxels along each axis that one of its tokens must cover; None for any number."""
        return None

    def check_plan(self, plan: PlanConfig) -> None:
        """Raise ValueError where it cannot take the plan's views and tokens."""
        stride = self.stride
        if stride is not None and any(size != stride for size in plan.token):
            name = getattr(self, "backbone", "")
            raise ValueError(
                f"plan.token {list(plan.token)} does not fit model: this {name} makes tokens of {stride} voxels; "
                f"take token {stride}, or another {self.sized_by}"
            )


class HybridConfig(_Backbone):
    """Convolution stages, each of which halves the grid, then a transformer on tokens (method: section 2.1)."""

    masks = frozenset({"none", "dropped"})
    backbone: Literal["hybrid"]
    widths: Ints
    """Channels of the convolution stages, then of the transformer."""
    blocks: Ints
    """Convolution blocks of each stage."""
    depth: Positive
    heads: Positive
    mlp_ratio: Positive

    @property
    def stride(self) -> int:
        """Every stage and the last embedding halve the grid."""
        return int(2 ** len(self.widths))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.blocks) != len(self.widths) - 1:
            raise ValueError(
                f"blocks has {len(self.blocks)} numbers and widths {len(self.widths)}: "
                "give one block count for each convolution stage, that is one fewer than widths"
            )
        check_heads("widths[-1]", self.widths[-1], self.heads)
        return self


class ViTConfig(_Backbone):
    """A plain transformer on tokens of voxels (method: section 6)."""

    masks = frozenset({"none", "dropped", "filled"})
    backbone: Literal["vit"]
    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Positive

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides_heads("width", self.width, self.heads)
        return self


class PrimusConfig(_Backbone):
    """Primus of dynamic-network-architectures: a transformer with rotary positions on small tokens (2503.01835).

    Stock Primus-M: width 864, depth 16, heads 12, plan.token 8.
    """

    masks = frozenset({"none", "dropped"})
    backbone: Literal["primus"]
    width: Positive
    depth: Positive
    heads: Positive

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_divides_heads("width", self.width, self.heads)
        if self.width // self.heads % 6:
            raise ValueError(
                f"width {self.width} with {self.heads} heads makes heads of {self.width // self.heads}: take a "
                "multiple of 6, which the rotary positions of three axes need"
            )
        return self


class ResEncConfig(_Backbone):
    """The residual encoder of nnU-Net's U-Nets, by dynamic-network-architectures.

    Stock ResEnc-L: features 32, 64, 128, 256, 320, 320 and blocks 1, 3, 4, 6, 6, 6, so plan.token 32.
    """

    masks = frozenset({"none", "dropped"})
    backbone: Literal["resenc"]
    features: Annotated[Ints, Field(min_length=1)]
    """Channels of each stage; every stage but the first halves the grid."""
    blocks: Ints
    """Residual blocks of each stage."""

    @property
    def stride(self) -> int:
        """The last stage's positions are the tokens."""
        return int(2 ** (len(self.features) - 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.blocks) != len(self.features):
            raise ValueError(f"blocks has {len(self.blocks)} numbers and features {len(self.features)}: give as many")
        return self

    def check_plan(self, plan: PlanConfig) -> None:
        """Also: the last stage's norm needs more than one position."""
        super().check_plan(plan)
        if plan.num_tokens == 1:
            raise ValueError(
                f"plan.view {list(plan.view)} is a single token of {self.stride} voxels, and this resenc normalises "
                "over a view's tokens: take a larger view, or fewer stages"
            )


class SwinConfig(_Backbone):
    """MONAI's Swin transformer: windows of attention, four stages, each of which halves the grid after the patches."""

    masks = frozenset({"none", "filled"})
    sized_by = "patch"
    backbone: Literal["swin"]
    width: Positive
    """Channels of the first stage; each stage doubles them."""
    depths: Annotated[Ints, Field(min_length=4, max_length=4)]
    heads: Annotated[Ints, Field(min_length=4, max_length=4)]
    window: Positive
    patch: Positive
    """Voxels along each axis that the first embedding covers."""

    @property
    def stride(self) -> int:
        """The last stage's positions are the tokens."""
        return self.patch * 16

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage, heads in enumerate(self.heads):
            check_divides_heads(f"the width of stage {stage + 1},", self.width * 2**stage, heads)
        return self


ModelConfig = Annotated[
    HybridConfig | ViTConfig | PrimusConfig | ResEncConfig | SwinConfig, Field(discriminator="backbone")
]
"""Where a backbone is added."""


def able_backbones(mask: Mask) -> list[str]:
    """Names of the backbones that can hide in this way."""
    sections = typing.get_args(typing.get_args(ModelConfig)[0])
    return [section.model_fields["backbone"].annotation.__args__[0] for section in sections if mask in section.masks]


def check_heads(name: str, width: int, heads: int) -> None:
    """Raise ValueError where a transformer of this width, with a fixed position table, cannot be made."""
    check_divides_heads(name, width, heads)
    if width % 6:
        raise ValueError(f"{name} {width} is not a multiple of 6, which the three-axis position table needs")


def check_divides_heads(name: str, width: int, heads: int) -> None:
    """Raise ValueError where heads cannot share a width."""
    if width % heads:
        raise ValueError(f"{name} {width} is not a multiple of its heads {heads}")
