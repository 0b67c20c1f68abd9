"""Every shipped method on every backbone that can do it learns from real CT: 20 steps through launch/pretrain.py."""

import math
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.run import Silent, run_build
from data_pipeline.example_data import default_cache, fetch_examples
from mim_scale.errors import SourceError
from mim_scale.training.journal import read_journal
from mim_scale.training.stop import SIGNALS
from tests.models.small_methods import method_config
from tests.pipeline.sources import config as build_config
from tests.training.jobs import PRETRAIN, write_config

pytestmark = pytest.mark.network

SCANS = (
    "totalsegmentator/heart_crop.nii.gz",
    "totalsegmentator/abdomen.nii.gz",
    "dicom2stl/head_thick_slices.nii.gz",
    "slicerio/chest_thick_slices.nrrd",
)
"""Four people, four parts of the body, few bytes."""
PAIRS = (
    *[(method, backbone) for method in ("mask_in_mask", "mae") for backbone in ("hybrid", "vit", "primus", "resenc")],
    *[("simmim", backbone) for backbone in ("vit", "swin")],
    *[("simclr", backbone) for backbone in ("hybrid", "vit", "swin", "resenc", "primus")],
)
STEPS = 20
FALLS_TO = {"mask_in_mask": 0.6, "mae": 0.6, "simmim": 0.6, "simclr": 0.9}
"""Share of the first five steps' mean loss that the last five must be below; contrast falls slowly."""
BATCHES = {"mask_in_mask": 4, "mae": 8, "simmim": 4, "simclr": 32}
"""For contrast enough groups for a mean that tells learning from luck."""
RATES = {("simmim", "swin"): 1e-2, ("simclr", "resenc"): 1e-2}
"""Learning rates of pairs that move little at first."""
CONTRAST = {"group": 4, "temperature": 0.2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real CT at 4 mm."""
    cache, folder = default_cache(), tmp_path_factory.mktemp("real")
    if not all((cache / scan).is_file() for scan in SCANS):
        try:
            fetch_examples(cache, print)
        except SourceError as error:
            pytest.skip(f"example data cannot be had here: {error}")
    (folder / "scans").mkdir()
    for scan in SCANS:
        (folder / "scans" / Path(scan).name).symlink_to(cache / scan)
    built = run_build(build_config(folder / "scans", folder / "store", spacing=4.0), Silent())
    assert built.num_volumes == len(SCANS)
    return folder / "store"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_the_loss_falls_on_real_ct(
    method: str, backbone: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = 16 if (method, backbone) == ("simclr", "swin") else BATCHES[method]
    config = method_config(
        method,
        backbone,
        method=CONTRAST if method == "simclr" else {},
        data={"store": str(store)},
        optimizer={
            "learning_rate": RATES.get((method, backbone), 4e-3),
            "learning_rate_batch": batch,
            "warmup_steps": 2,
        },
        train={
            "steps": STEPS,
            "batch": batch,
            "micro_batch": min(batch, 16),
            "engine": "plain",
            "activation_checkpointing": "none",
        },
        checkpoint={"every": STEPS},
        held_out={"every": STEPS},
    )
    path = write_config(config, tmp_path)
    monkeypatch.setattr(sys, "argv", [PRETRAIN, "--config", str(path), f"output={tmp_path / 'run'}"])
    assert runpy.run_path(PRETRAIN)["main"]() == 0
    rows = read_journal(tmp_path / "run" / "journal.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    assert len(losses) == STEPS
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    assert last < FALLS_TO[method] * first, losses
    if method == "simclr":
        assert last < 0.9 * math.log(7), losses
    before, after = (row["held_out"] for row in rows if row["kind"] == "held_out")
    assert before.keys() == after.keys() >= {"loss", "trivial_contrast" if method == "simclr" else "trivial_1"}
    picture = "similarity" if method == "simclr" else "reconstruction"
    drawn = {drawing.name for drawing in (tmp_path / "run" / "pictures").iterdir()}
    assert {f"{picture}_1.png", "loss.png"} <= drawn
