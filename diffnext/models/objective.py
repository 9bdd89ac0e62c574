"""What is random in a step, the latents that go in, and the losses that come out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffnext.models.posterior import DiagonalGaussianDistribution


@dataclass(frozen=True)
class NovaDraws:
    """Every random number of one step of B samples with T latent frames of N tokens, each token of V values.

    R is the number of noises that the head sees per token (`loss_repeat`); rows go in the order (R, B, T).
    """

    posterior_noise: Tensor  # (B, C, [T,] H, W) normal
    text_dropout: Tensor  # (B,) uniform in [0, 1)
    token_order: Tensor  # (B * T, N, 1) uniform in [0, 1)
    mask_ratio: float  # of `masking.mask_ratio`, one for all samples of a step
    noise: Tensor  # (R * B * T, N, V) normal
    timesteps: Tensor  # (R * B * T, N): normal for flow matching, integers in [0, training timesteps) for DDPM


def nova_inputs(
    moments: Tensor, posterior_noise: Tensor, scaling_factor: float, shift_factor: float | None = None
) -> Tensor:
    """Scaled latents of cached moments: (B, 2 C, [T,] H, W) and normal (B, C, [T,] H, W) to the latter, float32.

    Raises:
        ValueError: the noise has another shape.
    """
    posterior = DiagonalGaussianDistribution(moments.float())
    if posterior_noise.shape != posterior.mean.shape:
        shapes = f"{tuple(posterior_noise.shape)}, expected {tuple(posterior.mean.shape)}"
        raise ValueError(f"posterior_noise is {shapes} for moments {tuple(moments.shape)}")
    latents = posterior.sample(noise=posterior_noise.float())
    return (latents - (shift_factor or 0.0)) * scaling_factor


def token_losses(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each token, (n, k, V) and (n, k, V) to (n, k), in float32."""
    return (pred.float() - target.float()).square().mean(dim=-1)


def nova_losses(losses: Tensor, weights: Tensor, num_frames: int) -> dict[str, Tensor]:
    """Means of the tokens' losses.

    Args:
        losses, weights: (R * B * T, k); weights are 1 for masked tokens, else 0. All frames have equally many.

    Returns:
        `loss` for images; for videos `loss_t2i`, the mean over the first frames, and `loss_i2i`, that over all others.
    """
    shares = losses * weights / (weights.sum() + 1e-5)  # (R * B * T, k)
    if num_frames == 1:
        return {"loss": shares.sum()}
    per_frame = shares.unflatten(0, (-1, num_frames)).sum(dim=(0, 2))  # (T,)
    return {
        "loss_t2i": num_frames * per_frame[0],
        "loss_i2i": num_frames / (num_frames - 1) * per_frame[1:].sum(),
    }


def total_loss(losses: Mapping[str, Tensor], t2i_weight: float = 1.0) -> Tensor:
    """What is minimised: the sum, in which `loss_t2i` counts `t2i_weight`; 0 trains image-to-video only."""
    weighted = [t2i_weight * value if name == "loss_t2i" else value for name, value in losses.items()]
    return torch.stack(weighted).sum()
