"""Noise schedules of training, built from the configuration of a diffusers scheduler, in float32."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from common.diffusion import add_noise, velocity


@dataclass(frozen=True)
class Corrupted:
    """Tokens with noise, all float32."""

    noisy: Tensor  # as the clean tokens, (n, N, values)
    timestep: Tensor  # (n, N) in [0, number of training timesteps], for the head
    target: Tensor  # (n, N, values) that the head shall predict


@dataclass(frozen=True)
class FlowMatchingNoise:
    """x_t = sigma noise + (1 - sigma) x with velocity noise - x (Lipman et al. 2023); sigmas (S,) descend from 1."""

    sigmas: Tensor

    def index(self, draw: Tensor) -> Tensor:
        """Normal numbers (n, N) to places in the table: logit-normal (Esser et al. 2024, section 3.1)."""
        count = len(self.sigmas)
        return (draw.float().sigmoid() * count).long().clamp(max=count - 1)

    def corrupt(self, clean: Tensor, noise: Tensor, draw: Tensor) -> Corrupted:
        """Clean tokens and noise (n, N, values), normal numbers (n, N)."""
        clean, noise = clean.float(), noise.float()
        sigma = self.sigmas.to(clean.device)[self.index(draw)]  # (n, N)
        noisy = sigma[..., None] * noise + (1 - sigma[..., None]) * clean  # (n, N, values)
        return Corrupted(noisy, sigma * len(self.sigmas), noise - clean)


@dataclass(frozen=True)
class DDPMNoise:
    """Noise and velocity as `common.diffusion` has them; alphas_cumprod (S,)."""

    alphas_cumprod: Tensor
    prediction_type: str

    def corrupt(self, clean: Tensor, noise: Tensor, draw: Tensor) -> Corrupted:
        """Clean tokens and noise (n, N, values), timesteps (n, N), which may be integers stored as floats."""
        clean, noise, timestep = clean.float(), noise.float(), draw.long()
        target = noise
        if self.prediction_type == "sample":
            target = clean
        elif self.prediction_type == "v_prediction":
            target = velocity(clean, noise, timestep, self.alphas_cumprod)
        return Corrupted(add_noise(clean, noise, timestep, self.alphas_cumprod), timestep.float(), target)


NoiseSchedule = FlowMatchingNoise | DDPMNoise


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training noise of a scheduler_config.json.

    Raises:
        ValueError: the configuration is of a class, or has a prediction type, that cannot be trained.
    """
    class_name = config.get("_class_name")
    if class_name == FlowMatchEulerDiscreteScheduler.__name__:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        return FlowMatchingNoise(scheduler.sigmas.float()[: scheduler.config.num_train_timesteps])
    if class_name != DDPMScheduler.__name__:
        raise ValueError(
            f"the scheduler's configuration has _class_name {class_name!r}; "
            "training takes FlowMatchEulerDiscreteScheduler or DDPMScheduler"
        )
    scheduler = DDPMScheduler.from_config(dict(config))
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f'prediction_type "{prediction_type}" is unknown: use epsilon, v_prediction or sample')
    return DDPMNoise(scheduler.alphas_cumprod.float(), prediction_type)
