"""Time the links between ranks, within a node and between nodes, for `mim-scale estimate --link`.

    torchrun --nproc_per_node 2 launch/measure_link.py --out link.json
    srun --ntasks-per-node 8 --gpus-per-task 1 python launch/measure_link.py --out /shared/link.json

Ends with 0, 2 (a mistake), or 75 (a rank did not come or went away: start again).
"""

import argparse
import json
import os
from pathlib import Path

from mim_scale.errors import exit_with
from mim_scale.training.placement import read_placement


def main() -> int:
    """Read the command line and measure; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where rank 0 writes what was measured")
    parser.add_argument("--local_rank", type=int, help="set by launchers; the environment says the same")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mim_scale.commit import write_file
    from mim_scale.estimate.link import as_values, measure_links
    from mim_scale.training.ranks import joined

    placement = read_placement(os.environ)
    with joined(placement) as ranks:
        say = print if ranks.rank == 0 else lambda line: None
        links = ranks.together(lambda: measure_links(ranks, say))
        ranks.on_first(lambda: write_file(options.out, json.dumps(as_values(links), indent=1).encode()))
        ranks.gather([0.0])
    return 0


if __name__ == "__main__":
    exit_with(main, skip_teardown=True)
