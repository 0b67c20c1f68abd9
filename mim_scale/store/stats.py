"""What a dataset holds, in numbers: counts, bytes, quantiles over its volumes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_scale.store.dataset import Dataset

NOT_SAID = "not said"
"""Stands for what a source did not say."""


def stats(path: Path) -> dict[str, Any]:
    """What a dataset holds, as plain numbers.

    Raises:
        StoreError: there is no dataset at that path.
    """
    dataset = Dataset.open(path)
    rows = dataset.rows
    num_bytes = {name: sum(getattr(row, f"bytes_{name}") for row in rows) for name in ("source", "raw", "stored")}
    return {
        "path": str(path),
        "fingerprint": dataset.fingerprint,
        "num_volumes": len(rows),
        "num_subjects": len({row.subject for row in rows}),
        "num_groups": len({row.group for row in rows}),
        "num_quarantined": len(dataset.quarantine),
        "quarantine_reasons": _counts(row.reason for row in dataset.quarantine),
        "source_formats": _counts(row.source_format for row in rows),
        "manufacturers": _counts(row.manufacturer for row in rows),
        "models": _counts(row.model for row in rows),
        "kernels": _counts(row.kernel for row in rows),
        "tube_kv": _counts(f"{row.tube_kv:g}" if row.tube_kv else "" for row in rows),
        "flags": _counts(flag for row in rows for flag in row.flags),
        "repairs": _counts(repair for row in rows for repair in row.repairs),
        **{f"bytes_{name}": count for name, count in num_bytes.items()},
        "compression_ratio": num_bytes["raw"] / num_bytes["stored"],
        "shape": _by_axis([row.shape for row in rows]),
        "spacing_mm": _by_axis([row.spacing_mm for row in rows]),
        "slice_thickness_mm": _known([row.slice_thickness_mm for row in rows]),
        "hu": {
            "min": min(row.hu_min for row in rows),
            "max": max(row.hu_max for row in rows),
            "mean": _quantiles([row.hu_mean for row in rows]),
        },
    }


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(name or NOT_SAID for name in names).items()))


def _by_axis(triples: Sequence[tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    return {axis: _quantiles([triple[i] for triple in triples]) for i, axis in enumerate("zyx")}


def _known(values: Sequence[float]) -> dict[str, float]:
    """Quantiles of those that are said, and how many are not; 0 says nothing."""
    known = [value for value in values if value]
    return {"not_said": len(values) - len(known)} | (_quantiles(known) if known else {})


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    names = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
    return {name: round(float(np.quantile(values, at)), 4) for name, at in names.items()}
