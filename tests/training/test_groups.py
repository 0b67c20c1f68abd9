"""A method that compares samples with each other, in the loop: groups stay whole wherever batches are cut."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mim_scale.errors import ConfigError
from mim_scale.methods.method import Preview, SimilarityPreview
from mim_scale.sampling.order import volume_at
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import split_subjects
from mim_scale.training.journal import read_journal
from mim_scale.training.loop import pretrain
from mim_scale.training.records import Records
from tests.models.small_methods import method_config
from tests.synthetic import make_dataset


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    make_dataset(path)
    return path


def losses_of(store: Path, output: Path, micro_batch: int) -> list[float]:
    config = method_config(
        "simclr",
        data={"store": str(store)},
        train={"steps": 3, "batch": 8, "micro_batch": micro_batch, "engine": "plain"},
        held_out={"every": 3, "samples": 6},
    ).model_copy(update={"output": str(output)})
    assert pretrain(config) == 0
    rows = read_journal(output / "journal.jsonl")
    held = [row["held_out"]["contrast"] for row in rows if row["kind"] == "held_out"]
    return held + [row["loss"] for row in rows if row["kind"] == "step"]


def test_cut_of_the_batch_does_not_change_results(store: Path, tmp_path: Path) -> None:
    """Held-out samples are no multiple of the larger micro-batch: the rest is a micro-batch of its own."""
    found = [losses_of(store, tmp_path / str(size), size) for size in (2, 4, 8)]
    assert len(found[0]) == 5
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), rtol=1e-5, atol=0)


def test_previews_are_of_whole_groups_with_their_volumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Sequence[str], Preview]] = []
    monkeypatch.setattr(Records, "draw", lambda _, previews: drawn.extend(previews))
    config = method_config(
        "simclr",
        method={"group": 2},
        data={"store": str(store), "held_out_subjects": 3},
        train={"steps": 3, "engine": "plain"},
        held_out={"samples": 6},
    ).model_copy(update={"output": str(tmp_path / "run")})
    assert pretrain(config) == 0
    _, held = split_subjects(Dataset.open(store).rows, config.seed, 3)
    keys = sorted(row.key for row in held)
    order = [keys[volume_at(position, 3, config.seed, held_out=True)] for position in range(6)]
    # Two of three volumes stand in the first group; the next group that shows the third is the second.
    assert [list(of_group) for of_group, _ in drawn] == [order[:2], order[2:4]]
    for _, preview in drawn:
        assert isinstance(preview, SimilarityPreview)
        assert preview.similarity.shape == (4, 4)


@pytest.mark.parametrize("changes", [{"train": {"micro_batch": 1}}, {"held_out": {"samples": 3}}])
def test_sizes_that_cut_a_group_are_refused(changes: dict[str, dict[str, int]]) -> None:
    with pytest.raises(ConfigError, match="must be multiples of method"):
        method_config("simclr", **changes)
