"""`mim-scale data peek`: a picture of a volume, of a sample cut from it, or of a packed sample. Heavy imports wait."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim_scale.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from mim_scale.config import PlanConfig
    from mim_scale.store.dataset import Dataset
    from mim_scale.store.manifest import Row
    from mim_scale.streaming.batch import Sample
    from mim_scale.streaming.peek import Context

_WINDOWS = ("soft", "lung", "bone", "wide")


def add_peek(verbs: Any) -> None:
    """Add the verb to `mim-scale data`."""
    parser = verbs.add_parser(
        "peek",
        help="draw a volume of a store, a sample's boxes and masks, or a sample of a pack",
        description="Without --position: slices of one volume. With it: the sample that stands there, as a tree of "
        "nested boxes, hidden tokens shaded; from a store by the config of a run, from a pack by the pack's own.",
    )
    parser.add_argument("folder", type=Path, metavar="STORE|PACK")
    parser.add_argument("key", nargs="?", help="of a volume, or how it begins (default: the first one)")
    parser.add_argument("--out", type=Path, default=Path("peek.png"), help="the picture (default: %(default)s)")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar=("CONFIG", "key=value"), help="a run's YAML, settings to replace"
    )
    parser.add_argument("--position", type=int, metavar="N", help="of a sample")
    parser.add_argument("--held-out", action="store_true", help="the position is one of held-out samples")
    parser.add_argument("--window", choices=_WINDOWS, help="HU that are drawn (default: soft; of samples: wide)")
    parser.set_defaults(verb=_peek)


def _peek(options: argparse.Namespace) -> int:
    from mim_scale.streaming.pack_verify import is_pack

    if options.position is not None and options.position < 0:
        raise ConfigError(f"--position is {options.position}, expected 0 or more")
    if options.position is not None and options.key is not None:
        raise ConfigError("a KEY names a volume, --position a sample: give one of them")
    if is_pack(options.folder):
        found = _packed(options)
    elif options.position is not None:
        found = _cut(options)
    else:
        return _volume(options)
    return _draw(options, found)


def _volume(options: argparse.Namespace) -> int:
    from mim_scale.store.dataset import Dataset
    from mim_scale.store.slices import WINDOWS
    from mim_scale.streaming.peek import draw_volume

    if options.config or options.held_out:
        raise ConfigError("--config and --held-out are of a sample: add --position N")
    dataset = Dataset.open(options.folder)
    row = _row(dataset, options.key or "")
    draw_volume(dataset.reader(row), row, WINDOWS[options.window or "soft"], options.out)
    print(f"{options.out}: volume {row.key}, one of {len(dataset.rows)}")
    return 0


def _row(dataset: "Dataset", begins: str) -> "Row":
    rows = [row for row in dataset.rows if row.key.startswith(begins)]
    if not rows:
        raise StoreError(f"{dataset.path}: no volume has a key that begins with {begins}; `data report` lists keys")
    if begins and len(rows) > 1:
        raise StoreError(f"{dataset.path}: {len(rows)} volumes have keys that begin with {begins}; give more digits")
    return rows[0]


@dataclass(frozen=True)
class _Found:
    """A sample, and what is needed to draw it."""

    sample: "Sample"
    plan: "PlanConfig"
    row: "Row"
    context: "Context | None" = None


def _packed(options: argparse.Namespace) -> _Found:
    from mim_scale.config import PlanConfig
    from mim_scale.config_file import check_config
    from mim_scale.streaming.pack import SIDES, Pack

    if options.config:
        raise ConfigError(f"{options.folder}: is a pack, which has its own plan: leave --config out")
    if options.position is None:
        raise ConfigError(f"{options.folder}: is a pack: add --position N")
    pack = Pack.open(options.folder)
    sample = pack.sample(SIDES[options.held_out], options.position)
    plan = check_config(PlanConfig, pack.record["plan"], f"{options.folder}: plan")
    return _Found(sample, plan, next(row for row in pack.dataset.rows if row.key == sample.key))


def _cut(options: argparse.Namespace) -> _Found:
    from mim_scale.config import PretrainConfig
    from mim_scale.config_file import load_config
    from mim_scale.store.dataset import Dataset
    from mim_scale.store.manifest import split_subjects
    from mim_scale.streaming.peek import Context
    from mim_scale.streaming.reader import SampleReader

    if not options.config:
        raise ConfigError("a sample is cut by the config of a run: add --config CONFIG")
    path, *overrides = options.config
    if (stray := next((word for word in overrides if "=" not in word), None)) is not None:
        raise ConfigError(f"{stray!r} stands behind --config and is no key=value; put STORE first")
    config = load_config(PretrainConfig, Path(path), [*overrides, f"data.store={options.folder}"])
    dataset = Dataset.open(options.folder)
    sides = split_subjects(dataset.rows, config.seed, config.data.held_out_subjects)
    reader = SampleReader(dataset, sides[options.held_out], config.plan, config.seed, options.held_out)
    sample = reader.sample(options.position)
    row = next(row for row in dataset.rows if row.key == sample.key)
    return _Found(sample, config.plan, row, Context(dataset.reader(row), row))


def _draw(options: argparse.Namespace, found: _Found) -> int:
    from mim_scale.store.slices import WINDOWS
    from mim_scale.streaming.peek import draw_sample

    side = "held-out position" if options.held_out else "position"
    start, size = found.sample.plan.box.start, found.sample.plan.box.size
    box = f"box at {start} of {size} voxels in a volume of {found.row.shape}"
    title = f"{side} {options.position}: volume {found.sample.key}, {box} (z, y, x); shaded: hidden tokens"
    window = WINDOWS[options.window or "wide"]
    draw_sample(found.sample, found.plan, found.row.spacing_mm, window, title, options.out, found.context)
    print(f"{options.out}: {side} {options.position}, volume {found.sample.key}, {box}")
    return 0
