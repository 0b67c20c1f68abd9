"""Every setting of a run, as one frozen, typed tree.

What changes results has no default: it is written in the YAML. Relations that cannot hold are refused here, once; code
below trusts the values. Axes are (z, y, x) everywhere; a single integer means the same on every axis.
"""

from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mim_scale.config.methods import MethodConfig
from mim_scale.config.models import MASKS, ModelConfig, able_backbones
from mim_scale.config.parts import (
    Beta,
    Checkpointing,
    Part,
    Positive,
    Rate,
    Section,
    Spacing,
    Strings,
    as_tuple,
)
from mim_scale.config.plan import PlanConfig

TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc")
"""What MLflow itself knows, drivers (`postgresql+psycopg2`) left out."""


class DataConfig(Section):
    """Where voxels come from and how they reach the ranks."""

    store: str
    window_hu: Annotated[tuple[float, float], BeforeValidator(as_tuple)]
    """Hounsfield units that become 0 and 1; values outside are clipped (method: [-1000, 1000])."""
    held_out_subjects: Annotated[int, Field(ge=0)]
    """How many subjects are kept out of training, to measure on; all volumes of a subject go together."""
    transport: Literal["threads", "ray"] = "threads"
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads or actors of each rank; 0 for none: each micro-batch is read when it is asked for, and nothing ahead."""
    read_ahead: Positive = 4
    """Micro-batches that may be ready or under way before they are asked for."""
    pack: str | None = None
    """A pack of this run's samples (`mim-scale data pack`) to read them from; the store is then not needed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window_hu[0] >= self.window_hu[1]:
            raise ValueError(f"window_hu {list(self.window_hu)} is empty: its first number must be the smaller one")
        if self.transport == "ray" and not self.workers:
            raise ValueError("workers is 0, and transport ray reads by workers alone: give it some, or take threads")
        return self


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine decay; every rate is a function of the step."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    learning_rate_batch: Positive
    """The batch, in samples, that learning_rate is stated for; it scales linearly with train.batch."""
    warmup_steps: Annotated[int, Field(ge=0)]
    final_learning_rate: Rate
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)]
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
    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """`auto`: 1, or the lowest above it at which a rank's memory holds what a step takes; the run says why."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments, and its copy of the weights, in the host's memory; needs zero_stage 1 or more."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed on to DeepSpeed as it stands, beside what follows from this config; --deepspeed_config FILE fills it."""
    activation_checkpointing: Checkpointing = "all"
    """Blocks that keep only their input and run again in the backward pass: none, the convolution stages' (most of the
    memory), every second one, all, or what fits the memory. Numbers do not change."""
    views_at_once: Positive | None = None
    """Views whose activations are held at once; their gradient is taken before the next ones run. null: all of a
    micro-batch. Numbers do not change."""
    compile: bool = False
    """Run transformer blocks through torch.compile; refused where that changes the loss. Needs a C++ compiler on a CPU.
    """
    keep_freed_memory: bool = True
    """On a CPU: memory that was freed stays with the process, which saves paging it in again and again."""

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 without DeepSpeed; of `auto`, until a run has chosen, the lowest."""
        if self.engine == "plain":
            return 0
        return 1 if self.zero_stage == "auto" else self.zero_stage

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.engine == "deepspeed" and self.precision == "bf16" and self.stage == 0:
            raise ValueError(
                "precision bf16 at zero_stage 0 drifts from fp32 under DeepSpeed: take zero_stage 1 or more"
            )
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs engine deepspeed and zero_stage 1 or more")
        if self.deepspeed and self.engine != "deepspeed":
            raise ValueError(f"deepspeed has settings, but engine is {self.engine}: leave them out, or take deepspeed")
        if self.compile and self.stage == 3:
            raise ValueError(
                "compile does not go with zero_stage 3, whose hooks gather weights while a block runs: take a lower "
                "one, or set compile to false"
            )
        return self


class GuardsConfig(Section):
    """What is done when a step goes wrong; a run in which nothing does is not touched."""

    skips_in_a_row: Annotated[int, Field(ge=0)] = 8
    """A step whose loss or gradient is not finite is left out, on all ranks alike; more of them in a row end a run."""
    spikes: Literal["tell", "skip"] = "tell"
    """A step whose loss stands 6 deviations above the last 128 is told with its volumes, or left out as well."""
    hang_s: Annotated[float, Field(ge=1)] | None = None
    """How long a rank may stand still in a step before all end, to be started again; null for four times its longest
    pause so far, at least 20 s (alone 120 s)."""


class CheckpointConfig(Section):
    """When state is saved and how many saves are kept."""

    every: Positive
    keep: Positive
    background: bool = True
    """Write while training goes on, from a copy in host memory: 12 bytes a parameter, shared by ranks that write."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.keep < 2:
            raise ValueError(
                f"keep is {self.keep}: were that one damaged, the run would be lost; keep at least 2 checkpoints"
            )
        return self


