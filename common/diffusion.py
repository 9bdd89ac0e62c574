"""The formulas of noise schedules that several trainers share, whatever the precision of the latents.

They are computed in the schedule's own precision, float32 at the least, and rounded once, to float32: in half precision
1 - a_t is zero at the earliest timesteps, which would get no noise.
"""

import torch
from torch import Tensor


def noise_levels(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), shaped to multiply `like`.

    Args:
        timesteps: integers in [0, T), of the first axes of `like`: (N,) is one per row, (N, K) one per row and token.
        alphas_cumprod: (T,), the a_t of Ho et al. 2020 (there alpha bar), of any floating-point type.
        like: (N, ...).

    Returns:
        two float32 tensors (N, ..., 1, 1) on the device of `like`.
    """
    alphas = _alphas(timesteps.to(like.device), alphas_cumprod)
    alphas = alphas.reshape(*timesteps.shape, *[1] * (like.ndim - timesteps.ndim))  # (N, ..., 1, 1)
    return alphas.sqrt().float(), (1 - alphas).sqrt().float()


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward diffusion, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4).

    Args:
        clean, noise: (N, ...) of any precision.
        timesteps, alphas_cumprod: as in `noise_levels`.

    Returns:
        (N, ...) float32.
    """
    signal, sigma = noise_levels(timesteps, alphas_cumprod, clean)
    return signal * clean.float() + sigma * noise.float()


def velocity(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans and Ho 2022, section 4); shapes as in `add_noise`."""
    signal, sigma = noise_levels(timesteps, alphas_cumprod, clean)
    return signal * noise.float() - sigma * clean.float()


def signal_to_noise(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """SNR = a_t / (1 - a_t) (Hang et al. 2023), float32, one for each of the timesteps."""
    alphas = _alphas(timesteps, alphas_cumprod)
    return (alphas / (1 - alphas)).float()


def _alphas(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    precision = torch.promote_types(alphas_cumprod.dtype, torch.float32)
    return alphas_cumprod.to(timesteps.device, precision)[timesteps]
