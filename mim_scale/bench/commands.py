"""`mim-scale bench`: what is typed in, what is shown. Heavy imports wait."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mim_scale.training.progress import PLAIN_EVERY_S, duration

DEFAULT_CONFIGS = [Path("configs/tiny.yaml"), Path("configs/base.yaml")]
GIB = 2**30


def add_bench(verbs: Any) -> None:
    """Add the verb."""
    bench = verbs.add_parser("bench", help="measure on this machine").add_subparsers(required=True, metavar="WHAT")
    step = bench.add_parser(
        "step",
        help="a step of the network against the same one from stock layers",
        description="On a CPU: CPU seconds on one thread, ours and the reference turn by turn, and peak memory. On a "
        "GPU: samples a second in bfloat16, eager and compiled, utilisation and peak memory.",
    )
    step.add_argument("--config", type=Path, nargs="+", default=DEFAULT_CONFIGS, help="(default: tiny and base)")
    step.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings to replace, in all configs")
    step.add_argument("--ratios", type=float, nargs="*", default=[0.6, 0.75], help="of the encoder (default: 0.6 0.75)")
    step.add_argument("--runs", type=int, default=5, help="(default: %(default)s)")
    step.add_argument("--views-at-once", type=int, default=4, help="of the whole step (default: %(default)s)")
    step.add_argument("--no-step", action="store_true", help="leave the whole step out")
    step.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    step.add_argument("--ours-only", action="store_true", help="only a training step of ours, AdamW included")
    step.add_argument(
        "--against",
        type=Path,
        metavar="CONFIG",
        help="only the step, beside the stock one of this, by the token",
    )
    step.add_argument("--bf16", action="store_true", help="only the step, in bfloat16 beside float32")
    step.add_argument(
        "--default-allocator", action="store_true", help="do not keep freed memory (train.keep_freed_memory)"
    )
    step.add_argument("--json", action="store_true", help="for scripts")
    step.set_defaults(verb=_bench_step)


def _bench_step(options: argparse.Namespace) -> int:
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config
    from mim_scale.errors import ConfigError

    if min(options.runs, options.views_at_once) < 1 or not all(0 <= ratio < 1 for ratio in options.ratios):
        raise ConfigError("--runs and --views-at-once are 1 or more, --ratios are shares from 0 to below 1")
    if options.bf16 and options.against:
        raise ConfigError("--bf16 and --against each ask for one comparison alone: give one of them")
    configs = {path: load_config(PretrainConfig, path, options.set) for path in options.config}
    import torch

    if torch.cuda.is_available() and (options.bf16 or options.against):
        name = "--bf16" if options.bf16 else "--against"
        raise ConfigError(f"{name} compares CPU seconds, and this machine has a GPU: set CUDA_VISIBLE_DEVICES= empty")
    if torch.cuda.is_available():
        return _on_gpu(configs, options)
    return _on_cpu(configs, options)


def _on_cpu(configs: dict[Path, Any], options: argparse.Namespace) -> int:
    import torch

    from mim_scale.bench.step import benchmark_config, check_comparable
    from mim_scale.training.allocator import keep_freed_memory

    configs = {path: benchmark_config(config, options.views_at_once) for path, config in configs.items()}
    if options.against or not options.ours_only:
        for config in configs.values():
            check_comparable(config)
    kept = not options.default_allocator and keep_freed_memory()
    torch.set_num_threads(1)
    say = _silent if options.json else _say
    allocator = "freed memory kept" if kept else "the C library's default allocator"
    precision = "fp32 and bf16" if options.bf16 else "fp32"
    where = f"{platform.machine()}, torch {torch.__version__}, {precision}, one thread"
    say(f"{where}, {allocator}; {options.runs} runs in turns")
    found = {str(path): _of_config(path, config, options, kept, say) for path, config in configs.items()}
    if options.json:
        print(json.dumps({"torch": torch.__version__, "freed_memory_kept": kept, "configs": found}))
    return 0


def _of_config(path: Path, config: Any, options: argparse.Namespace, kept: bool, say: Any) -> dict[str, Any]:
    from mim_scale.bench.arithmetic import measure_work, visible_flops
    from mim_scale.bench.step import compare, encoder_sides, peak_bytes, step_sides, training_seconds

    name, parts = path.stem, []
    if options.against:
        return _of_lighter(path, config, options, say)
    if options.bf16:
        return _of_precisions(name, config, options.runs, say)
    if not options.ours_only:
        for ratio in options.ratios:
            part = f"encoder, 4 views, {ratio} hidden"
            sides = _shown(f"{name} {part}", encoder_sides(config, ratio), options.runs + 1, say)
            compared = compare(part, sides, options.runs)
            if not options.no_memory:
                compared.peak_bytes.update({side: peak_bytes(config, side, ratio, kept) for side in compared.seconds})
            parts.append(_told(name, compared, say))
        if not options.no_step:
            part = "step, one sample"
            sides = _shown(f"{name} {part}", step_sides(config), options.runs + 1, say)
            compared = compare(part, sides, options.runs)
            if not options.no_memory:
                compared.peak_bytes.update({side: peak_bytes(config, side, None, kept) for side in compared.seconds})
            parts.append(_told(name, compared, say))
    cpu, wall = training_seconds(config, options.runs)
    work, needed = measure_work(_pass_of(config)), visible_flops(config)
    least = "" if needed is None else f", by formula {needed / 1e9:,.1f} for visible tokens alone"
    say(
        f"{name}: training step with AdamW {cpu:.3f} CPU s, {config.train.micro_batch / wall:.2f} samples a second; "
        f"{work.flops / 1e9:,.1f} GFLOP{least}, {work.flops / 1e9 / cpu:.1f} GFLOP/s; "
        f"{work.moved_bytes / 1e9:.1f} GB moved"
    )
    return {
        "parts": parts,
        "training_step": {"cpu_seconds": cpu, "wall_seconds": wall},
        "flops": work.flops,
        "visible_flops": needed,
        "moved_bytes": work.moved_bytes,
    }


def _of_lighter(path: Path, config: Any, options: argparse.Namespace, say: Any) -> dict[str, Any]:
    from mim_scale.bench.step import benchmark_config, check_comparable, in_turns, lighter_sides, tokens_seen, told
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config

    reference = benchmark_config(load_config(PretrainConfig, options.against, []), options.views_at_once)
    check_comparable(reference)
    say(f"{options.against.stem}: ours and stock make one pass each, to see that they are equal")
    sides = lighter_sides(config, reference)
    seconds = in_turns(_shown(f"{path.stem} and stock {options.against.stem}", sides, options.runs, say), options.runs)
    (visible, tokens), (of_visible, of_tokens) = tokens_seen(config), tokens_seen(reference)
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["stock"], strict=True))
    by_visible, by_tokens = ratio * visible / of_visible, ratio * tokens / of_tokens
    say(
        f"{path.stem}, ours, {told(seconds['ours'])} CPU s for {visible:,} visible of {tokens:,} tokens; "
        f"{options.against.stem}, stock, {told(seconds['stock'])} for {of_visible:,} of {of_tokens:,}: "
        f"{by_visible:.2f} times less a visible token, {by_tokens:.2f} a token"
    )
    return {"cpu_seconds": seconds, "ratio": {"a_visible_token": by_visible, "a_token": by_tokens}}


def _of_precisions(name: str, config: Any, runs: int, say: Any) -> dict[str, Any]:
    from mim_scale.bench.step import in_turns, precision_sides, told

    seconds = in_turns(_shown(f"{name} step", precision_sides(config), runs, say), runs)
    gain = statistics.median(a / b for a, b in zip(seconds["fp32"], seconds["bf16"], strict=True))
    say(f"{name} step: fp32 {told(seconds['fp32'])}, bf16 {told(seconds['bf16'])} CPU s: bf16 takes 1 / {gain:.2f}")
    return {"cpu_seconds": seconds, "ratio": gain}


def _pass_of(config: Any) -> Any:
    """One forward and backward pass of a config's method, as a call."""
    import torch

    from mim_scale.methods.build import build_method
    from mim_scale.methods.noise import noise_batch

    batch, method = noise_batch(config, torch.device("cpu")), build_method(config)

    def passes() -> None:
        method(batch).total.backward()

    return passes


