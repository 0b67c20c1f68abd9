"""CPU time of a sample from a store and from a pack of it, and the bytes: `python -m benchmarks.packs STORE`."""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.store.dataset import Dataset
from mim_scale.store.manifest import split_subjects
from mim_scale.streaming.pack import Pack, PackReader
from mim_scale.streaming.pack_verify import verify_pack
from mim_scale.streaming.pack_write import write_pack
from mim_scale.streaming.reader import SampleReader
from mim_scale.streaming.stream_threads import ThreadStream

Source = SampleReader | PackReader

ROUNDS = 5
CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Print one line a measurement; the two sources are read turn by turn, after one round that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path, help="built from real CT at native spacing")
    options = parser.parse_args()
    dataset = Dataset.open(options.store)
    print(
        f"{platform.machine()}, {len(dataset.rows)} volumes, {ROUNDS} rounds after one warm-up, files in the page cache"
    )
    for size, samples in (("demo", 64), ("base", 32)):
        compare(dataset, size, samples)


def compare(dataset: Dataset, size: str, samples: int) -> None:
    """One preset's crops: reading one by one on one thread, and through the stream; making and verifying the pack."""
    held_out = ["data.held_out_subjects=0", f"data.store={dataset.path}", "data.workers=1"]
    config = load_config(PretrainConfig, CONFIGS / f"{size}.yaml", held_out)
    rows, _ = split_subjects(dataset.rows, config.seed, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack"
        making = cpu_ms(lambda: write_pack(config, path, 0, samples), samples)
        pack = Pack.open(path)
        readers: dict[str, Source] = {
            "store": SampleReader(dataset, rows, config.plan, config.seed),
            "pack": PackReader(pack, dataset, rows, config),
        }
        raw = 2 * config.plan.box[0] * config.plan.box[1] * config.plan.box[2]
        packed = sum(shard.bytes for shard in pack.shards["train"])
        print(f"{size}: {raw / 1e6:.2f} MB of int16 a sample, {packed / samples / 1e6:.2f} MB in the pack, ", end="")
        print(f"{raw * samples / packed:.2f}x smaller; made in {making:.1f} CPU ms a sample")
        for what, read in (("one by one", one_by_one), ("stream, 1 worker", through_stream)):
            rounds = [_round(readers, read, samples) for _ in range(ROUNDS + 1)][1:]
            told = ", ".join(f"{name} {_told([times[name] for times in rounds])}" for name in readers)
            print(f"{size}, {what}: {told} CPU ms a sample; ratio ", end="")
            print(_told([times["store"] / times["pack"] for times in rounds]))
        seconds = cpu_ms(lambda: verify_pack(path), 1) / 1e3
        print(f"{size}: fast verify reads {packed / seconds / 1e9:.2f} GB per CPU second")


def _round(readers: dict[str, Source], read: Callable[[Source, int], None], samples: int) -> dict[str, float]:
    return {name: cpu_ms(lambda reader=reader: read(reader, samples), samples) for name, reader in readers.items()}


def one_by_one(reader: Source, samples: int) -> None:
    """Every sample on the thread that asks."""
    for position in range(samples):
        reader.sample(position)


def through_stream(reader: Source, samples: int) -> None:
    """Every sample as a batch of one, as a training run gets it."""
    with ThreadStream(reader, 1, 4) as stream:
        for _ in stream.batches([position] for position in range(samples)):
            pass


def cpu_ms(run: Callable[[], object], samples: int) -> float:
    """CPU milliseconds a sample, of all threads of this process."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3 / samples


def _told(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
