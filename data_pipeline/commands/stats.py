"""`mim-scale data stats`: what a store holds, in numbers."""

import json
from pathlib import Path

from data_pipeline.commands.console import console, shown, table


def stats(store: Path | str, as_json: bool = False) -> int:
    """Print what a store holds, for people or as JSON.

    Raises:
        StoreError: no store there.
    """
    from mim_scale.store.stats import stats as collect

    values = collect(Path(store))
    if as_json:
        print(json.dumps(values, indent=1))
        return 0
    rows = table(f"store {store}", "what", "")
    for name, value in values.items():
        rows.add_row(name.replace("_", " "), shown(name, value))
    console().print(rows)
    return 0
