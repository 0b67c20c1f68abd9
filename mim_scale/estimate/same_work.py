"""What decides how long a micro-batch takes: settings that a run must share with another to tell its pace."""

import json
from typing import Any

from mim_scale.config import Checkpointing, PretrainConfig
from mim_scale.config_file import config_values
from mim_scale.errors import ConfigError
from mim_scale.training.run_folder import flatten

POLICY = "train.activation_checkpointing"
SHOWN = 3
"""Of what differs, how much a line tells."""
_OF_TRAIN = ("micro_batch", "precision", "views_at_once", "compile")


def work_settings(config: PretrainConfig, policy: Checkpointing) -> dict[str, Any]:
    """They and their values, as `train.micro_batch: 4`; of the checkpointing what was chosen, `auto` if unknown."""
    values = config_values(config)
    train = {name: values["train"][name] for name in _OF_TRAIN}
    return flatten({**{name: values[name] for name in ("method", "model", "plan")}, "train": train}) | {POLICY: policy}


def refuse_other_work(where: str, found: dict[str, Any], wanted: dict[str, Any], is_whole: bool = True) -> None:
    """Raise ConfigError where what was measured is not what is asked for; an unknown checkpointing differs from none.

    Args:
        where: The option and its value.
        found: What was measured.
        wanted: What is asked for.
        is_whole: Whether all that decides is known of what was measured; older files tell the checkpointing alone.
    """
    known = {**found, **wanted} if is_whole else found
    keys = [key for key in known if found.get(key) != wanted.get(key)]
    differing = [key for key in keys if (key, found.get(key)) != (POLICY, "auto")]
    if differing:
        told = [f"{key} is {_shown(found, key)} there and {_shown(wanted, key)} here" for key in differing[:SHOWN]]
        more = f" (and {len(differing) - SHOWN} more)" if len(differing) > SHOWN else ""
        raise ConfigError(
            f"{where}: other work than the config's, so its times tell nothing of it: {', '.join(told)}{more}: give "
            "the config the same, or measure with --run-steps"
        )


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"
