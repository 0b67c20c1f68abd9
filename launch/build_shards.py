"""Build a store from a folder of CT on a Ray cluster, or on this machine; start it again to go on.

One machine:        python launch/build_shards.py --config configs/build.yaml source=/data/ct store=/data/store
A running cluster:  ray job submit --address http://HEAD:8265 --working-dir . -- \\
                        python launch/build_shards.py --config configs/build.yaml source=/shared/ct store=/shared/store

Source and store are paths that every node sees. Under `ray job submit` the cluster is joined through RAY_ADDRESS, which
Ray sets; head, nodes and submitter need the same RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH. launch/slurm and launch/k8s
hold what brings up a cluster for one build.
"""

import argparse
from pathlib import Path

from data_pipeline.commands.build import build
from mim_scale.config import BuildConfig
from mim_scale.config_file import load_config
from mim_scale.errors import exit_with


def main() -> int:
    """Read the config and its overrides, build, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file; configs/build.yaml is one to start from")
    parser.add_argument("--nodes", type=int, default=1, help="wait until so many nodes have joined the cluster")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as source=/data/ct spacing=1.5")
    options = parser.parse_intermixed_args()
    config = load_config(BuildConfig, options.config, options.overrides)
    if options.nodes == 1:
        return build(config)
    from mim_scale.ray_cluster import ray_cluster, wait_for_nodes

    with ray_cluster():
        # The build asks once how many cores there are.
        wait_for_nodes(options.nodes)
        return build(config)


if __name__ == "__main__":
    exit_with(main, skip_teardown=True)
