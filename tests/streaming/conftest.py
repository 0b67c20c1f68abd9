"""One small dataset and one Ray cluster for all streaming tests."""

from collections.abc import Iterator

import pytest

from mim_scale.store.dataset import Dataset
from tests.synthetic import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("streaming") / "store")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    from mim_scale.ray_cluster import ray_cluster

    with ray_cluster(4) as address:
        yield address
