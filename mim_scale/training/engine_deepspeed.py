"""The DeepSpeed engine: ZeRO stages 0 to 3 around the same AdamW; the one home of deepspeed.

Its configuration is derived from ours, so there is no JSON file to disagree with. Nothing is compiled: the optimizer is
torch's own, and the shared-memory collective that DeepSpeed would build with a C++ compiler on CPU machines is switched
off (training does not use it). State is exchanged by parameter name, never as DeepSpeed's own partition files.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mim_scale.config import PretrainConfig
from mim_scale.errors import ConfigError
from mim_scale.streaming.device import TensorBatch
from mim_scale.training.checkpoint import Piece
from mim_scale.training.deepspeed_settings import deepspeed_config
from mim_scale.training.engine import (
    MOMENTS,
    State,
    accumulation,
    frozen_state,
    parameter_groups,
    shared_out,
    trained_parameters,
)
from mim_scale.training.engine_plain import load_plain_state, plain_state
from mim_scale.training.ranks import Ranks

# Chosen here because DeepSpeed would otherwise probe for every accelerator it knows, and say so on each rank.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed imports mlflow, where it finds it, for a tuner that we do not use: seconds of start-up on every rank.
if "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
import deepspeed
import deepspeed.ops
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]


def switch_off_compiled_collective() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective, which only inference uses, when ranks meet on a CPU.

    The table is private to DeepSpeed: a test runs two ranks without a compiler on PATH to see that this still works.
    """
    # Set whole, not looked up first: the look-up runs a compiler for each operation that DeepSpeed knows.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """DeepSpeed's engine behind our protocol."""

    def __init__(self, module: nn.Module, config: PretrainConfig, ranks: Ranks) -> None:
        self._module = module.train()
        self._ranks = ranks
        self._stage = config.train.stage
        self._accumulation = accumulation(config, ranks)
        self._coalescing = contextlib.ExitStack()
        self._is_coalescing = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Newer torch renames collectives that DeepSpeed still calls by their old names; every call would say so.
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
        switch_off_compiled_collective()
        deepspeed.init_distributed(verbose=False)
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config.optimizer.weight_decay),
            lr=0.0,
            betas=config.optimizer.betas,
            fused=ranks.device.type == "cuda",
        )
        settings = deepspeed_config(config, ranks)
        try:
            if self._stage == 3:
                self._cut_up(settings)
            self._engine, _, _, _ = deepspeed.initialize(
                model=_TupleOutput(module), optimizer=optimizer, config=settings, dist_init_required=False
            )
        except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
            if not config.train.deepspeed:
                raise
            raise ConfigError(f"train.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        if self._stage > 0:
            self._make_moments()

    @property
    def module(self) -> nn.Module:
        """The module itself, with live weights."""
        return self._module

    def set_rates(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def forward_backward(self, batch: TensorBatch, last: bool) -> dict[str, Tensor]:
        """Add one micro-batch's gradient; with `last`, reduce the sum over ranks."""
        if self._stage == 2 and not last and not self._is_coalescing:
            # Stage 2 would reduce every micro-batch; stages 0 and 1 wait for the boundary by themselves.
            self._coalescing.enter_context(self._engine.coalesce_grad_reduction())
            self._is_coalescing = True
        self._engine.set_gradient_accumulation_boundary(last)
        total, parts = self._engine(batch)
        self._engine.backward(total / self._accumulation, scale_wrt_gas=False)
        if last:
            self._coalescing.close()
            self._is_coalescing = False
        return {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}}

    def update(self, leave_out: bool = False) -> float:
        """Clip, make the update, forget the gradient; the last alone where the norm is not finite."""
        self._engine.set_gradient_accumulation_boundary(True)
        if self._stage == 0:
            norm = self._norm_of_whole_gradient()
            if leave_out or not bool(norm.isfinite()):
                self._engine.optimizer.zero_grad(set_to_none=True)
                return float(norm)
            self._engine.step()
            return float(norm)
        spoilt = self._spoil_gradient() if leave_out else []
        self._engine.step()
        for gradient in spoilt:
            # Stage 3 keeps its buffers, and writes no new gradient where they are padded.
            gradient.zero_()
        return float(self._engine.get_global_grad_norm())

    def _spoil_gradient(self) -> list[Tensor]:
        """Have DeepSpeed leave out the step, with all that it has to forget then: it does so for what is not finite."""
        zero = self._engine.optimizer
        # Of an offloaded gradient it remembers norms, and adds those up.
        norms = getattr(zero, "norm_for_param_grads", {})
        norms.update({index: torch.full_like(torch.as_tensor(norm), float("inf")) for index, norm in norms.items()})
        spoilt = [gradient for group in zero.averaged_gradients.values() for gradient in group or ()]
        for gradient in spoilt:
            gradient.fill_(float("inf"))
        return spoilt

    def state(self) -> State:
        """Weights and moments; every rank gives its part of each."""
        if self._stage == 0:
            yield from plain_state(self._module, self._engine.optimizer)
            return
        for name, value in frozen_state(self._module).items():
            yield "weights", name, value
        for name, parameter in trained_parameters(self._module).items():
            yield "weights", name, self._whole(parameter)
            for moment in MOMENTS:
                yield "moments", f"{name}/{moment}", self._whole(parameter, moment)

    def pieces(self) -> Iterator[Piece]:
        """Whole tensors, shared out, of what every rank holds; of the rest the parts that ZeRO gave this rank."""
        rank, world = self._ranks.rank, self._ranks.world
        if self._stage == 0:
            yield from shared_out(self.state(), rank, range(world))
            return
        frozen = frozen_state(self._module).items()
        yield from shared_out((("weights", name, value) for name, value in frozen), rank, range(world))
        for name, parameter in trained_parameters(self._module).items():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            for moment in (None, *MOMENTS):
                start, numbers = self._part(parameter, moment)
                if numbers.numel():
                    kind, key = ("weights", name) if moment is None else ("moments", f"{name}/{moment}")
                    yield Piece(kind, key, shape, start, numbers)

    def _part(self, parameter: nn.Parameter, moment: str | None) -> tuple[int, Tensor]:
        """Where this rank's part of a weight or a moment begins, and the part."""
        if self._stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return 0, torch.empty(0)
            return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)
        if moment is None:
            part: Tensor = safe_get_local_fp32_param(parameter)
        else:
            part = safe_get_local_optimizer_state(parameter, moment)
        # The parts are equal, so the last ones may end in padding.
        start = self._ranks.rank * part.numel()
        return start, part[: max(0, parameter.ds_numel - start)]  # type: ignore[attr-defined]

    def _whole(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        if self._stage < 3 and self._ranks.world == 1:
            # All of it is here; the library would add up copies of it over one rank.
            return self._part(parameter, moment)[1].view(parameter.shape)
        value: Tensor = (
            safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
        )
        return value

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], updates: int) -> None:
        """Take weights, moments and the number of updates made so far."""
        if self._stage == 0:
            load_plain_state(self._module, self._engine.optimizer, weights, moments, updates)
            return
        for name, parameter in trained_parameters(self._module).items():
            self._set_shares(parameter, weights[name], {m: moments[f"{name}/{m}"] for m in MOMENTS})
            # The calls above set the optimizer's own copy only: the weight that computes is another one.
            self._set_live(parameter, weights[name])
        frozen = {name: weights[name] for name in frozen_state(self._module)}
        self._module.load_state_dict(frozen, strict=False)
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(updates))

    def close(self) -> None:
        """Release hooks and buffers; another engine may be built after it."""
        self._coalescing.close()
        self._engine.destroy()

    def _cut_up(self, settings: dict[str, Any]) -> None:
        """Give each rank its share of every parameter, one after another: no device ever holds the whole."""
        # By hand, as the library leaves buffers of a module that it cuts up where they are.
        for buffer in self._module.buffers():
            buffer.data = buffer.data.to(self._ranks.device)
        deepspeed.zero.Init(module=self._module, config_dict_or_path=settings)

    def _make_moments(self) -> None:
        """Bring AdamW's moments into being as zeros, so that state can be read and set before the first update.

        DeepSpeed would make them in the first update, and with two parameter groups it then connects parameters to
        moments that the second group does not have yet: reading them back fails. Zeros and a count of 0 are what AdamW
        starts from anyway.
        """
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            count = torch.tensor(0.0, device=flat.device)
            zero.optimizer.state[flat] = {"step": count, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_shares(self, parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
        device = self._ranks.device
        if self._stage < 3:
            safe_set_full_fp32_param(parameter, weight.to(device))
            for moment, value in moments.items():
                safe_set_full_optimizer_state(parameter, value.to(device), moment)
            return
        # At stage 3 the whole-tensor calls fail where a size does not divide by the world: cut and pad here.
        share = safe_get_local_fp32_param(parameter).numel()
        safe_set_local_fp32_param(parameter, self._cut(weight, share))
        for moment, value in moments.items():
            safe_set_local_optimizer_state(parameter, self._cut(value, share), moment)

    def _cut(self, whole: Tensor, share: int) -> Tensor:
        padded = torch.zeros(share * self._ranks.world)
        padded[: whole.numel()] = whole.flatten()
        return padded[self._ranks.rank * share : (self._ranks.rank + 1) * share].to(self._ranks.device)

    def _set_live(self, parameter: nn.Parameter, weight: Tensor) -> None:
        gathered = (
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            if self._stage == 3
            else contextlib.nullcontext()
        )
        with gathered, torch.no_grad():
            if self._stage < 3 or self._ranks.rank == 0:
                parameter.data.copy_(weight)

    def _norm_of_whole_gradient(self) -> Tensor:
        """Stage 0 clips but does not tell the norm."""
        gradients = [p.grad for p in trained_parameters(self._module).values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


class _TupleOutput(nn.Module):
    """The method with its losses as plain tensors: DeepSpeed looks for tensors in tuples and dictionaries only."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: TensorBatch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.method(batch)
        return losses.total, losses.parts
