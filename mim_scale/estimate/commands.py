"""`mim-scale estimate`: what is typed in, what is shown. Heavy imports wait."""

import argparse
import json
from pathlib import Path
from typing import Any

GIB = 2**30
MTBF_H = 6000.0
RESTART_S = 300.0
LATENCY_US = 20.0
MOST = 10**12
"""Of any number that is typed in: products of several stay numbers."""


def add_estimate(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "estimate",
        help="what a run takes, before it is run: arithmetic, memory, hours, disk",
        description="By itself: arithmetic and memory of a micro-batch under every checkpointing policy; nothing is "
        "computed. With a cluster or a corpus: steps, disk and memory of the run; with the pace of one rank and a "
        "link: hours, and weak scaling. With --fit: settings that fit a memory.",
    )
    verb.add_argument("--config", type=Path, required=True)
    verb.add_argument("overrides", nargs="*", metavar="key=value")
    verb.add_argument(
        "--measure", action="store_true", help="also run a micro-batch of each policy, and say how far off"
    )
    pace = verb.add_argument_group("the pace of one rank").add_mutually_exclusive_group()
    pace.add_argument(
        "--run-steps",
        type=int,
        metavar="N",
        help="make so many training steps here, 20 say: of the config's store, or of noise where there is none",
    )
    pace.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="a run's folder, or what --run-steps --json printed"
    )
    _add_cluster(verb)
    corpus = verb.add_argument_group("the corpus")
    corpus.add_argument("--volumes", type=int, metavar="N", help="(default: those of the store, where there is one)")
    corpus.add_argument("--plan", type=Path, metavar="JSON", help="what `mim-scale data plan --json` printed")
    corpus.add_argument("--epochs", type=float, metavar="N", help="in place of train.steps")
    verb.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="RUN", help="a run to compare with; repeatable"
    )
    verb.add_argument("--fit", action="store_true", help="propose micro-batch, policy and ZeRO stage for a memory")
    verb.add_argument(
        "--memory", type=float, metavar="GIB", help="of a rank, for --fit and auto (default: what is free here)"
    )
    verb.add_argument("--json", action="store_true", help="for scripts")
    verb.set_defaults(verb=_estimate)


def _add_cluster(verb: argparse.ArgumentParser) -> None:
    cluster = verb.add_argument_group("the cluster")
    cluster.add_argument("--nodes", type=int, metavar="N", help="(default: 1)")
    cluster.add_argument("--ranks-per-node", type=int, metavar="N", help="(default: those of --link, else 1)")
    cluster.add_argument("--world", type=int, metavar="N", help="ranks in all, in place of --nodes")
    cluster.add_argument("--cores", type=int, metavar="N", help="of a node (default: those of the machine measured on)")
    cluster.add_argument("--device", choices=("cpu", "cuda"), help="(default: that of --link, else of this machine)")
    cluster.add_argument("--link", type=Path, metavar="JSON", help="what launch/measure_link.py --out wrote")
    cluster.add_argument(
        "--network",
        metavar="GBIT[,US]",
        help=f"between nodes, where --link has not measured it: Gbit/s of a node, us of a message ({LATENCY_US:g})",
    )
    cluster.add_argument(
        "--mtbf",
        type=float,
        metavar="H",
        help=f"hours between failures of one node (default: {MTBF_H:g})",
    )
    cluster.add_argument(
        "--restart",
        type=float,
        metavar="S",
        help=f"seconds to go on after one (default: {RESTART_S:g})",
    )


def _estimate(options: argparse.Namespace) -> int:
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config

    _refuse_odd(options)
    config = load_config(PretrainConfig, options.config, options.overrides)
    is_of_run = any(getattr(options, name) is not None for name in _OF_RUN)
    is_of_run = is_of_run or (options.device is not None and not options.fit)
    _refuse_idle(config, options, is_of_run)
    values: dict[str, Any] = {}
    cost = None
    if options.fit:
        from mim_scale.estimate.run import fit_memory

        config, cost = fit_memory(config, options, values)
    if is_of_run:
        from mim_scale.estimate.run import estimate_run

        estimate_run(config, options, values, cost)
    elif not options.fit or options.measure:
        _policies(config, options, values)
    if options.json:
        print(json.dumps(values))
    return 0


_OF_RUN = ("run_steps", "source", "nodes", "ranks_per_node", "world", "volumes", "plan", "epochs", "link")
_OF_PACE = ("cores", "network", "mtbf", "restart")


def _refuse_idle(config: Any, options: argparse.Namespace, is_of_run: bool) -> None:
    """Raise ConfigError for options that would change nothing."""
    from mim_scale.errors import ConfigError

    if options.run_steps is None and options.source is None:
        idle = [name for name in _OF_PACE if getattr(options, name) is not None]
        if idle:
            raise ConfigError(
                f"--{idle[0]} changes how long a run takes, which needs a pace: give --run-steps or --from"
            )
    if options.memory is not None and not options.fit and not (is_of_run and _is_auto(config)):
        raise ConfigError(
            "--memory decides what --fit proposes and, for a run on a cluster, what is auto: give --fit, or --world "
            "with train.activation_checkpointing=auto or train.zero_stage=auto"
        )
    if options.measure and is_of_run:
        raise ConfigError("--measure is of a micro-batch alone: leave it out, or ask for no run on a cluster")


def _is_auto(config: Any) -> bool:
    from mim_scale.estimate.asked import is_auto

    return is_auto(config)


def _refuse_odd(options: argparse.Namespace) -> None:
    from mim_scale.errors import ConfigError

    for name in ("run_steps", "nodes", "ranks_per_node", "world", "cores", "volumes"):
        value = getattr(options, name)
        least = 5 if name == "run_steps" else 1
        if value is not None and not least <= value <= MOST:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected {least} or more, up to {MOST:g}")
    for name in ("mtbf", "restart", "epochs", "memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= MOST:
            raise ConfigError(f"--{name} is {value:g}, expected more than 0, up to {MOST:g}")
    if options.world is not None and options.nodes is not None:
        raise ConfigError("--world and --nodes say the same twice: give one, with --ranks-per-node")
    if options.beside and options.run_steps is None and options.source is None:
        raise ConfigError("--beside compares runs with a prediction, which needs a pace: give --run-steps or --from")


def _policies(config: Any, options: argparse.Namespace, values: dict[str, Any]) -> None:
    from mim_scale.bar import Bar
    from mim_scale.estimate.micro_batch import as_values, estimate, measure
    from mim_scale.methods.cost import FEWEST_FIRST

    costs: dict[Any, Any] = {}
    measured: dict[Any, Any] = {}
    with Bar("policies") as bar:
        bar.began(0, len(FEWEST_FIRST))
        for policy in FEWEST_FIRST:
            costs |= estimate(config, (policy,))
            if options.measure:
                measured[policy] = measure(config, policy)
            bar.advanced()
    values["policies"] = as_values(costs, measured)
    if options.json:
        return
    first = next(iter(costs.values()))
    train = config.train
    at_once = f", {train.views_at_once} views at once" if train.views_at_once else ""
    print(
        f"{options.config}: {first.parameters:,} parameters; one micro-batch of {train.micro_batch} in "
        f"{train.precision}{at_once}, on one rank that holds the whole model"
    )
    held = (first.state_bytes + first.gradient_bytes) / GIB
    print(f"forward {first.flops_forward / 1e9:,.1f} GFLOP; weights, moments and gradients {held:.2f} GiB")
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
    if config.checkpoint.background:
        copy = first.state_bytes / GIB
        print(f"besides, in host memory, for saves in the background: {copy:.2f} GiB, shared by the ranks that write")
