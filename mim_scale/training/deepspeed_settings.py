"""DeepSpeed's dictionary for a run: derived from our config, with what a user adds to it; no deepspeed needed."""

from typing import Any

from mim_scale.config import PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.training.engine import accumulation
from mim_scale.training.ranks import Ranks

OURS = {
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint",
}
"""Sections that a run decides itself, and where: DeepSpeed would ignore them, or do something else."""
STATED = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch, train.micro_batch and the number of ranks",
    "gradient_clipping": "optimizer.clip_norm",
    "stage": "train.zero_stage",
}
"""Keys that have a value already, and where it comes from; a user's must be the same, or `auto`."""


def deepspeed_config(config: PretrainConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run; scheduler and optimizer are not in it, they are ours.

    Raises:
        ConfigError: `train.deepspeed` says otherwise than the config; names both values.
    """
    zero: dict[str, Any] = {"stage": config.train.stage}
    derived: dict[str, Any] = {
        "train_batch_size": config.train.batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation(config, ranks),
        "gradient_clipping": config.optimizer.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # The optimizer is torch's own also where its state is offloaded: DeepSpeed's would be compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.train.stage == 3:
        # Keeping small parameters whole would make toy models, and tests, avoid what stage 3 is for.
        zero["stage3_param_persistence_threshold"] = 0
    if config.train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": ranks.device.type == "cuda"}
    if config.train.precision == "bf16":
        # fp32 weights under autocast; the empty list keeps the reduction of gradients in fp32.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    for name in config.train.deepspeed.keys() & OURS.keys():
        raise ConfigError(f"train.deepspeed.{name}: this is decided by {OURS[name]}; leave it out")
    return _merged(derived, config.train.deepspeed, "train.deepspeed")


def _merged(own: dict[str, Any], users: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(own)
    for name, value in users.items():
        key = f"{where}.{name}"
        if isinstance(own.get(name), dict) and isinstance(value, dict):
            merged[name] = _merged(own[name], value, key)
        elif name in STATED and name in own:
            if value not in (own[name], "auto"):
                raise ConfigError(
                    f"{key} is {value!r}, but by {STATED[name]} it is {own[name]!r}: leave it out here, and set that"
                )
        else:
            merged[name] = value
    return merged