def _told(name: str, compared: Any, say: Any) -> dict[str, Any]:
    from mim_scale.bench.step import told

    others = [side for side in compared.seconds if side != "ours"]
    say(
        f"{name} {compared.part}: "
        + ", ".join(f"{side} {told(seconds)}" for side, seconds in compared.seconds.items())
        + " CPU s; ours is "
        + ", ".join(f"{compared.ratio(side):.2f} x {side}" for side in others)
        + f"; outputs apart {compared.outputs_apart:.1e}, gradients {compared.gradients_apart:.1e}"
    )
    if compared.peak_bytes:
        say("  peak " + ", ".join(f"{side} {size / GIB:.2f} GiB" for side, size in compared.peak_bytes.items()))
    return {
        "part": compared.part,
        "cpu_seconds": compared.seconds,
        "ratio": {side: compared.ratio(side) for side in others},
        "outputs_apart": compared.outputs_apart,
        "gradients_apart": compared.gradients_apart,
        "peak_bytes": compared.peak_bytes,
    }


def _on_gpu(configs: dict[Path, Any], options: argparse.Namespace) -> int:
    import dataclasses

    import torch

    from mim_scale.bench.gpu import measure_on_gpu

    say = _silent if options.json else _say
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {options.runs} runs")
    found = {}
    for path, config in configs.items():
        rows = measure_on_gpu(config, options.runs)
        found[str(path)] = [dataclasses.asdict(row) for row in rows]
        for row in rows:
            mfu = "-" if row.mfu is None else f"{row.mfu:.1%}"
            moved = "" if row.gigabytes_per_second is None else f", {row.gigabytes_per_second:,.0f} GB/s"
            say(
                f"{path.stem} {row.way}: {row.samples_per_second:.2f} samples/s, MFU {mfu}{moved}, "
                f"peak {row.peak_bytes / GIB:.2f} GiB, first loss {row.loss:.5f}"
            )
    if options.json:
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "configs": found}))
    return 0


def _shown(part: str, sides: dict[str, Any], passes: int, say: Any) -> dict[str, Any]:
    """The sides, each of which makes so many passes and tells now and then how many are left.

    In lines, as a bar has a thread, whose CPU seconds would be counted too.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    last_told = time.monotonic()

    def told(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def passes_once() -> Any:
            nonlocal last_told
            start = time.monotonic()
            result = run()
            now = time.monotonic()
            taken[name].append(now - start)
            left = {side: passes - len(seconds) for side, seconds in taken.items()}
            if now - last_told >= PLAIN_EVERY_S and all(taken.values()) and any(left.values()):
                last_told = now
                seconds = sum(count * statistics.mean(taken[side]) for side, count in left.items())
                done = passes * len(sides) - sum(left.values())
                say(f"{part}: {done} of {passes * len(sides)} passes, {duration(seconds)} left")
            return result

        return passes_once

    return {name: (module, told(name, run)) for name, (module, run) in sides.items()}


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    pass
