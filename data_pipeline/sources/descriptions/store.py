"""A store of ours as a source: its manifest says which volumes are of one person."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.descriptions.listed import Listed
from data_pipeline.sources.descriptions.place import Place
from mim_scale.store.dataset import MANIFEST, VOLUMES


def is_store(values: Any) -> bool:
    """Whether a dataset.json is the commit record of a store."""
    return isinstance(values, dict) and values.get("format") == "mim-scale dataset"


def read_store(place: Place) -> dict[str, Listed]:
    """The subject of each volume; of any format version.

    Raises:
        SourceError: the manifest cannot be read.
    """
    try:
        table = pq.ParquetFile(place.root / place.folder / MANIFEST).read(["key", "subject"]).to_pydict()
    except (pa.ArrowException, OSError, KeyError) as error:
        place.refuse(f"its {MANIFEST} cannot be read ({type(error).__name__})")
    prefix = f"{place.folder}/" if place.folder else ""
    subjects = zip(table["key"], table["subject"], strict=True)
    return {f"{prefix}{VOLUMES}/{key}.zarr": Listed("image", f"store\n{subject}") for key, subject in subjects}