class HeldOutConfig(Section):
    """When the held-out loss is measured, and on how many fixed samples."""

    every: Positive
    samples: Positive


def _tracking_uri(value: Any) -> Any:
    """Refuse what MLflow could never reach: it would be told once the run is under way."""
    if value is None or value in ("auto", "databricks"):
        return value
    scheme, found, _ = str(value).partition("://")
    plugins = (entry.name for entry in entry_points(group="mlflow.tracking_store"))
    if (
        not isinstance(value, str)
        or not (found or scheme.startswith("file:"))
        or (scheme.partition("+")[0] not in {*TRACKING_SCHEMES, *plugins})
    ):
        raise ValueError(
            f"{value!r}: give auto, null for none, or an address of MLflow (http://, https://, sqlite:///, ...)"
        )
    return value


class TrackingConfig(Section):
    """Where metrics go besides journal.jsonl."""

    mlflow: Annotated[str | None, BeforeValidator(_tracking_uri)]
    """A tracking URI; `auto` is a SQLite file in the run folder; null for none."""
    experiment: str = "mim-scale"


class PretrainConfig(Section):
    """One pre-training run."""

    method: MethodConfig
    output: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    data: DataConfig
    plan: PlanConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    held_out: HeldOutConfig
    tracking: TrackingConfig
    guards: GuardsConfig = GuardsConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.method.check_plan(self.plan)
        self.model.check_plan(self.plan)
        if self.method.mask not in self.model.masks:
            raise ValueError(
                f"method {self.method.name} {MASKS[self.method.mask]}, which backbone {self.model.backbone} cannot do "
                f"exactly: take {' or '.join(able_backbones(self.method.mask))}"
            )
        ranges = [level.ratios for level in self.plan.levels if level.ratios[0] != level.ratios[1]]
        if self.train.compile and ranges:
            raise ValueError(
                f"train.compile makes a program for each number of visible tokens, and hidden_ratio {list(ranges[0])} "
                "draws another one for each sample: give one ratio, or set train.compile to false"
            )
        self._check_side_by_side(bool(ranges))
        group = self.method.samples_together
        if self.train.micro_batch % group or self.held_out.samples % group:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} and held_out.samples {self.held_out.samples} must be "
                f"multiples of method.group {group}: samples of a group are compared with each other"
            )
        at_once, views = self.train.views_at_once, group * self.plan.num_views(0)
        if group > 1 and at_once is not None and at_once < views:
            raise ValueError(
                f"train.views_at_once is {at_once}, and method {self.method.name} compares the {views} views of a "
                f"group with each other: give at least {views}, or lower method.group"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves nothing of train.steps "
                f"{self.train.steps}: lower it"
            )
        return self

    def _check_side_by_side(self, is_ratio_drawn: bool) -> None:
        """At stage 3 every module's call is a meeting of all ranks: one that calls more often waits forever."""
        train = self.train
        if train.engine != "deepspeed" or train.zero_stage != 3:
            return
        if is_ratio_drawn:
            raise ValueError(
                "at train.zero_stage 3 all ranks run the same layers, and a hidden_ratio that is drawn for each sample "
                "has them run different ones: give one ratio, or take a lower zero_stage"
            )
        if train.views_at_once is not None and self.held_out.samples % train.micro_batch:
            raise ValueError(
                f"held_out.samples {self.held_out.samples} is not a multiple of train.micro_batch {train.micro_batch}: "
                "at zero_stage 3 with views_at_once its last micro-batch would have fewer chunks of views than those "
                "of other ranks; lower train.micro_batch, or set views_at_once to null"
            )


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
