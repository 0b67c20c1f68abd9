"""Pre-train, on one machine or many; start the same command again to go on.

    python launch/pretrain.py --config configs/demo.yaml [key=value ...]                       one process
    deepspeed --num_gpus 2 launch/pretrain.py --config configs/demo.yaml                       two ranks here (CPU: gloo)
    torchrun --nproc-per-node 8 launch/pretrain.py --config configs/base.yaml                  eight ranks here
    deepspeed --hostfile hosts launch/pretrain.py --config configs/base.yaml                   several machines, by ssh
    srun --ntasks-per-node 8 python launch/pretrain.py --config configs/base.yaml              several machines, by Slurm

Exit codes: 0 done, 2 a mistake in config, store or run folder, 3 damaged data, 75 asked to stop and saved (start again), 1 a bug.
"""

import argparse
import os
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import exit_with
from mim_scale.training.placement import read_placement
from mim_scale.training.stop import StopRequest


def main() -> int:
    """Read the command line, meet the other ranks, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment says the same")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    stop = StopRequest().install()
    placement = read_placement(os.environ)
    config = load_config(PretrainConfig, options.config, options.overrides)
    # Torch comes in here: a mistake above is answered at once.
    from mim_scale.training.loop import pretrain
    from mim_scale.training.ranks import joined

    with joined(placement) as ranks:
        return pretrain(config, ranks, stop)


if __name__ == "__main__":
    exit_with(main)
