"""From files to samples: what a build says is not air is what boxes and masks are drawn to."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.run import Silent, run_build
from mim_scale.config import ForegroundConfig, PlanConfig
from mim_scale.store.dataset import Dataset
from mim_scale.store.verify import verify
from mim_scale.streaming.reader import SampleReader
from tests.pipeline.sources import config, phantom, write_image
from tests.pipeline.test_build import Inline
from tests.synthetic import make_plan_config

PLAN = make_plan_config(box=24, view=24, token=4)
SOUGHT, HIDDEN = (
    PLAN.model_copy(update={"foreground": ForegroundConfig(box_share=0.6, tries=tries, hidden_share=0.9)})
    for tries in (12, 1)
)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Two bodies in the corners of much air."""
    monkeypatch.setattr("data_pipeline.build.run.make_executor", lambda config: Inline())
    for seed in range(2):
        voxels = np.full((40, 80, 90), -1000, np.int16)
        voxels[:, 10:50, 40 - 30 * seed : 85 - 30 * seed] = phantom(seed, (40, 40, 45))
        write_image(tmp_path / "in" / f"{seed}.nii.gz", voxels, spacing_mm=(1.0, 1.0, 1.0))
    assert len(run_build(config(tmp_path / "in", tmp_path / "store"), Silent()).rows) == 2
    return Dataset.open(tmp_path / "store")


def test_boxes_and_masks_hold_more_of_the_body(dataset: Dataset) -> None:
    assert verify(dataset.path, deep=True) == []
    boxes, hidden = zip(*(_body(dataset, plan) for plan in (PLAN, SOUGHT, HIDDEN)), strict=True)
    assert boxes[0] == boxes[2] < 0.35
    assert boxes[1] > boxes[0] + 0.15
    assert hidden[1] > hidden[0] + 0.15
    # The same boxes, other masks: at this size a block is larger than a view.
    assert hidden[2] > hidden[0] + 0.03


def _body(dataset: Dataset, plan: PlanConfig) -> tuple[float, float]:
    """Shares of the body in boxes, and in the tokens that second views hide, on average."""
    boxes, hidden = [], []
    for position in range(60):
        sample = SampleReader(dataset, dataset.rows, plan, 3).sample(position)
        is_body = sample.block > -500
        boxes.append(is_body.mean())
        level = sample.plan.levels[1]
        for (z, y, x), tokens in zip(level.starts.tolist(), level.hidden, strict=True):
            view = is_body[z : z + 12, y : y + 12, x : x + 12].reshape(6, 2, 6, 2, 6, 2).mean(axis=(1, 3, 5))
            hidden.append(view.ravel()[tokens].mean())
    return float(np.mean(boxes)), float(np.mean(hidden))
