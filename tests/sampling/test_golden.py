"""Order and plans are a contract: a change of any integer is a new sampler version, never an accident."""

import json
from pathlib import Path

from tests.golden import sampling


def test_order_and_plans_are_the_recorded_ones():
    recorded = json.loads((Path(sampling.__file__).parent / "sampling.json").read_text())
    assert sampling.numbers() == recorded
