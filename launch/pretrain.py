"""Pre-train a network; the run folder (`output` in the config) is taken up where it stands.

    deepspeed --num_gpus 2 launch/pretrain.py --config configs/demo.yaml                 2 ranks, on GPUs or CPU cores
    python launch/pretrain.py --config configs/demo.yaml output=runs/mine seed=1         1 rank, two settings replaced
    python -m torch.distributed.run --nproc_per_node 2 launch/pretrain.py --config configs/demo.yaml
    srun --ntasks-per-node 8 --gpus-per-task 1 python launch/pretrain.py --config configs/base.yaml
    deepspeed --hostfile hosts launch/pretrain.py --config configs/base.yaml             many machines

Ends with 0 (done), 2 (a mistake in settings or paths), 3 (data damaged), 75 (asked to stop, or a rank was lost: start
again) or 1 (diverged, or a bug). Launchers may turn a code of their ranks into one of their own. On a CPU a rank
computes on one thread unless OMP_NUM_THREADS is set: add ranks, not threads.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import json_override, load_config
from mim_scale.errors import MimScaleError, exit_with
from mim_scale.training.exit_report import tell_supervisor
from mim_scale.training.placement import read_placement
from mim_scale.training.stop import StopRequest

RANK_0_SPEAKS_S = 10.0
"""Longer than ranks of one launch start apart."""


def main() -> int:
    """Read the command line and train; returns the exit code."""
    stop = StopRequest().install()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; shipped ones are in configs/")
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment says the same")
    parser.add_argument(
        "--deepspeed_config", type=Path, metavar="JSON", help="more settings for DeepSpeed, as train.deepspeed"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to replace, for example train.steps=100"
    )
    arguments = parser.parse_intermixed_args()
    placement = read_placement(os.environ)
    tell_supervisor(os.environ, rank=placement.rank)
    try:
        file = arguments.deepspeed_config
        more = [] if file is None else [json_override("train.deepspeed", file)]
        config = load_config(PretrainConfig, arguments.config, [*more, *arguments.overrides])
    except MimScaleError as error:
        if placement.rank == 0:
            raise
        # Rank 0 says it; a launcher ends the others as soon as one is gone, so leave after it.
        deadline = time.monotonic() + RANK_0_SPEAKS_S
        while not stop.is_set and time.monotonic() < deadline:
            time.sleep(0.05)
        if not stop.is_set:
            # Rank 0 has no such error: this machine differs.
            print(f"error: rank {placement.rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    tell_supervisor(os.environ, output=str(Path(config.output).absolute()))
    # One thread a rank, set before torch is imported: numbers must not depend on how many cores a machine has.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from mim_scale.training.allocator import keep_freed_memory
    from mim_scale.training.loop import pretrain

    if config.train.keep_freed_memory and not torch.cuda.is_available():
        keep_freed_memory()
    return pretrain(config, stop)


if __name__ == "__main__":
    # Gloo's threads outlive their process group and were seen to abort a rank (code -6) whose run had ended well.
    exit_with(main, skip_teardown=True, tell=lambda code: tell_supervisor(os.environ, code=code))
