"""Every setting of a run, as one frozen, typed tree.

What changes results has no default: it is written in the YAML. Relations that cannot hold are refused here, once; code
below trusts the values. Axes are (z, y, x) everywhere; a single integer means the same on every axis.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Size3 = tuple[int, int, int]


def _as_size(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value, value)
    return tuple(value) if isinstance(value, list) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_spacing(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),) * 3
    return _as_tuple(value)


Checkpointing = Literal["none", "stem", "all"]
Positive = Annotated[int, Field(gt=0)]
Size = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_as_size)]
Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0)]
Weights = Annotated[tuple[Rate, ...], BeforeValidator(_as_tuple)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _check_part(text: str) -> str:
    one, many = map(int, text.split("/"))
    if one > many:
        raise ValueError(f"there is no part {one} of {many}")
    return text


Part = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}/[1-9]\d{0,8}$"), AfterValidator(_check_part)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Ints = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]
Spacing = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]],
    BeforeValidator(_as_spacing),
]


class Section(BaseModel):
    """A group of settings: frozen, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where voxels come from and how they reach the ranks."""

    store: str
    window_hu: Annotated[tuple[float, float], BeforeValidator(_as_tuple)]
    """Hounsfield units that become 0 and 1; values outside are clipped (method: [-1000, 1000])."""
    held_out_subjects: Annotated[int, Field(ge=0)]
    """How many subjects are kept out of training, to measure on; all volumes of a subject go together."""
    transport: Literal["threads", "ray"] = "threads"
    workers: Positive = 2
    read_ahead: Positive = 4
    """Micro-batches that may be ready or under way before they are asked for."""
    pack: str | None = None
    """A pack of this run's samples (`mim-scale data pack`) to read them from; the store is then not needed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu {list(self.window_hu)} is empty: its first number must be the smaller one")
        return self


class LevelConfig(Section):
    """One level of nested views."""

    hidden_ratio: Ratio
    """Share of the level's cells that are hidden; the count is rounded to whole cells."""
    cells: Size | None = None
    """Mask units per axis of a view; none means one token each. A child view shows one hidden cell of its parent."""
    views: Positive = 1
    """Views per parent view; at the first level, per sample."""


class PlanConfig(Section):
    """Which boxes are cut and which tokens are hidden: everything that is decided before a voxel is read."""

    box: Size
    """Outer box read from a volume, in voxels."""
    view: Size
    """Every level's regions are resized to this many voxels."""
    token: Size
    """Voxels of a view that one token covers."""
    levels: Annotated[tuple[LevelConfig, ...], BeforeValidator(_as_tuple), Field(min_length=1)]

    @property
    def grid(self) -> Size3:
        """Tokens of a view per axis."""
        return _divide(self.view, self.token)

    @property
    def num_tokens(self) -> int:
        """Tokens of a view."""
        return math.prod(self.grid)

    def cells(self, level: int) -> Size3:
        """Mask units per axis at a level (counted from 0)."""
        return self.levels[level].cells or self.grid

    def cell_tokens(self, level: int) -> int:
        """Tokens that one mask unit holds."""
        return self.num_tokens // math.prod(self.cells(level))

    def region(self, level: int) -> Size3:
        """Voxels of the outer box that one view of a level shows, before it is resized."""
        region: Size3 = self.box
        for parent in range(level):
            region = _divide(region, self.cells(parent))
        return region

    def num_hidden_cells(self, level: int) -> int:
        """Hidden mask units of each view of a level: the ratio, rounded half up to whole cells."""
        return math.floor(self.levels[level].hidden_ratio * math.prod(self.cells(level)) + 0.5)

    def num_hidden(self, level: int) -> int:
        """Hidden tokens of each view of a level."""
        return self.num_hidden_cells(level) * self.cell_tokens(level)

    def num_visible(self, level: int) -> int:
        """Visible tokens of each view of a level."""
        return self.num_tokens - self.num_hidden(level)

    def num_views(self, level: int) -> int:
        """Views of a level per sample."""
        return math.prod(self.levels[i].views for i in range(level + 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_divides("view", self.view, "token", self.token)
        if self.levels[0].views != 1:
            raise ValueError(
                f"levels[0].views is {self.levels[0].views}: the first level is the outer box itself, so it has 1 view"
            )
        for level in range(len(self.levels)):
            self._check_level(level)
        return self

    def _check_level(self, level: int) -> None:
        cells = self.cells(level)
        _check_divides(f"grid (view / token) {list(self.grid)}, ", self.grid, f"levels[{level}].cells", cells)
        hidden, count = self.num_hidden_cells(level), math.prod(cells)
        if not 0 < hidden < count:
            raise ValueError(
                f"levels[{level}].hidden_ratio {self.levels[level].hidden_ratio} hides {hidden} of {count} cells: "
                "at least one must be hidden and one visible"
            )
        if level + 1 < len(self.levels):
            views = self.levels[level + 1].views
            if views > hidden:
                raise ValueError(
                    f"levels[{level + 1}].views is {views}, but levels[{level}] hides only {hidden} of its {count} "
                    "cells and each child is cut from a different hidden cell: lower views or raise hidden_ratio"
                )
            _check_divides(f"levels[{level}] region", self.region(level), f"levels[{level}].cells", cells)


class DecoderConfig(Section):
    """The decoder: a plain transformer over all tokens of a view."""

    width: Positive
    depth: Positive
    heads: Positive


class ModelConfig(Section):
    """The network's sizes. Each convolution stage halves the grid; the last width is the transformer's."""

    backbone: Literal["hybrid"]
    widths: Ints
    """Channels of the convolution stages, then of the transformer."""
    blocks: Ints
    """Convolution blocks of each stage."""
    depth: Positive
    heads: Positive
    mlp_ratio: Positive
    decoder: DecoderConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.blocks) != len(self.widths) - 1:
            raise ValueError(
                f"blocks has {len(self.blocks)} numbers and widths {len(self.widths)}: "
                "give one block count for each convolution stage, that is one fewer than widths"
            )
        for name, width, heads in (
            ("widths[-1]", self.widths[-1], self.heads),
            ("decoder.width", self.decoder.width, self.decoder.heads),
        ):
            if width % heads:
                raise ValueError(f"{name} {width} is not a multiple of its heads {heads}")
            if width % 6:
                raise ValueError(f"{name} {width} is not a multiple of 6, which the three-axis position table needs")
        return self


class LossConfig(Section):
    """What is summed into the loss (method: section 1.5)."""

    normalise_targets: bool
    """Normalise each target token by its own mean and variance."""
    level_weights: Weights
    alignment: Literal["none", "infonce", "cosine"]
    alignment_weights: Weights
    """One weight for each pair of neighbouring levels."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Only infonce reads it."""


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay; every rate is a function of the step."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    learning_rate_batch: Positive
    """The batch, in samples, that learning_rate is stated for; it scales linearly with train.batch."""
    warmup_steps: Annotated[int, Field(ge=0)]
    final_learning_rate: Rate
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)]
    weight_decay: Rate
    clip_norm: Annotated[float, Field(gt=0)] | None
    """Global gradient norm above which the gradient is scaled down; null for never."""


