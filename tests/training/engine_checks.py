"""The engine contract, run by every rank of one job; rank 0 prints the differences as one line of JSON.

`python -m tests.training.engine_checks` or the same under `torch.distributed.run --nproc_per_node N -m`.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from mim_scale.config import PretrainConfig
from mim_scale.training import engine_deepspeed
from mim_scale.training.engine import Engine, build_engine
from mim_scale.training.placement import read_placement
from mim_scale.training.ranks import Ranks, joined
from mim_scale.training.saving import State
from tests.training.standin import StandIn, small_config, standin_batch, whole_state

STEPS = 6
BATCH = 8


def config_of(engine: str, **train: object) -> PretrainConfig:
    """A config whose engine is the one under test, with two micro-batches a step at world 2 and four at world 1."""
    return small_config(engine=engine, batch=BATCH, micro_batch=2, **train)


@contextmanager
def built(config: PretrainConfig, ranks: Ranks) -> Iterator[Engine]:
    """An engine around the same initial weights."""
    torch.manual_seed(5)
    engine = build_engine(StandIn(), config, ranks)
    try:
        yield engine
    finally:
        engine.close()


def advance(engine: Engine, ranks: Ranks, steps: range) -> list[list[float]]:
    """Loss (mean over ranks) and gradient norm of each step."""
    told = []
    for step in steps:
        engine.set_rates(1e-2 / (step + 1))
        share = BATCH // ranks.world
        first = step * BATCH + ranks.rank * share
        micro = [range(start, start + 2) for start in range(first, first + share, 2)]
        losses = [engine.forward_backward(standin_batch(m), m is micro[-1])["loss"].item() for m in micro]
        norm = engine.update()
        told.append([float(ranks.gather(losses).mean()), norm])
    return told


def leave_out_two(engine: Engine, ranks: Ranks) -> float:
    """A step that is left out as asked, then one whose gradient is not a number on the last rank; that one's norm."""
    for step, scale in ((90, 1.0), (91, math.nan if ranks.rank == ranks.world - 1 else 1.0)):
        engine.set_rates(1.0)
        batch = standin_batch(range(step, step + 2))
        for last in (False, True):
            engine.forward_backward(replace(batch, inputs=batch.inputs * scale), last)
        norm = engine.update(leave_out=scale == 1.0 and step == 90)
    return norm


def relative(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest relative difference between two traces."""
    return max(abs(x - y) / abs(y) for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


def largest(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two states with the same names."""
    if state.keys() != other.keys():
        return float("inf")
    return max((float((value - other[name]).abs().max()) for name, value in state.items()), default=0.0)


def check(engine: str, ranks: Ranks, reference: list[list[float]] | None, **train: object) -> dict[str, object]:
    """One engine: its trace against the reference, its state's round trip, and the steps that follow it."""
    config = config_of(engine, **train)
    with built(config, ranks) as run:
        whole_state(run)  # before the first update there are no moments yet, and that is no error
        trace = advance(run, ranks, range(3))
        weights, moments = ranks.broadcast(whole_state(run))
        trace += advance(run, ranks, range(3, STEPS))
        end = whole_state(run)
        are_pieces_whole = pieces_are_the_whole(run, ranks, end)
    with built(config, ranks) as again:
        again.load_state(weights, moments, updates=3)
        loaded = whole_state(again)
        norm = leave_out_two(again, ranks)
        resumed = advance(again, ranks, range(3, STEPS))
        end_again = whole_state(again)
    first = ranks.rank == 0
    return {
        "trace": trace,
        "from_reference": 0.0 if reference is None else relative(trace, reference),
        "round_trip": max(largest(loaded[0], weights), largest(loaded[1], moments)) if first else 0.0,
        "resumed_trace": relative(resumed, trace[3:]),
        "resumed_state": max(largest(end_again[0], end[0]), largest(end_again[1], end[1])),
        "names": sorted(weights),
        "are_pieces_whole": are_pieces_whole,
        "left_out_norm_is_finite": math.isfinite(norm),
    }


def pieces_are_the_whole(engine: Engine, ranks: Ranks, whole: State) -> bool:
    """Whether all ranks' pieces are each number of the state once, as it is, and every rank has its part."""
    own = [replace(piece, numbers=piece.numbers.detach().clone()) for piece in engine.pieces()]
    expected = {("weights", name): value for name, value in whole[0].items()}
    expected |= {("moments", name): value for name, value in whole[1].items()}
    left = {key: [None] * value.numel() for key, value in expected.items()}
    sizes = []
    for pieces in ranks.gather_objects(own):
        sizes.append(sum(piece.numbers.numel() for piece in pieces))
        for piece in pieces:
            key = piece.kind, piece.name
            for place, number in enumerate(piece.numbers.flatten().tolist(), start=piece.start):
                assert left[key][place] is None, f"{key} {place} is saved twice"
                left[key][place] = number
    is_same = all(expected[key].flatten().tolist() == numbers for key, numbers in left.items())
    return is_same and min(sizes) > 0.3 * max(sizes)


def elements_given_to_the_library(ranks: Ranks) -> int:
    """How much of the parameters, at stage 3, is still whole when DeepSpeed is given the module."""
    given, initialize = [], engine_deepspeed.deepspeed.initialize

    def looked_at(model: torch.nn.Module, **arguments: object) -> object:
        given.append(sum(parameter.numel() for parameter in model.parameters()))
        return initialize(model=model, **arguments)

    engine_deepspeed.deepspeed.initialize = looked_at
    try:
        with built(config_of("deepspeed", zero_stage=3), ranks):
            return given[0]
    finally:
        engine_deepspeed.deepspeed.initialize = initialize


def main(stages: list[int]) -> None:
    """Check plain and the given ZeRO stages."""
    with joined(read_placement(os.environ)) as ranks:
        told = {"plain": check("plain", ranks, None)}
        reference = told["plain"]["trace"]
        for stage in stages:
            told[f"zero_{stage}"] = check("deepspeed", ranks, reference, zero_stage=stage)
        for stage in (1, 2, 3):
            told[f"offload_{stage}"] = check("deepspeed", ranks, reference, zero_stage=stage, offload_optimizer=True)
        told["zero_1_bf16"] = check("deepspeed", ranks, reference, zero_stage=1, precision="bf16")
        told["plain_bf16"] = check("plain", ranks, reference, precision="bf16")
        assert "mlflow" not in sys.modules, "DeepSpeed brought it in: seconds of start-up on every rank"
        told["zero_3"]["whole_elements"] = elements_given_to_the_library(ranks)
        if ranks.rank == 0:
            print("RESULT " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main([int(stage) for stage in sys.argv[1:]] or [0, 1, 2, 3])
