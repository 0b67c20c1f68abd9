"""What a rank holds: sums that can be worked out by hand."""

import pytest

from mim_scale.methods.cost import Cost
from mim_scale.training.rank_memory import rank_memory
from tests.models.small import changed, small_config

COST = Cost(1000, 0, 0, activation_bytes=70, gradient_bytes=4000, state_bytes=12000, batch_bytes=5, tensors=10)


def memory_of(world: int, writers: int = 1, is_on_host: bool = True, **train: object):
    config = changed(small_config(), train={"engine": "deepspeed", "batch": 64, "micro_batch": 1} | train)
    return rank_memory(COST, config, world, writers, is_on_host)


def test_a_rank_alone_holds_all() -> None:
    plain = memory_of(1, engine="plain")
    assert plain.device == COST.bytes
    assert memory_of(1, zero_stage=0).device == COST.bytes
    # ZeRO's own copy of the weights, and its buffer.
    assert memory_of(1, zero_stage=1).device == COST.bytes + 4000 + 4000


@pytest.mark.parametrize("is_background", [True, False])
def test_the_copy_of_a_save_is_divided_among_those_who_write(is_background: bool) -> None:
    config = changed(small_config(), train={"batch": 64}, checkpoint={"background": is_background})
    for writers in (1, 4):
        found = rank_memory(COST, config, 4, writers, True)
        assert found.host_copy == (12000 / writers if is_background else 0)
        assert found.needed(is_on_host=True) == found.device + found.host_copy
        assert found.needed(is_on_host=False) == found.device


def test_higher_stages_divide_more() -> None:
    devices = [memory_of(8, zero_stage=stage).device for stage in (0, 1, 3)]
    assert devices[0] > devices[1] > memory_of(16, zero_stage=1).device
    assert memory_of(64, zero_stage=2).gradients == 4000 / 64
    # Gradients of several micro-batches are added up whole before they are exchanged.
    assert memory_of(32, zero_stage=2).gradients == 4000
    assert memory_of(8, zero_stage=3).weights == 500


def test_a_buffer_that_is_reserved_whole_counts_on_a_gpu() -> None:
    assert memory_of(8, zero_stage=1, is_on_host=False).buffers == 2e9
    assert memory_of(8, zero_stage=1, is_on_host=True).buffers == 4000


def test_offloaded_moments_are_in_the_hosts_memory() -> None:
    kept, offloaded = memory_of(8, zero_stage=1), memory_of(8, zero_stage=1, offload_optimizer=True)
    assert offloaded.device == kept.device - kept.optimizer
    assert offloaded.host_optimizer >= kept.optimizer
