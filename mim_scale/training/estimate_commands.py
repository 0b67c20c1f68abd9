"""`mim-scale estimate`: what is typed in, what is shown. Heavy imports wait."""

import argparse
import json
from pathlib import Path
from typing import Any

GIB = 2**30


def add_estimate(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "estimate",
        help="parameters, arithmetic and memory of a run's step, before it is run",
        description="Predicted for every checkpointing policy, for one micro-batch on one rank; nothing is computed.",
    )
    verb.add_argument("--config", type=Path, required=True)
    verb.add_argument("overrides", nargs="*", metavar="key=value")
    verb.add_argument("--measure", action="store_true", help="also run a step of each policy, and say how far off")
    verb.add_argument("--json", action="store_true", help="for scripts")
    verb.set_defaults(verb=_estimate)


def _estimate(options: argparse.Namespace) -> int:
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config
    from mim_scale.training.estimate import as_values, estimate, measure

    config = load_config(PretrainConfig, options.config, options.overrides)
    costs = estimate(config)
    measured = {policy: measure(config, policy) for policy in costs} if options.measure else {}
    if options.json:
        print(json.dumps(as_values(costs, measured)))
        return 0
    first = next(iter(costs.values()))
    train = config.train
    at_once = f", {train.views_at_once} views at once" if train.views_at_once else ""
    print(
        f"{options.config}: {first.parameters:,} parameters; one micro-batch of {train.micro_batch} in "
        f"{train.precision}{at_once}, on one rank that holds the whole model"
    )
    print(f"forward {first.flops_forward / 1e9:,.1f} GFLOP; weights and moments {first.state_bytes / GIB:.2f} GiB")
    print(f"{'checkpointing':<14}{'GFLOP':>10}{'activations':>14}{'in all':>10}" + ("   measured" if measured else ""))
    for policy, cost in costs.items():
        held, in_all = cost.activation_bytes / GIB, cost.bytes / GIB
        line = f"{policy:<14}{cost.flops / 1e9:>10,.1f}{held:>10.2f} GiB{in_all:>6.2f} GiB"
        if policy in measured:
            one = measured[policy]
            off = cost.bytes / one.peak_bytes - 1
            line += (
                f"   {one.flops / 1e9:,.1f} GFLOP, {one.peak_bytes / GIB:.2f} GiB (predicted {off:+.0%}), "
                f"{one.seconds:.1f} s"
            )
        print(line)
    return 0
