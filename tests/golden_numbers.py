"""The golden files of tests/golden: weights and inputs from names, and how far an array is from the stored one."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_scale.config import PretrainConfig
from mim_scale.config_file import load_config
from mim_scale.methods.build import build_method
from mim_scale.methods.mask_in_mask import MaskInMask
from mim_scale.methods.masked import Piece, Prediction
from mim_scale.methods.targets import errors_of, hidden_targets
from mim_scale.streaming.device import Group
from mim_scale.transfer.released import released_names

HERE = Path(__file__).parent / "golden"
CONFIGS = Path(__file__).parents[1] / "configs"


def uniforms(text: str, count: int) -> NDArray[np.float64]:
    """Doubles in [0, 1) that depend on the text alone."""
    raw = np.atleast_1d(np.random.Philox(key=zlib.crc32(text.encode())).random_raw(count))
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def unit(text: str, *shape: int) -> NDArray[np.float64]:
    """Numbers of mean 0 and variance 1."""
    return ((2 * uniforms(text, int(np.prod(shape))) - 1) * np.sqrt(3.0)).reshape(shape)


def golden_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The value that the reference network's parameter of this released name had."""
    values, leaf = unit(name, *shape), name.rsplit(".", maxsplit=1)[-1]
    if leaf == "mask_token":
        values = 0.5 * values
    elif len(shape) >= 2:
        values = values / np.sqrt(np.prod(shape[1:]))
    elif leaf == "weight":
        values = 1 + 0.1 * values
    else:
        values = 0.1 * values
    return values.astype(np.float32)


def golden_volume(tag: str, sample: int, size: int) -> NDArray[np.float32]:
    """A volume [size, size, size] that differs along each axis."""
    h, w, d = np.meshgrid(*[np.arange(size)] * 3, indexing="ij")
    noise = uniforms(f"{tag}:{sample}", size**3).reshape(size, size, size)
    wave = 0.2 * np.sin(2 * np.pi * h / 48) * np.cos(2 * np.pi * w / 32) + 0.15 * np.sin(2 * np.pi * d / 24)
    return (0.5 + wave + 0.3 * (noise - 0.5)).astype(np.float32)


def golden_config(size: str, *overrides: str) -> PretrainConfig:
    """configs/tiny.yaml or configs/base.yaml, without recomputation."""
    return load_config(PretrainConfig, CONFIGS / f"{size}.yaml", ["train.activation_checkpointing=none", *overrides])


def golden_output(method: MaskInMask, views: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Prediction, Tensor]:
    """What the method says about views of one level, and its loss."""
    piece = Piece(0, views, Group(slice(0, len(views)), visible, hidden))
    prediction = method.predict([piece])[0]
    targets = hidden_targets(views, hidden, method.config.plan.token, method.normalise_targets)
    return prediction, errors_of(prediction.voxels - targets, "l2").mean()


def golden_method(size: str, *overrides: str) -> MaskInMask:
    """The method with the reference weights."""
    config = golden_config(size, *overrides)
    method = build_method(config)
    assert isinstance(method, MaskInMask)
    names = released_names(config)
    weights = {ours: golden_weight(names[ours], tuple(p.shape)) for ours, p in method.named_parameters()}
    method.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    return method


class Golden:
    """One size's stored numbers."""

    def __init__(self, size: str) -> None:
        self.arrays = np.load(HERE / f"{size}.npz")
        self.about: dict[str, Any] = json.loads((HERE / f"{size}.json").read_text())
        self.worst: dict[str, float] = {}

    def ids(self, name: str) -> Tensor:
        """Stored indices or masks as int64."""
        return torch.from_numpy(self.arrays[f"ids.{name}"].astype(np.int64))

    def masks(self, name: str) -> tuple[Tensor, Tensor]:
        """(visible, hidden) tokens of stored views, visible ones in the stored order."""
        hidden = torch.from_numpy(np.stack([np.flatnonzero(row) for row in self.arrays[f"ids.{name}.mask"]]))
        return self.ids(f"{name}.ids_keep"), hidden

    def error(self, name: str, computed: Tensor) -> float:
        """Largest difference over the largest stored value; the sums over all elements count too, as means."""
        about, stored = self.about["arrays"][name], self.arrays[name].astype(np.float64)
        values = computed.detach().double().numpy()
        assert list(values.shape) == about["shape"], name
        scale = np.abs(stored).max()
        apart = np.abs(values.ravel()[:: about["step"]] - stored).max() / scale
        sums = abs(values.sum() - about["sum"]), abs(np.abs(values).sum() - about["abs_sum"])
        self.worst[name] = float(max(apart, max(sums) / about["abs_sum"]))
        return self.worst[name]

    def loss(self, name: str, kind: str) -> float:
        """A stored loss, `raw` or `norm_pix`."""
        return float(self.about["losses"][name][kind])


def channels_first(rows: Tensor) -> Tensor:
    """[B, Z, Y, X, C] -> [B, C, Z, Y, X], the layout of the stored arrays."""
    return rows.movedim(-1, 1)
