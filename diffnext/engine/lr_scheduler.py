"""Learning rates as pure functions of the optimizer step, so that a resumed run needs no state of theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConstantLR:
    """Linear warm-up to `lr_max`, then that.

    Attributes:
        lr_max, lr_min: greatest and least learning rate; the schedules fall from the one towards the other.
        max_steps: length of the schedule in optimizer steps, warm-up included; only the cosine needs it.
        warmup_steps, warmup_factor: steps of warm-up, and the share of `lr_max` at which it begins.
    """

    lr_max: float
    lr_min: float = 0.0
    max_steps: int | None = None
    warmup_steps: int = 0
    warmup_factor: float = 0.001

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            share = (step + 1) / self.warmup_steps
            return self.lr_max * (share + (1 - share) * self.warmup_factor)
        return self.lr_min + (self.lr_max - self.lr_min) * self.decay(step)

    def decay(self, step: int) -> float:
        """Share of the way from `lr_min` to `lr_max`."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class CosineLR(ConstantLR):
    """Half a cosine from `lr_max` to `lr_min`, in stairs of `decay_step` steps."""

    decay_step: int = 1

    def __post_init__(self) -> None:
        if self.max_steps is None or self.max_steps <= self.warmup_steps:
            raise ValueError(f"CosineLR needs max_steps above warmup_steps {self.warmup_steps}, got {self.max_steps}")

    def decay(self, step: int) -> float:
        passed = (step - self.warmup_steps) // self.decay_step * self.decay_step
        return 0.5 * (1.0 + math.cos(math.pi * passed / ((self.max_steps or 1) - self.warmup_steps)))


@dataclass(frozen=True, kw_only=True)
class MultiStepLR(ConstantLR):
    """Times `decay_gamma` at each of `decay_steps`."""

    decay_steps: Sequence[int] = ()
    decay_gamma: float = 0.1

    def decay(self, step: int) -> float:
        return self.decay_gamma ** sum(step >= at for at in self.decay_steps)
