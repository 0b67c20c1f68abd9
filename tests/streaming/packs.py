"""What the tests of packs share: the runs that are packed, and ways to look at and to damage a pack."""

from mim_scale.config_file import dump_config
from tests.synthetic import make_plan_config
from tests.training.standin import small_config

CONFIG = make_plan_config()
SHARD_BYTES = 300_000
"""A few samples of a 48 box."""


def config_for(store, held_out_subjects=0, pack=None, **changes):
    config = small_config(str(store))
    data = config.data.model_copy(
        update={"held_out_subjects": held_out_subjects, "pack": pack and str(pack), "workers": 2}
    )
    return config.model_copy(update={"data": data, "plan": CONFIG, "seed": 4, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pack_command(dataset, folder, config_path, *more):
    config_path.write_text(dump_config(config_for(dataset.path, 1)))
    words = ["data", "pack", "--config", str(config_path), "data.read_ahead=1", "--from", "5", "--to", "13"]
    return [*words, "--shard-bytes", "300kB", str(folder), *more]


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)
