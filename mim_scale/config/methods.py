"""What is learnt from the views: one section a method."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mim_scale.config.models import Mask, check_heads
from mim_scale.config.parts import Above0, Positive, Section, Weights
from mim_scale.config.plan import PlanConfig


class DecoderConfig(Section):
    """The decoder: a plain transformer over all tokens of a view."""

    width: Positive
    depth: Positive
    heads: Positive
    mlp_ratio: Positive

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_heads("width", self.width, self.heads)
        return self


class _Method(Section):
    """What every method says about itself."""

    mask: ClassVar[Mask]
    """How it hides tokens from the encoder."""

    @property
    def samples_together(self) -> int:
        """Neighbouring samples whose loss depends on each other; a micro-batch is a multiple of it."""
        return 1

    def check_plan(self, plan: PlanConfig) -> None:
        """Raise ValueError where the plan's levels are not what the method learns from."""
        if len(plan.levels) != 1:
            raise ValueError(
                f"method {getattr(self, 'name', '')} takes one level of views, plan.levels has "
                f"{len(plan.levels)}: keep one"
            )
        if not plan.num_hidden_cells(0)[0]:
            raise ValueError(
                f"levels[0].hidden_ratio hides nothing, and method {getattr(self, 'name', '')} learns "
                "from what is hidden: raise it"
            )


class MaskInMaskConfig(_Method):
    """Nested levels of views, each reconstructed, neighbouring levels aligned (method: section 1)."""

    mask = "dropped"
    name: Literal["mask_in_mask"]
    decoder: DecoderConfig
    normalise_targets: bool
    """Normalise each target token by its own mean and variance."""
    level_weights: Weights
    alignment: Literal["none", "infonce", "cosine"]
    alignment_weights: Weights
    """One weight for each pair of neighbouring levels."""
    temperature: Above0 = 1.0
    """Only infonce reads it."""

    def check_plan(self, plan: PlanConfig) -> None:
        """One weight a level, one a pair of neighbours; every level hides something."""
        levels = len(plan.levels)
        if len(self.level_weights) != levels:
            raise ValueError(f"method.level_weights has {len(self.level_weights)} numbers, plan.levels has {levels}")
        if self.alignment != "none" and len(self.alignment_weights) != levels - 1:
            raise ValueError(
                f"method.alignment_weights has {len(self.alignment_weights)} numbers: give one for each of the "
                f"{levels - 1} pairs of neighbouring levels"
            )
        if not any(self.level_weights) and (self.alignment == "none" or not any(self.alignment_weights)):
            raise ValueError("every weight in method.level_weights is 0, and nothing else is learnt from: raise one")
        for level in range(levels):
            if not plan.num_hidden_cells(level)[0]:
                raise ValueError(
                    f"levels[{level}].hidden_ratio hides nothing: every level needs hidden cells; raise it"
                )


class MaeConfig(_Method):
    """A masked autoencoder: one level of crops, hidden tokens dropped and reconstructed (method: section 6)."""

    mask = "dropped"
    name: Literal["mae"]
    decoder: DecoderConfig
    normalise_targets: bool
    error: Literal["l1", "l2"]


class SimMimConfig(_Method):
    """Hidden tokens replaced by a mask token at the encoder's input, one linear map back to voxels (section 6)."""

    mask = "filled"
    name: Literal["simmim"]
    normalise_targets: bool
    error: Literal["l1", "l2"]


class SimClrConfig(_Method):
    """Two augmented crops of a sample agree, against the other samples of a fixed group (method: section 6)."""

    mask = "none"
    name: Literal["simclr"]
    projection: Positive
    """Features that are compared."""
    temperature: Above0
    group: Annotated[int, Field(ge=2)]
    """Neighbouring positions that are told apart from each other; never what else is in a micro-batch."""

    @property
    def samples_together(self) -> int:
        """The group."""
        return self.group

    def check_plan(self, plan: PlanConfig) -> None:
        """One level of two overlapping crops with nothing hidden."""
        if len(plan.levels) != 1 or plan.levels[0].views != 2 or plan.crop is None or plan.levels[0].hidden_ratio != 0:
            raise ValueError(
                "method simclr compares two crops of a box: give plan.crop, and one level with views 2, hidden_ratio 0"
            )
        if any(2 * crop <= box for crop, box in zip(plan.crop, plan.box, strict=True)):
            raise ValueError(
                f"plan.crop {list(plan.crop)} is not more than half of plan.box {list(plan.box)}: two crops may show "
                "nothing in common; take a larger crop or a smaller box"
            )
        if not plan.augment:
            raise ValueError(
                "method simclr needs plan.augment true: two crops that differ by their place alone teach little"
            )


MethodConfig = Annotated[MaskInMaskConfig | MaeConfig | SimMimConfig | SimClrConfig, Field(discriminator="name")]
"""Where a method is added."""
