"""What a step costs, ours against the same network from stock layers: CPU seconds turn by turn, peak memory, equality.

The reference computes hidden positions too, level after level, with autograd's own gradients (`stock`). Both sides have
the same weights, masks and views; before anything is timed their outputs and gradients are compared.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mim_scale.bench.stock import StockDecoder, StockEncoder
from mim_scale.config import HybridConfig, MaeConfig, MaskInMaskConfig, PretrainConfig
from mim_scale.config_file import check_config, config_values
from mim_scale.errors import ConfigError
from mim_scale.methods.build import build_method
from mim_scale.methods.noise import noise_batch
from mim_scale.methods.targets import errors_of, hidden_targets
from mim_scale.methods.views import make_views
from mim_scale.models.hybrid import HybridEncoder
from mim_scale.streaming.device import TensorBatch
from mim_scale.training.allocator import keep_freed_memory
from mim_scale.training.memory import peak_resident_bytes

AT_ONCE = 4
"""Views of an encoder's run; and views of a step whose activations are held at once, on both sides."""
TOLERANCE = 1e-5

Side = Callable[[], Tensor]
"""Forward and backward pass; gives what is compared, outputs or loss."""


@dataclass(frozen=True)
class Comparison:
    """One part of the network on every side."""

    part: str
    seconds: dict[str, list[float]]
    """CPU seconds of each side's runs, which took turns."""
    outputs_apart: float
    """Largest difference over largest value."""
    gradients_apart: float
    """Norm of the difference over norm, all parameters together."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Largest resident size of a process that ran one pass of that side, libraries and weights included."""

    def ratio(self, side: str) -> float:
        """Median of the turns' ratios: how many times what ours takes."""
        return statistics.median(b / a for a, b in zip(self.seconds["ours"], self.seconds[side], strict=True))


def benchmark_config(config: PretrainConfig, at_once: int = AT_ONCE) -> PretrainConfig:
    """The config as it is measured: float32, nothing recomputed, views in chunks, reconstruction alone.

    One sample at a time; of a method that compares samples with each other one group, whose views go through at once.
    """
    values, together = config_values(config), config.method.samples_together
    values["train"] |= {
        "precision": "fp32",
        "activation_checkpointing": "none",
        "views_at_once": at_once if together == 1 else None,
        "micro_batch": together,
    }
    if isinstance(config.method, MaskInMaskConfig):
        values["method"]["alignment"] = "none"
    return check_config(PretrainConfig, values, "bench step")


def check_comparable(config: PretrainConfig) -> None:
    """Raise ConfigError where the reference has no such network."""
    if not isinstance(config.model, HybridConfig) or not isinstance(config.method, MaskInMaskConfig | MaeConfig):
        raise ConfigError(
            f"bench step compares method mask_in_mask or mae on backbone hybrid, not {config.method.name} on "
            f"{config.model.backbone}: take --ours-only"
        )


def encoder_sides(config: PretrainConfig, ratio: float) -> dict[str, tuple[nn.Module, Side]]:
    """The encoder on 4 views that hide a share of their tokens: ours, on whole grids, and from stock layers."""
    assert isinstance(config.model, HybridConfig)
    plan = config.plan
    torch.manual_seed(config.seed)
    ours = HybridEncoder(config.model, plan.view, plan.token)
    stock = StockEncoder(config.model, plan.view, plan.token)
    stock.load_state_dict(ours.state_dict())
    shown = max(1, round(plan.num_tokens * (1 - ratio)))
    visible = torch.stack([torch.randperm(plan.num_tokens)[:shown].sort().values for _ in range(AT_ONCE)])
    views = torch.rand(AT_ONCE, 1, *plan.view)

    def side(run: Callable[[Tensor, Tensor], Tensor]) -> Side:
        def passes() -> Tensor:
            output = run(views, visible)
            output.square().sum().backward()  # type: ignore[no-untyped-call]
            return output.detach()

        return passes

    return {"ours": (ours, side(ours)), "dense": (ours, side(ours.on_whole_grids)), "stock": (stock, side(stock))}


def step_sides(config: PretrainConfig) -> dict[str, tuple[nn.Module, Side]]:
    """All views of one sample, encoder, decoder and loss: ours, and level after level from stock layers."""
    assert isinstance(config.model, HybridConfig)
    assert isinstance(config.method, MaskInMaskConfig | MaeConfig)
    batch = noise_batch(config, torch.device("cpu"))
    method: Any = build_method(config)
    stock = nn.ModuleDict(
        {
            "encoder": StockEncoder(config.model, config.plan.view, config.plan.token),
            "decoder": StockDecoder(config.method.decoder, method.encoder.width, config.plan.grid, config.plan.token),
        }
    )
    stock.load_state_dict(method.state_dict())

    def ours() -> Tensor:
        total: Tensor = method(batch).total
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    return {"ours": (method, ours), "stock": (stock, lambda: _stock_step(stock, batch, method))}


