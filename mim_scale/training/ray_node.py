"""One Ray cluster for the ranks of a machine, when batches come through Ray and the user names no cluster."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mim_scale.config import DataConfig
from mim_scale.training.ranks import Ranks

SETTINGS = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
LOOPBACK_STAYS = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""For whoever joins: Ray would look for 127.0.0.1 at the machine's outer address, where our cluster does not listen."""


@contextmanager
def ray_for_ranks(data: DataConfig, ranks: Ranks) -> Iterator[None]:
    """Let the first rank of each machine start a cluster and the others join it; it ends with the `with`.

    Raises:
        ClusterError: a cluster did not start.
    """
    if data.transport != "ray" or "RAY_ADDRESS" in os.environ:
        yield
        return
    host = socket.gethostname()
    ranks_here = sum(other == host for other in ranks.gather_objects(host))
    with ExitStack() as stack:

        def start() -> dict[str, str]:
            if ranks.local_rank != 0:
                return {}
            from mim_scale.ray_cluster import ray_cluster

            address = stack.enter_context(ray_cluster(ranks_here * data.workers))
            own = {name: os.environ[name] for name in SETTINGS if name in os.environ}
            return {**own, **LOOPBACK_STAYS, "RAY_ADDRESS": address}

        told = ranks.gather_objects((host, ranks.together(start)))
        if ranks.local_rank != 0:
            # Set before ray is imported: it reads how to authenticate once. Two launchers on one machine make two
            # clusters, and the nearest one before this rank is its own.
            started = [settings for other, settings in told[: ranks.rank] if other == host and settings]
            os.environ.update(started[-1])
            stack.callback(_forget)
        yield
        # The cluster goes last: whoever still reads from it would call that an error.
        ranks.gather([0.0])


def _forget() -> None:
    for name in (*SETTINGS, *LOOPBACK_STAYS):
        os.environ.pop(name, None)
