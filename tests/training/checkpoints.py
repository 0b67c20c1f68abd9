"""Checkpoints of small states, written as a run writes them, by any number of ranks."""

from pathlib import Path
from threading import Event
from typing import Any

import torch

from mim_scale.training.checkpoint import Checkpoint, CheckpointFolder, Piece, read_checkpoint
from mim_scale.training.checkpoint_write import Share, write_share

Tensors = dict[str, torch.Tensor]
FACTS = {"position": 8, "config": {}, "config_digest": "d", "fingerprint": "f", "world": 1}


def state(step: int) -> tuple[Tensors, Tensors]:
    """Weights and moments that tell their step; one is a scalar and one is empty."""
    weights = {
        "layer.weight": torch.full((3, 5), float(step)),
        "layer.bias": torch.arange(3.0),
        "scale": torch.tensor(step / 7),
        "none": torch.zeros(0, 4),
    }
    moments = {
        f"{name}/{moment}": value + step for name, value in weights.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    return weights, moments


def save_state(
    folder: CheckpointFolder, step: int, weights: Tensors, moments: Tensors, facts: dict[str, Any], count: int = 1
) -> None:
    """Save as `count` writers, the first one last, so that nobody waits."""
    for number in reversed(range(count)):
        pieces = [
            whole(kind, name, tensor)
            for kind, tensors in (("weights", weights), ("moments", moments))
            for name, tensor in list(tensors.items())[number::count]
        ]
        write_share(folder, Share(step, "token", number, count, pieces, facts), Event())


def whole(kind: str, name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that lies in one file."""
    return Piece(kind, name, tuple(tensor.shape), 0, tensor)


def save(folder: CheckpointFolder, *steps: int, count: int = 1) -> None:
    """Save the states of these steps."""
    for step in steps:
        save_state(folder, step, *state(step), FACTS, count)


def assert_is(found: Checkpoint | None, step: int) -> None:
    """That a checkpoint is the one of this step, bit for bit."""
    assert found is not None
    assert found.step == step
    for loaded, expected in zip(found.load(), state(step), strict=True):
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def refuse_to_tell(text: str) -> None:
    """For folders in which nothing is damaged."""
    raise AssertionError(text)


def state_of(output: Path, step: int) -> tuple[Tensors, Tensors]:
    """Weights and moments of a run's checkpoint, from however many files, by name."""
    weights, moments = read_checkpoint(output / "checkpoints" / f"step_{step:08d}").load()
    return dict(sorted(weights.items())), dict(sorted(moments.items()))
