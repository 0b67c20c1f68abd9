"""Weights that exist only while a module is called: every method gives the same numbers as with all of them."""

from typing import Any

import pytest

from mim_scale.errors import ConfigError
from tests.models.small_methods import method_config
from tests.training.jobs import result_line, run, torchrun

PAIRS = ("mae/hybrid", "mae/hybrid/5", "simmim/vit", "simclr/resenc/5")


@pytest.mark.dist
def test_every_method_at_stage_3_is_as_plain() -> None:
    """Losses and gradient norms of five steps, and what held-out samples are asked after them."""
    found = result_line(run([*torchrun(2), "-m", "tests.training.method_checks", *PAIRS]))
    assert found.keys() == set(PAIRS)
    assert all(apart < 1e-5 for apart in found.values()), found


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"plan": {"levels": [{"hidden_ratio": [0.5, 0.75], "views": 2}]}}, "hidden_ratio that is drawn"),
        ({"train": {"views_at_once": 3}, "held_out": {"samples": 3}}, "held_out.samples 3 is not a multiple"),
    ],
)
def test_what_has_ranks_run_other_layers_is_refused(sections: dict[str, dict[str, Any]], words: str) -> None:
    """Seen on two ranks: waiting forever, or gloo's "received data size doesn't match"."""
    method_config("mae", "vit", **sections)
    stage_3 = sections | {"train": {"zero_stage": 3, **sections.get("train", {})}}
    with pytest.raises(ConfigError, match=words):
        method_config("mae", "vit", **stage_3)
