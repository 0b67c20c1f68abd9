"""Make the small golden files from the large ones: python tests/golden/extract.py FOLDER_OF_THE_REFERENCE_NUMBERS

The reference numbers were made by running the network of the public MiM release (git 7913038, float32, one thread).
What is kept: for every array at most MAX_VALUES values, evenly spaced, beside shape, sum and sum of absolute values
over all of it; losses; the masks; sum, absolute sum and norm of every parameter's gradient; names and shapes of all
parameters. Weights and inputs are made anew from names (tests/golden_numbers.py).
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
MAX_VALUES = {"tiny": 400, "base": 100}


def extract(source: Path, size: str) -> None:
    """Write one size's files."""
    arrays, numbers = np.load(source / f"{size}.npz"), json.loads((source / f"{size}.json").read_text())
    kept: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for name in arrays.files:
        if name.startswith("mim.released.pool_"):
            continue  # the release's cells are not the method's: only its losses are compared
        stored, about = arrays[name].ravel(), numbers["arrays"][name]
        thin = max(1, math.ceil(len(stored) / MAX_VALUES[size]))
        kept[name] = stored[::thin]
        described[name] = about | {"step": about["step"] * thin}
    for name, ids in np.load(source / f"{size}_ids.npz").items():
        if not name.endswith("ids_restore"):
            kept[f"ids.{name}"] = ids
    np.savez_compressed(HERE / f"{size}.npz", **kept)
    result = {"arrays": described, "losses": _losses(numbers["scalars"])}
    if size == "tiny":
        statistics = numbers["grad_stats_sum_abssum_l2"].items()
        result["gradients"] = {name: [float(f"{v:.8g}") for v in values] for name, values in statistics if values}
    (HERE / f"{size}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    parameters = json.loads((source / f"params_{size}.json").read_text())
    shapes = {name: about["shape"] for name, about in parameters.items()}
    (HERE / f"params_{size}.json").write_text(json.dumps(shapes, separators=(",", ":")) + "\n")


def _losses(scalars: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scalars.items() if "loss" in name}


if __name__ == "__main__":
    for network in ("tiny", "base"):
        extract(Path(sys.argv[1]), network)