class TrainConfig(Section):
    """How long, how much at once, by which engine. batch is in samples (volumes), whatever the number of ranks."""

    steps: Positive
    batch: Positive
    micro_batch: Positive
    """Samples that one rank holds in memory at once."""
    precision: Literal["fp32", "bf16"]
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1
    activation_checkpointing: Checkpointing = "all"
    """Blocks that keep only their input and run again in the backward pass: none, the convolution stages' (most of the
    memory), or all. Numbers do not change."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.engine == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 at zero_stage 0 drifts from fp32 under DeepSpeed: take zero_stage 1 or more"
            )
        return self


class CheckpointConfig(Section):
    """When state is saved and how many saves are kept."""

    every: Positive
    keep: Positive


class HeldOutConfig(Section):
    """When the held-out loss is measured, and on how many fixed samples."""

    every: Positive
    samples: Positive


class TrackingConfig(Section):
    """Where metrics go besides journal.jsonl."""

    mlflow: str | None
    """A tracking URI; `auto` is a SQLite file in the run folder; null for none."""
    experiment: str = "mim-scale"


class PretrainConfig(Section):
    """One pre-training run."""

    method: Literal["mask_in_mask"]
    output: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    data: DataConfig
    plan: PlanConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    held_out: HeldOutConfig
    tracking: TrackingConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.plan.levels)
        if len(self.loss.level_weights) != levels:
            raise ValueError(f"loss.level_weights has {len(self.loss.level_weights)} numbers, plan.levels has {levels}")
        if self.loss.alignment != "none" and len(self.loss.alignment_weights) != levels - 1:
            raise ValueError(
                f"loss.alignment_weights has {len(self.loss.alignment_weights)} numbers: give one for each of the "
                f"{levels - 1} pairs of neighbouring levels"
            )
        stride = 2 ** len(self.model.widths)
        if any(size != stride for size in self.plan.token):
            raise ValueError(
                f"plan.token {list(self.plan.token)} does not fit model.widths: {len(self.model.widths)} widths "
                f"make tokens of {stride} voxels; take token {stride}, "
                f"or {int(math.log2(self.plan.token[0]))} widths"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves nothing of train.steps "
                f"{self.train.steps}: lower it"
            )
        return self


class BuildConfig(Section):
    """One build of a store from source files."""

    source: str
    store: str
    spacing: Spacing | None = None
    """Resample to this spacing in mm, (z, y, x) or one number; null keeps each volume's own."""
    min_slices: Positive = 16
    """Volumes thinner than this along any axis are quarantined."""
    executor: Literal["ray", "local"] = "ray"
    workers: Positive | None = None
    """Tasks at once; null takes every core."""
    part: Part | None = None
    """Do only part 3 of 16, written 3/16, and commit nothing; a build without it then commits the whole."""
    key_file: str | None = None
    """The secret behind all pseudonyms; null takes $MIM_SCALE_KEY_FILE, or the user's own, made at first use."""
    hold_out: Strings = ()
    """Stores, folders of images or fingerprint lists: what resembles a volume of theirs is kept out."""
    replace: bool = False
    """Go on also where the store would lose most of its volumes, or take in what the last build held out."""


def _divide(size: Size3, by: Size3) -> Size3:
    return (size[0] // by[0], size[1] // by[1], size[2] // by[2])


def _check_divides(name: str, size: Size3, by_name: str, by: Size3) -> None:
    if any(a % b for a, b in zip(size, by, strict=True)):
        raise ValueError(f"{name} {list(size)} is not a multiple of {by_name} {list(by)} on every axis")
