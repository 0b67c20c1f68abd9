"""`mim-scale data pack`, and `mim-scale data verify` for packs: what is typed in, what is shown. Heavy imports wait."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from mim_scale.errors import ConfigError, DamagedError

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def add_pack(verbs: Any) -> None:
    """Add the verb to `mim-scale data`."""
    parser = verbs.add_parser("pack", help="cut samples of a run out of its store, as WebDataset tars to train from")
    parser.add_argument("folder", type=Path, metavar="OUT", help="a new folder, or one that the same command began")
    parser.add_argument(
        "--config",
        nargs="+",
        required=True,
        metavar=("CONFIG", "key=value"),
        help="the run's YAML, settings to replace",
    )
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="A", help="first position (default: 0)")
    parser.add_argument("--to", dest="stop", type=int, required=True, metavar="B", help="position after the last one")
    parser.add_argument(
        "--shard-bytes", type=_bytes, default="512MB", metavar="SIZE", help="largest tar (default: %(default)s)"
    )
    parser.set_defaults(verb=_pack)


def verify_pack(path: Path, deep: bool) -> int:
    """Print what is wrong with a pack; 3 where something is."""
    from mim_scale.streaming.pack_verify import verify_pack as check

    problems = check(path, deep)
    for problem in problems:
        print(problem)
    if problems:
        return DamagedError.exit_code
    print(f"{path}: whole ({'every sample was decoded' if deep else 'every byte; --deep decodes and compares plans'})")
    return 0


def _pack(options: argparse.Namespace) -> int:
    from mim_scale.bar import Bar
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config
    from mim_scale.streaming.pack_write import write_pack

    path, *overrides = options.config
    if (stray := next((word for word in overrides if "=" not in word), None)) is not None:
        raise ConfigError(f"{stray!r} stands behind --config and is no key=value; put OUT first or after --to")
    config = load_config(PretrainConfig, Path(path), overrides)
    with Bar("samples") as bar:
        outcome = write_pack(config, options.folder, options.first, options.stop, options.shard_bytes, bar)
    shards = [shard for side in outcome.record["shards"].values() for shard in side]
    print(
        f"{options.folder}: positions {options.first} to {options.stop - 1} and {outcome.record['held_out_samples']} "
        f"held-out samples, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB in {len(shards)} shards, "
        f"{outcome.num_written} of them written now"
    )
    print(f"next: launch/pretrain.py --config {shlex.join([*options.config, f'data.pack={options.folder}'])}")
    return 0


def _bytes(text: str) -> int:
    """`512MB`, `1GiB` or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 512MB or 1GiB")
    return size
