"""Settings of methods and backbones that cannot be meant: one line that says what to write."""

from pathlib import Path
from typing import Any

import pytest

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.errors import ConfigError
from mim_scale.training.run_folder import refuse_other_run
from tests.models.small_methods import method_config

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=mae", "method is 'mae', but it has settings of its own: write method.name, and beside it what"),
        ("method=null", "known: mask_in_mask, mae, simmim, simclr"),
        ("model=[vit]", "write model.backbone, and beside it what that one needs; known: hybrid, vit, primus, resenc"),
        ("plan.foreground=true", "has settings of its own: box_share, tries, hidden_share"),
        ("plan.levels.0=3", "plan.levels.0 is 3, but it has settings of its own: hidden_ratio, cells, views"),
        ("plan.levels=3", "plan.levels is 3"),
        ("plan.levels.0.hidden_ratio=1.5", "plan.levels.0.hidden_ratio is 1.5: input should be less than 1"),
        ("plan.levels.0.cells=4", "grid (view / token) [6, 6, 6] is not a multiple of levels[0].cells"),
        ("model={backbone: resenc, features: [], blocks: []}", "model.features is []"),
        ("method.decoder=8", "method.decoder is 8, but it has settings of its own: width"),
    ],
)
def test_what_stands_for_a_section_is_answered_with_what_to_write(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, DEMO, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_preference_stays_null() -> None:
    assert load_config(PretrainConfig, DEMO, ["plan.foreground=null"]).plan.foreground is None


@pytest.mark.parametrize(
    ("pair", "sections", "words"),
    [
        (("simclr", "vit"), {"plan": {"crop": 12}}, "is not more than half of plan.box"),
        (("simclr", "vit"), {"train": {"views_at_once": 3}}, "compares the 4 views of a group"),
        (("mask_in_mask", "vit"), {"method": {"level_weights": [0, 0, 0], "alignment": "none"}}, "nothing else is"),
        (("simmim", "swin"), {"model": {"patch": 4}}, "take token 64, or another patch"),
        (("mae", "vit"), {"data": {"transport": "ray", "workers": 0}}, "workers is 0, and transport ray reads by"),
    ],
)
def test_what_teaches_nothing_or_does_not_fit_is_refused(
    pair: tuple[str, str], sections: dict[str, dict[str, Any]], words: str
) -> None:
    method_config(*pair)
    with pytest.raises(ConfigError, match=words):
        method_config(*pair, **sections)


@pytest.mark.parametrize("uri", ["foo", "htp://127.0.0.1:1", "", False, 5, "../mlruns"])
def test_where_mlflow_cannot_be_is_refused(uri: object) -> None:
    with pytest.raises(ConfigError, match=r"tracking.mlflow: .*: give auto, null for none, or an address of MLflow"):
        method_config("mae", "vit", tracking={"mlflow": uri})


@pytest.mark.parametrize("uri", ["auto", None, "http://a:5000", "https://a", "sqlite:////x/m.db", "databricks://p"])
def test_where_mlflow_may_be(uri: str | None) -> None:
    assert method_config("mae", "vit", tracking={"mlflow": uri}).tracking.mlflow == uri


def test_another_method_or_backbone_is_named_as_such() -> None:
    """Not by the first of the settings that the other one lacks."""
    begun = method_config("mask_in_mask", "hybrid")
    for pair, words in ((("mae", "hybrid"), "method.name is 'mae'"), (("mask_in_mask", "vit"), "model.backbone is")):
        with pytest.raises(ConfigError, match=words):
            refuse_other_run(begun, method_config(*pair), "run")
