"""Every method under ZeRO-3 beside plain torch, run by every rank of one job; rank 0 prints one line of JSON.

`python -m torch.distributed.run --nproc_per_node 2 -m tests.training.method_checks mae/hybrid mae/hybrid/5`: method,
backbone, and how many views are computed at once (all of them, where nothing is said).
"""

import json
import os
import sys

from mim_scale.config import PretrainConfig
from mim_scale.methods.build import build_method
from mim_scale.sampling.plan import plan
from mim_scale.streaming.batch import Sample, collate
from mim_scale.streaming.device import TensorBatch, to_device
from mim_scale.training.engine import accumulation, build_engine
from mim_scale.training.placement import read_placement
from mim_scale.training.ranks import Ranks, joined
from tests.models.small_methods import method_config
from tests.synthetic import make_volume

STEPS = 5


def batch_of(config: PretrainConfig, first: int) -> TensorBatch:
    """A micro-batch of a synthetic volume's voxels and true plans."""
    size = config.plan.box
    samples = [
        Sample(position, "one", make_volume(size, seed=position).voxels, plan(config.seed, position, size, config.plan))
        for position in range(first, first + config.train.micro_batch)
    ]
    return to_device(collate(samples), "cpu")


def trace(config: PretrainConfig, ranks: Ranks) -> list[dict[str, float]]:
    """Loss and gradient norm of each step, then what held-out samples are asked; means over ranks."""
    engine = build_engine(build_method(config), config, ranks)
    count = accumulation(config, ranks)
    told = []
    try:
        for step in range(STEPS):
            engine.set_rates(1e-3)
            first = step * config.train.batch + ranks.rank * count * config.train.micro_batch
            of_rank = [
                engine.forward_backward(batch_of(config, first + i * config.train.micro_batch), i + 1 == count)
                for i in range(count)
            ]
            losses = [float(losses["loss"]) for losses in of_rank]
            told.append({"norm": engine.update(), "loss": float(ranks.gather(losses).mean())})
        batch = batch_of(config, 1000)
        found = engine.module.watch(batch) | engine.module.trivial(batch)
        engine.module.preview(batch)
        told.append({name: float(value) for name, value in found.items()})
    finally:
        engine.close()
    return told


def config_of(pair: str, **train: object) -> PretrainConfig:
    """A small run of the pair with two micro-batches a step at world 2."""
    return method_config(*pair.split("/"), train={"batch": 8, **train})


def main(pairs: list[str]) -> None:
    """The largest relative difference of each pair's numbers."""
    found = {}
    with joined(read_placement(os.environ)) as ranks:
        for words in pairs:
            method, backbone, *chunk = words.split("/")
            pair, at_once = f"{method}/{backbone}", int(chunk[0]) if chunk else None
            plain = trace(config_of(pair, engine="plain", views_at_once=at_once), ranks)
            stage_3 = trace(config_of(pair, zero_stage=3, views_at_once=at_once), ranks)
            found[words] = max(
                abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3)
                for ours, theirs in zip(stage_3, plain, strict=True)
                for name in theirs
            )
        if ranks.rank == 0:
            print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
