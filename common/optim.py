"""Optimizers, learning rate as a pure function of the optimizer step, and the exponential moving average of weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.config import AdamWConfig, OptimConfig
from common.sharding import part_of, sharded_like

# Learning rate --------------------------------------------------------------------------------------------------------


def lr_factor(
    name: str,
    step: int,
    *,
    warmup_steps: int = 0,
    total_steps: int = 1,
    num_cycles: int = 1,
    power: float = 1.0,
    step_rules: str | None = None,
    base_lr: float = 1.0,
) -> float:
    """What the base learning rate is multiplied by in optimizer step `step` (from 0).

    The names and curves are those of `diffusers.optimization.get_scheduler`; `polynomial` ends at 1e-7 absolute, which
    is why it needs `base_lr`. Nothing here depends on the number of processes.
    """
    if name == "constant":
        return 1.0
    if name == "piecewise_constant":
        return _piecewise(step_rules, step)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "linear":
        return max(0.0, 1.0 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return 0.0 if progress >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))
    if name == "polynomial":
        end = 1e-7 / base_lr
        return end if step > total_steps else (1.0 - end) * (1.0 - progress) ** power + end
    raise ValueError(f"lr_scheduler {name!r} is unknown")


def _piecewise(rules: str | None, step: int) -> float:
    """`1:10,0.1:20,0.01`: factor 1 before step 10, 0.1 before step 20, then 0.01."""
    *parts, last = (rules or "").split(",")
    try:
        steps = sorted((int(until), float(factor)) for factor, until in (part.split(":") for part in parts))
        return next((factor for until, factor in steps if step < until), float(last))
    except ValueError:
        raise ValueError(
            f"lr_step_rules {rules!r} must read `factor:until_step,...,last_factor`, e.g. 1:1000,0.1"
        ) from None


def lr_schedule(optim: OptimConfig, total_steps: int, samples_per_step: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step, as a function of its number from 0.

    `samples_per_step` (processes x accumulation x batch size) counts only where `scale_lr` is set.
    """
    base_lr = optim.learning_rate * (samples_per_step if optim.scale_lr else 1)

    def learning_rate(step: int) -> float:
        return base_lr * lr_factor(
            optim.lr_scheduler,
            step,
            warmup_steps=optim.lr_warmup_steps,
            total_steps=total_steps,
            num_cycles=optim.lr_num_cycles,
            power=optim.lr_power,
            step_rules=optim.lr_step_rules,
            base_lr=base_lr or 1.0,
        )

    learning_rate(0)  # a rule that cannot be read is an error now, not in the first step
    return learning_rate


# Optimizers -----------------------------------------------------------------------------------------------------------


def build_adamw(parameters: Iterable[Any], optim: AdamWConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over parameters or groups that require gradients; 8-bit with `use_8bit_adam`, else fused.

    A group may carry `lr_scale`, by which the loop multiplies its learning rate.
    """
    settings: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "weight_decay": optim.adam_weight_decay,
        "eps": optim.adam_epsilon,
    }
    if optim.use_8bit_adam:
        try:
            import bitsandbytes  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                "use_8bit_adam needs bitsandbytes: pip install 'visual-trainers[bnb]', or leave use_8bit_adam out"
            ) from None
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    fused = device.type in ("cuda", "cpu", "xpu", "mps")
    return torch.optim.AdamW(parameters, fused=fused, **settings)


@contextmanager
def settings_kept(optimizers: Iterable[Any]) -> Iterator[None]:
    """While states are loaded, which bring settings (weight decay, betas) along: those of the configuration hold."""
    optimizers = list(optimizers)
    kept = [[{k: v for k, v in group.items() if k != "params"} for group in each.param_groups] for each in optimizers]
    yield
    for optimizer, groups in zip(optimizers, kept, strict=True):
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)


@dataclass
class Learner:
    """One optimizer with all that the loop needs to step it.

    Attributes:
        model: the prepared (wrapped) module whose gradients are clipped together.
        optimizer: the prepared optimizer.
        learning_rate: of optimizer step n, see `lr_schedule`.
        max_grad_norm: 0 is off.
        ema: moving average of the model's trainable parameters, or None.
    """

    model: nn.Module
    optimizer: Any
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    ema: "EMA | None" = None

    def set_learning_rate(self, step: int) -> float:
        """Writes the learning rate of `step` into every group; returns it without `lr_scale`."""
        learning_rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        return learning_rate


# Moving average -------------------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a module's trainable parameters, in float32; of a sharded one, of each part apart.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), as in diffusers' `EMAModel`, whose folders it writes.

    Args:
        module: the unwrapped model.
        decay: upper bound.
        offload: keep the average in host memory.
        warmup: False uses `decay` itself from the first update on.
        every: only every so-manieth call of `update` changes the average, and the last of a run.
    """

    def __init__(self, module: nn.Module, decay: float, offload: bool = False, warmup: bool = True, every: int = 1):
        self.module, self.decay, self.updates = module, decay, 0
        self.offload, self.warmup, self.every = offload, warmup, every
        self.average = [self._place(part.float().clone()) for part in self._live()]

    def _live(self) -> list[Tensor]:
        return [part_of(p.detach()) for p in self.module.parameters() if p.requires_grad]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.cpu() if self.offload else tensor

    def current_decay(self) -> float:
        """The decay that the last update used."""
        if not self.warmup:
            return self.decay
        step = self.updates - 1
        return 0.0 if step <= 0 else min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, is_last: bool = False) -> None:
        """One update, after an optimizer step; without `is_last` a run shorter than `every` would average nothing."""
        self.updates += 1
        if self.updates % self.every and not is_last:
            return
        live = [self._place(part.float()) for part in self._live()]
        torch._foreach_lerp_(self.average, live, 1.0 - self.current_decay())  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the average inside the block, and its own weights again after it, bit for bit."""
        own = [part.to("cpu" if self.offload else part.device, copy=True) for part in self._live()]
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for part, value in zip(self._live(), values, strict=True):
            part.copy_(value)

    def restore(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Takes up the state of an average that was saved: the averaged weights by name, and the number of updates."""
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        for average, (name, p) in zip(self.average, named, strict=True):
            average.copy_(part_of(sharded_like(weights[name], p)))
        self.updates = updates
