"""Run a launch command, and start it again when it ended for a reason that starting again cures.

    python launch/supervise.py -- deepspeed --num_gpus 8 launch/pretrain.py --config configs/base.yaml
    python launch/supervise.py --restarts 3 --within 3600 -- torchrun --nproc_per_node 8 launch/pretrain.py --config ...

Started again: a rank was lost or killed, the launcher was killed, a run ended with 75 that nobody here asked to stop.
Never started again: done (0), a mistake (2), damaged data (3), a loss that diverged or a bug (1). SIGTERM, SIGUSR1 and
SIGINT are passed on to the ranks, which finish their step, save and end; then this ends with 75: the scheduler starts
it again. No process of the command outlives it, nor the supervisor, whichever is killed and however. Linux only.

On several machines: one supervisor on each, with the same command but for the number of the node.
"""

import argparse

from mim_scale.errors import ConfigError, exit_with
from mim_scale.training.supervise import Supervisor


def main() -> int:
    """Read the command line and supervise; returns the run's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=5, help="restarts without a new step, at most (default 5)")
    parser.add_argument("--within", type=float, metavar="S", help="seconds of restarts without a new step, at most")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="launcher, script, settings")
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise ConfigError("no command to run: put it after --, for example -- python launch/pretrain.py --config X")
    return Supervisor(command, arguments.restarts, arguments.within).run()


if __name__ == "__main__":
    exit_with(main)
