"""The loss on fixed samples of held-out subjects, beside that of the trivial predictor on the same samples.

Ranks take whole micro-batches in turn and the sum runs over micro-batches in their order, so the number does not depend
on how many ranks there are, beyond what their weights differ.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.methods.method import Method, Preview
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import Row
from mim_scale.streaming.device import TensorBatch, to_device
from mim_scale.streaming.stream import open_stream
from mim_scale.training.compiled import uncompiled
from mim_scale.training.ranks import Ranks

WATCHED = 4
"""Micro-batches that the numbers about collapse are taken of."""
NUM_PREVIEWS = 3
"""Held-out samples, or groups of them, that are drawn at the end of a run."""


class HeldOut:
    """Measures a module on the first `held_out.samples` positions of the held-out sequence.

    Args:
        config: The run's.
        dataset: Where voxels come from.
        rows: Held-out volumes; with none, there is nothing to measure.
        ranks: Who shares the work.
    """

    def __init__(self, config: PretrainConfig, dataset: Dataset, rows: Sequence[Row], ranks: Ranks) -> None:
        # Threads whatever the training's transport: both give the same bits, and actors are dear for a few samples.
        self._config = config.model_copy(update={"data": config.data.model_copy(update={"transport": "threads"})})
        self._dataset, self._rows, self._ranks = dataset, rows, ranks
        size, count = config.train.micro_batch, config.held_out.samples
        self._chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        self._trivial: dict[str, float] | None = None

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` updates: before the first, at the interval, and after the last."""
        return bool(self._rows) and (step % self._config.held_out.every == 0 or step == self._config.train.steps)

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Means over the samples: the loss, its parts, the trivial predictor's as `trivial_1`, and what
        `Method.watch` tells, of the first few; all ranks call it."""
        if self._trivial is None:
            trivial = cast(Method, module).trivial
            self._trivial = self._mean(lambda batch: _renamed(trivial(batch)))
        module.eval()
        try:
            with uncompiled(self._config):
                losses = self._mean(lambda batch: _losses(module, batch))
                watched = self._mean(cast(Method, module).watch, self._chunks[:WATCHED])
        finally:
            module.train()
        return {**losses, **self._trivial, **watched}

    def previews(self, module: nn.Module) -> list[tuple[tuple[str, ...], Preview]]:
        """The first held-out samples that show a volume not yet met, as (volume keys, preview); all ranks call it.

        One sample each, or a whole group where the method compares samples with each other.
        """
        if not self._rows:
            return []
        together = self._config.method.samples_together
        schedule = (range(n, n + together) for n in range(0, self._config.held_out.samples, together))
        drawn: list[tuple[tuple[str, ...], Preview]] = []
        met: set[str] = set()
        module.eval()
        try:
            stream = open_stream(self._config, self._dataset, self._rows, held_out=True)
            with stream, uncompiled(self._config):
                for batch in stream.batches(schedule):
                    if not met.issuperset(batch.keys):
                        met.update(batch.keys)
                        preview = cast(Method, module).preview(to_device(batch, self._ranks.device))
                        drawn.append((batch.keys, preview))
                    if len(drawn) == NUM_PREVIEWS:
                        break
        finally:
            module.train()
        return drawn

    def _mean(
        self, compute: Callable[[TensorBatch], dict[str, Tensor]], chunks: Sequence[range] | None = None
    ) -> dict[str, float]:
        ranks, chunks = self._ranks, self._chunks if chunks is None else chunks
        # Equal turns on every rank, the odd one's result unused: at ZeRO stage 3 ranks must compute side by side.
        turns = range(ranks.rank, math.ceil(len(chunks) / ranks.world) * ranks.world, ranks.world)
        own = [chunks[turn % len(chunks)] for turn in turns]
        sums: list[dict[str, float]] = []

        def work() -> None:
            with open_stream(self._config, self._dataset, self._rows, held_out=True) as stream, torch.no_grad():
                for chunk, batch in zip(own, stream.batches(own), strict=True):
                    values = compute(to_device(batch, ranks.device))
                    sums.append({name: float(value) * len(chunk) for name, value in values.items()})

        ranks.together(work)
        gathered = ranks.gather_objects(sums)
        ordered = [gathered[index % ranks.world][index // ranks.world] for index in range(len(chunks))]
        return {name: math.fsum(values[name] for values in ordered) / sum(map(len, chunks)) for name in ordered[0]}


def _losses(module: nn.Module, batch: TensorBatch) -> dict[str, Tensor]:
    losses = module(batch)
    return {"loss": losses.total, **losses.parts}


def _renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {trivial_name(part): value for part, value in values.items()}


def trivial_name(part: str) -> str:
    """What the trivial predictor's number for a part is called: `trivial_1` for `level_1`, `trivial_contrast` too."""
    return f"trivial_{part.removeprefix('level_')}"
