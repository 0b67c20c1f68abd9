"""A sample is its plan and the voxels under it; air where the volume ends."""

import pickle

import numpy as np
import pytest

from mim_scale.errors import ConfigError, DamagedError
from mim_scale.sampling.order import volume_at
from mim_scale.sampling.plan import plan
from mim_scale.store.dataset import volume_folder
from mim_scale.store.geometry import whole_box
from mim_scale.store.volume import AIR_HU
from mim_scale.streaming.reader import SampleReader
from tests.synthetic import make_dataset, make_plan_config

CONFIG = make_plan_config()


def test_a_sample_is_the_slice_of_its_volume_in_air(dataset):
    reader = SampleReader(dataset, dataset.rows[::-1], CONFIG, seed=11)
    for position in range(12):
        sample = reader.sample(position)
        row = dataset.rows[volume_at(position, len(dataset.rows), 11)]
        planned = plan(11, position, row.shape, CONFIG)
        assert (sample.position, sample.key, sample.plan.box) == (position, row.key, planned.box)
        margin = 48
        around = np.pad(dataset.reader(row).read_box(0, whole_box(row.shape)), margin, constant_values=AIR_HU)
        expected = around[tuple(slice(s + margin, s + margin + 48) for s in planned.box.start)]
        np.testing.assert_array_equal(sample.block, expected)
        assert sample.block.dtype == np.int16


def test_held_out_samples_are_their_own(dataset):
    batches = [SampleReader(dataset, dataset.rows, CONFIG, 3, held).batch(range(8)) for held in (False, True)]
    assert not np.array_equal(batches[0].levels[1].tokens, batches[1].levels[1].tokens)
    assert sorted(set(batches[1].keys)) == sorted(row.key for row in dataset.rows)


def test_a_batch_stacks_samples_in_the_order_asked(dataset):
    reader = SampleReader(dataset, dataset.rows, CONFIG, seed=1)
    batch = reader.batch([5, 2, 9])
    assert batch.positions.tolist() == [5, 2, 9]
    assert batch.blocks.shape == (3, 48, 48, 48)
    for place, position in enumerate([5, 2, 9]):
        sample = reader.sample(position)
        np.testing.assert_array_equal(batch.blocks[place], sample.block)
        for stacked, single in zip(batch.levels, sample.plan.levels, strict=True):
            for name in ("starts", "cell", "draws"):
                np.testing.assert_array_equal(getattr(stacked, name)[place], getattr(single, name))
            np.testing.assert_array_equal(stacked.parent, single.parent)
            tokens = np.concatenate([single.visible, single.hidden], axis=1)
            np.testing.assert_array_equal(stacked.tokens[place], tokens)
            assert stacked.num_visible[place] == single.visible.shape[1]


def test_a_copy_of_the_reader_gives_the_same_bits(dataset):
    reader = SampleReader(dataset, dataset.rows, CONFIG, seed=1)
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.batch(range(4)).blocks, reader.batch(range(4)).blocks)


def test_no_rows_is_a_mistake_in_the_config(dataset):
    with pytest.raises(ConfigError, match="no held-out volumes"):
        SampleReader(dataset, (), CONFIG, 0, held_out=True)


def test_a_damaged_chunk_stops_the_sample(tmp_path):
    dataset = make_dataset(tmp_path / "store", [(48, 48, 48)])
    (volume_folder(dataset.path, dataset.rows[0].key) / "0" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(DamagedError, match=rf"volume {dataset.rows[0].key}: level 0, chunk \(0, 0, 0\)"):
        SampleReader(dataset, dataset.rows, CONFIG, 0).sample(0)
