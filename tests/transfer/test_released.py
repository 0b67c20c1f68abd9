"""Our parameters and the release's are the same ones under two names."""

import json
from pathlib import Path

import pytest
import torch

from mim_scale.methods.build import build_method
from mim_scale.transfer.released import RELEASED_TABLES, released_names
from tests.golden_numbers import golden_config

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_names_are_one_to_one_with_equal_shapes(size: str) -> None:
    config = golden_config(size)
    with torch.device("meta"):
        ours = {name: list(p.shape) for name, p in build_method(config).named_parameters()}
    theirs = json.loads((GOLDEN / f"params_{size}.json").read_text())
    names = released_names(config)
    assert names.keys() == ours.keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) | set(RELEASED_TABLES) == theirs.keys()
    assert {names[name]: shape for name, shape in ours.items()} == {
        name: shape for name, shape in theirs.items() if name not in RELEASED_TABLES
    }


@pytest.mark.parametrize("alignment", ["none", "cosine"])
def test_names_follow_what_is_built(alignment: str) -> None:
    overrides = [f"method.alignment={alignment}"]
    config = golden_config("tiny", *overrides)
    with torch.device("meta"):
        names = dict(build_method(config).named_parameters())
    assert released_names(config).keys() == names.keys()
