"""One contract, two transports: batches in order, bit-equal to reading in line, bounded, loud, clean at the end."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mim_scale.errors import ConfigError, DamagedError
from mim_scale.sampling.order import micro_batches
from mim_scale.store.dataset import volume_folder
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream_threads import ThreadStream
from tests.synthetic import make_dataset, make_plan_config

CONFIG = make_plan_config()


def schedule(steps, micro_batch=2, first=0):
    return [range(p, p + micro_batch) for p in range(first, first + steps * micro_batch, micro_batch)]


def assert_equal(batch, expected):
    assert batch.keys == expected.keys
    np.testing.assert_array_equal(batch.positions, expected.positions)
    np.testing.assert_array_equal(batch.blocks, expected.blocks)
    assert batch.blocks.dtype == expected.blocks.dtype == np.int16
    for level, other in zip(batch.levels, expected.levels, strict=True):
        for name, array in vars(other).items():
            found = getattr(level, name)
            if name == "num_visible":
                assert found == array
                continue
            assert found.dtype == array.dtype == np.int32
            np.testing.assert_array_equal(found, array)


def damage_last_volume(dataset):
    """Remove the voxels of the volume that first appears at some index, and say which index and key."""
    reader = SampleReader(dataset, dataset.rows, CONFIG, seed=4)
    keys = [reader.sample(position).key for position in range(len(dataset.rows))]
    (volume_folder(dataset.path, keys[-1]) / "0" / "c" / "0" / "0" / "0").unlink()
    return reader, keys


@pytest.fixture(scope="module")
def reader(dataset):
    return SampleReader(dataset, dataset.rows, CONFIG, seed=4)


class StreamContract:
    """What every transport must do. Subclasses say how one is opened."""

    def open(self, reader, workers=2, read_ahead=3):
        raise NotImplementedError

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_batches_are_those_read_in_line(self, reader, workers):
        with self.open(reader, workers) as stream:
            items = schedule(7)
            for batch, positions in zip(stream.batches(items), items, strict=True):
                assert_equal(batch, reader.batch(positions))

    def test_ranks_together_read_the_batches_of_one(self, reader):
        """One, two and three ranks, two steps of six samples: the same samples in the same order, bit for bit."""
        alone = reader.batch(range(12))
        for world in (1, 2, 3):
            shares = []
            for rank in range(world):
                items = [part for step in range(2) for part in micro_batches(step, 6, 1, rank, world)]
                with self.open(reader) as stream:
                    shares.append(list(stream.batches(items)))
            rounds = 6 // world
            per_step = [share[step * rounds : (step + 1) * rounds] for step in range(2) for share in shares]
            found = [batch for part in per_step for batch in part]
            assert sum((batch.keys for batch in found), ()) == alone.keys
            for name in ("positions", "blocks"):
                together = np.concatenate([getattr(batch, name) for batch in found])
                np.testing.assert_array_equal(together, getattr(alone, name))

    def test_resume_is_an_integer_and_a_stream_serves_again(self, reader):
        with self.open(reader) as stream:
            straight = list(stream.batches(schedule(6)))
            resumed = list(stream.batches(schedule(3, first=6)))
        for batch, expected in zip(resumed, straight[3:], strict=True):
            assert_equal(batch, expected)

    def test_an_endless_schedule_is_read_a_bounded_way_ahead(self, reader):
        taken = []

        def endless():
            for position in itertools.count():
                taken.append(position)
                yield [position]

        with self.open(reader, workers=2, read_ahead=3) as stream:
            batches = stream.batches(endless())
            assert taken == []
            for count in range(1, 6):
                assert next(batches).positions.tolist() == [count - 1]
                assert len(taken) == count + 3
            batches.close()

    def test_an_empty_schedule_gives_nothing(self, reader):
        with self.open(reader) as stream:
            assert list(stream.batches([])) == []

    def test_the_first_error_comes_at_its_index(self, tmp_path):
        dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 4)
        reader, keys = damage_last_volume(dataset)
        with pytest.raises(DamagedError) as in_line:
            reader.sample(3)
        with self.open(reader, workers=2, read_ahead=4) as stream:
            batches = stream.batches(schedule(8, micro_batch=1))
            assert [next(batches).keys for _ in range(3)] == [(key,) for key in keys[:3]]
            with pytest.raises(DamagedError) as caught:
                next(batches)
            assert type(caught.value) is DamagedError
            assert str(caught.value) == str(in_line.value)
            assert keys[3] in str(caught.value)
            assert list(batches) == []

    def test_closing_twice_and_in_the_middle(self, reader):
        stream = self.open(reader)
        batches = stream.batches(schedule(50))
        next(batches)
        batches.close()
        stream.close()
        stream.close()


class TestThreadStream(StreamContract):
    def open(self, reader, workers=2, read_ahead=3):
        return ThreadStream(reader, workers, read_ahead)

    @pytest.fixture(autouse=True)
    def no_thread_stays(self):
        yield
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("mim-stream")]

    def test_without_workers_batches_are_read_in_line_when_asked_for(self, reader):
        items = schedule(7)
        asked = []
        with self.open(reader, workers=0) as stream:
            for batch, positions in zip(stream.batches(asked.append(p) or p for p in items), items, strict=True):
                assert asked[-1] == positions
                assert_equal(batch, reader.batch(positions))
                assert not [one.name for one in threading.enumerate() if one.name.startswith("mim-stream")]

    def test_without_workers_the_first_error_comes_at_its_index(self, tmp_path):
        dataset = make_dataset(tmp_path / "store", [(48, 48, 48)] * 4)
        reader, keys = damage_last_volume(dataset)
        with self.open(reader, workers=0) as stream:
            batches = stream.batches(schedule(8, micro_batch=1))
            assert [next(batches).keys for _ in range(3)] == [(key,) for key in keys[:3]]
            with pytest.raises(DamagedError, match=keys[3]):
                next(batches)
            assert list(batches) == []

    def test_an_error_in_the_consumer_ends_the_threads(self, reader):
        def consume():
            with ThreadStream(reader, 2, 3) as stream:
                next(stream.batches(schedule(50)))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            consume()


@pytest.mark.ray
class TestRayStream(StreamContract):
    @pytest.fixture(autouse=True)
    def _cluster(self, cluster):
        pass

    def open(self, reader, workers=2, read_ahead=3):
        from mim_scale.streaming.stream_ray import RayStream

        return RayStream(reader, workers, read_ahead)

    def test_killed_actors_change_nothing(self, reader):
        from mim_scale.ray_cluster import ray

        items = schedule(12)
        with self.open(reader, workers=2, read_ahead=4) as stream:
            for index, (batch, positions) in enumerate(zip(stream.batches(items), items, strict=True)):
                assert_equal(batch, reader.batch(positions))
                if index in {2, 6}:
                    actor = stream._actors[index % 2]
                    os.kill(ray.get(actor.process.remote()), signal.SIGKILL)

    def test_a_cluster_without_room_says_so(self, reader, monkeypatch):
        from mim_scale.errors import ClusterError

        monkeypatch.setattr("mim_scale.streaming.stream_ray.START_LIMIT_S", 12.0)
        started = time.monotonic()
        with pytest.raises(ClusterError, match=r"Ray started \d of 9 stream workers in 12 s: .*lower data.workers"):
            self.open(reader, workers=9)
        assert time.monotonic() - started < 60
        with self.open(reader, workers=3) as stream:
            assert len(list(stream.batches(schedule(2)))) == 2

    def test_another_dataset_at_the_same_path_is_refused(self, tmp_path):
        from mim_scale.errors import StoreError

        dataset = make_dataset(tmp_path / "store", [(48, 48, 48)])
        reader = SampleReader(dataset, dataset.rows, CONFIG, seed=4)
        make_dataset(tmp_path / "store", [(48, 48, 48)], seed=9)
        with pytest.raises(StoreError, match="the sender has"):
            self.open(reader)


def test_open_stream_follows_the_config(dataset):
    from mim_scale.streaming.stream import open_stream
    from tests.training.standin import small_config

    config = small_config()
    with open_stream(config, dataset, dataset.rows) as stream:
        assert isinstance(stream, ThreadStream)
        batch = next(stream.batches([range(2)]))
    assert_equal(batch, SampleReader(dataset, dataset.rows, config.plan, config.seed).batch(range(2)))
    with pytest.raises(ConfigError, match="no held-out volumes"):
        open_stream(config, dataset, (), held_out=True)


OWN_CLUSTER = """
import sys
import numpy as np
from mim_scale.store.dataset import Dataset
from mim_scale.streaming.stream import open_stream
from tests.training.standin import small_config

dataset = Dataset.open(sys.argv[1])
config = small_config()
ray_config = config.model_copy(update={"data": config.data.model_copy(update={"transport": "ray"})})
with open_stream(config, dataset, dataset.rows) as threads, open_stream(ray_config, dataset, dataset.rows) as actors:
    schedule = [range(0, 2), range(2, 4)]
    for a, b in zip(threads.batches(schedule), actors.batches(schedule), strict=True):
        assert np.array_equal(a.blocks, b.blocks) and a.keys == b.keys
    assert sys.modules["ray"].is_initialized()
assert not sys.modules["ray"].is_initialized()
print(type(actors).__name__)
"""


@pytest.mark.ray
def test_without_an_address_a_ray_stream_brings_its_own_cluster(dataset):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER, str(dataset.path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=clean,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["RayStream"]