def _stock_step(stock: nn.ModuleDict, batch: TensorBatch, method: Any) -> Tensor:
    plan, weights, total = method.config.plan, method.weights(), torch.zeros(())
    at_once = method.config.train.views_at_once
    views = make_views(batch, plan, method.config.data.window_hu)
    for number, (level_views, level) in enumerate(zip(views, batch.levels, strict=True)):
        for group in level.groups():
            of_group = level_views[group.views]
            chunks = zip(*(torch.split(part, at_once) for part in (of_group, group.visible, group.hidden)), strict=True)
            for inner, visible, hidden in chunks:
                predicted = stock["decoder"](stock["encoder"](inner, visible), visible, hidden)
                predicted = predicted.gather(1, hidden[:, :, None].expand(-1, -1, predicted.shape[-1]))
                targets = hidden_targets(inner, hidden, plan.token, method.normalise_targets)
                share = errors_of(predicted - targets, method.error).mean(dim=(1, 2)).sum() / len(level_views)
                share = weights.get(f"level_{number + 1}", 1.0) * share
                share.backward()
                total += share.detach()
    return total


def compare(part: str, sides: dict[str, tuple[nn.Module, Side]], runs: int) -> Comparison:
    """Check that the sides are equal, then let them take turns; that check is the warm-up.

    Raises:
        AssertionError: outputs or gradients differ.
    """
    outputs, gradients = {}, {}
    for name, (module, run) in sides.items():
        module.zero_grad()
        outputs[name] = run()
        gradients[name] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    reference, of_reference = outputs["stock"], gradients["stock"]
    apart = max(float((found - reference).abs().max() / reference.abs().max()) for found in outputs.values())
    gradients_apart = max(float((found - of_reference).norm() / of_reference.norm()) for found in gradients.values())
    assert apart < TOLERANCE, f"{part}: outputs differ by {apart:.1e}"
    assert gradients_apart < TOLERANCE, f"{part}: gradients differ by {gradients_apart:.1e}"
    return Comparison(part, in_turns(sides, runs), apart, gradients_apart)


def in_turns(sides: dict[str, tuple[nn.Module, Side]], runs: int) -> dict[str, list[float]]:
    """CPU seconds of each side's runs."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, (module, run) in sides.items():
            seconds[name].append(cpu_seconds(module, run))
    return seconds


def lighter_sides(config: PretrainConfig, reference: PretrainConfig) -> dict[str, tuple[nn.Module, Side]]:
    """The step of a config, ours, and that of another from stock layers, whose equality to ours is checked first."""
    sides = step_sides(reference)
    compare("step, one sample", sides, runs=0)
    return {"ours": step_sides(config)["ours"], "stock": sides["stock"]}


def precision_sides(config: PretrainConfig) -> dict[str, tuple[nn.Module, Side]]:
    """The step in fp32 and with bf16 autocast, same weights; each has run once."""

    def in_bf16(run: Side) -> Side:
        def passes() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return run()

        return passes

    module, run = step_sides(config)["ours"]
    sides = {"fp32": (module, run), "bf16": (module, in_bf16(run))}
    for _, once in sides.values():
        once()
    return sides


def tokens_seen(config: PretrainConfig) -> tuple[int, int]:
    """(visible, all) tokens of one sample's views; of a drawn ratio the middle is taken."""
    plan = config.plan
    levels = [(plan.num_views(level), sum(plan.num_hidden(level)) // 2) for level in range(len(plan.levels))]
    return sum(views * (plan.num_tokens - hidden) for views, hidden in levels), sum(
        views * plan.num_tokens for views, _ in levels
    )


def cpu_seconds(module: nn.Module, run: Side) -> float:
    """Of one pass, from cleared gradients."""
    module.zero_grad()
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def training_seconds(config: PretrainConfig, runs: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a training step on one micro-batch, AdamW included: medians."""
    batch, method = noise_batch(config, torch.device("cpu")), build_method(config)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    found = []
    for _ in range(runs + 1):
        start = time.process_time(), time.perf_counter()
        optimizer.zero_grad()
        method(batch).total.backward()
        optimizer.step()
        found.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return statistics.median(cpu for cpu, _ in found[1:]), statistics.median(wall for _, wall in found[1:])


def peak_bytes(config: PretrainConfig, side: str, ratio: float | None, keeps: bool) -> int:
    """The largest resident size of a fresh process that runs one pass of the step, or of the encoder at a ratio."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_alone, args=(config, side, ratio, keeps, sender))
    child.start()
    sender.close()
    try:
        found = int(receiver.recv())
    except EOFError:
        found = 0
    child.join()
    return found


def _run_alone(config: PretrainConfig, side: str, ratio: float | None, keeps: bool, sender: Any) -> None:
    torch.set_num_threads(1)
    if keeps:
        keep_freed_memory()
    sides = step_sides(config) if ratio is None else encoder_sides(config, ratio)
    _, run = sides.pop(side)
    sides.clear()
    run()
    sender.send(peak_resident_bytes())


def told(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
