"""One small dataset, two packs of it, and one Ray cluster for all streaming tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mim_scale.store.dataset import Dataset
from mim_scale.streaming.pack_write import write_pack
from tests.streaming.packs import SHARD_BYTES, config_for
from tests.synthetic import make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("streaming") / "store")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    from mim_scale.ray_cluster import ray_cluster

    with ray_cluster(4) as address:
        yield address


@pytest.fixture(scope="session")
def pack(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions 0 to 23, nothing held out: what the contract of streams reads."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    outcome = write_pack(config_for(dataset.path), folder, 0, 24, SHARD_BYTES)
    assert outcome.num_written > 3
    return folder


@pytest.fixture(scope="session")
def split_pack(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Positions 5 to 12, one subject held out."""
    folder = tmp_path_factory.mktemp("packs") / "split"
    write_pack(config_for(dataset.path, 1), folder, 5, 13, SHARD_BYTES)
    return folder


@pytest.fixture
def copy(split_pack: Path, tmp_path: Path) -> Path:
    """The split pack, to be damaged."""
    return Path(shutil.copytree(split_pack, tmp_path / "copy"))
