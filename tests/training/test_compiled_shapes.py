"""train.compile over a whole run: more shapes than torch takes by itself, and those that no step has."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from tests.models.small_methods import method_config
from tests.synthetic import make_dataset


def traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile by torch's tracer, without the C++ compiler that takes a minute."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **about: compile_(module, backend="eager", **about))


@pytest.mark.parametrize("at_once", [None, 3])
def test_a_run_of_three_levels_ends_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    """Its held-out samples leave a smaller micro-batch, and its pictures are of single samples and levels."""
    traces(monkeypatch)
    make_dataset(tmp_path / "store")
    ends: list[list[dict[str, Any]]] = []
    for compiled in (True, False):
        output = tmp_path / str(compiled)
        config = method_config(
            "mask_in_mask",
            data={"store": str(tmp_path / "store")},
            train={"steps": 3, "engine": "plain", "compile": compiled, "views_at_once": at_once},
            held_out={"samples": 3, "every": 1},
        ).model_copy(update={"output": str(output)})
        assert pretrain(config) == 0
        ends.append([row for row in read_journal(output / "journal.jsonl") if row["kind"] in {"step", "held_out"}])
        assert list((output / "pictures").glob("reconstruction_*.png"))
    for ours, theirs in zip(*ends, strict=True):
        for kind in ("parts", "held_out"):
            assert ours.get(kind, {}) == pytest.approx(theirs.get(kind, {}), rel=1e-4)
