"""CogVideoX's noise schedule, in double precision: rounded to bfloat16, 1 - alpha is zero at the earliest timesteps."""

from collections.abc import Mapping
from typing import Any

import torch

DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "snr_shift_scale": 1.0,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
}  # CogVideoX-5B-I2V; its 2B sibling has snr_shift_scale 3
ONLY = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


def alphas_cumprod(config: Mapping[str, Any] | None = None) -> torch.Tensor:
    """Cumulative product of the alphas of a scheduler.

    Shifted in SNR (CogVideoX, section 2.3), then rescaled so that the last timestep is pure noise (Lin et al. 2024,
    algorithm 1).

    Args:
        config: a `scheduler_config.json`; what it leaves out, or None, is CogVideoX-5B-I2V's.

    Returns:
        (num_train_timesteps,) float64, falling, in [0, 1).

    Raises:
        ValueError: the scheduler is not of CogVideoX's kind.
    """
    settings = DEFAULTS | dict(config or {})
    for name, value in ONLY.items():
        if settings[name] != value:
            raise ValueError(f"the scheduler's {name} is {settings[name]!r}: only {value!r}, CogVideoX's, is supported")
    start, end = settings["beta_start"] ** 0.5, settings["beta_end"] ** 0.5
    betas = torch.linspace(start, end, settings["num_train_timesteps"], dtype=torch.float64).square()  # (T,)
    alphas = (1 - betas).cumprod(0)
    shift = settings["snr_shift_scale"]
    alphas = alphas / (shift + (1 - shift) * alphas)
    if settings["rescale_betas_zero_snr"]:
        roots = alphas.sqrt()
        alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    return alphas
