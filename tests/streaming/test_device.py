"""The last hop changes the container and nothing else."""

import warnings

import numpy as np
import pytest
import torch

from mim_scale.streaming.device import to_device
from mim_scale.streaming.reader import SampleReader
from tests.synthetic import make_plan_config


@pytest.fixture
def batch(dataset):
    return SampleReader(dataset, dataset.rows, make_plan_config(), seed=2).batch(range(3))


def assert_same(tensors, batch):
    assert tensors.keys == batch.keys
    assert tensors.blocks.dtype == torch.int16
    np.testing.assert_array_equal(tensors.blocks.cpu(), batch.blocks)
    np.testing.assert_array_equal(tensors.positions.cpu(), batch.positions)
    for level, expected in zip(tensors.levels, batch.levels, strict=True):
        assert vars(level).keys() == vars(expected).keys()
        for name, array in vars(expected).items():
            if name == "num_visible":
                assert level.num_visible == expected.num_visible
                continue
            assert getattr(level, name).dtype == torch.int64
            np.testing.assert_array_equal(getattr(level, name).cpu(), array)


def test_cpu(batch):
    assert_same(to_device(batch, "cpu"), batch)


def test_read_only_arrays_are_copied_without_a_warning(batch):
    batch.blocks.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = to_device(batch, torch.device("cpu"))
    assert_same(tensors, batch)
    tensors.blocks.zero_()
    assert batch.blocks.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(batch):
    tensors = to_device(batch, "cuda")
    assert tensors.blocks.device.type == "cuda"
    assert_same(tensors, batch)
