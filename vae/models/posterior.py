"""The encoder's posterior: a Gaussian with a diagonal covariance."""

import math

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) for each sample of a batch.

    Args:
        moments: (B, 2z, T, H, W): z channels of means, then z of log variances, which are clamped to [-30, 20].

    Attributes:
        mean, logvar, std, var: (B, z, T, H, W).
    """

    def __init__(self, moments: Tensor) -> None:
        if moments.shape[1] % 2:
            raise ValueError(f"moments have {moments.shape[1]} channels; means and log variances make an even number")
        self.moments = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The most probable latents: the means."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, for standard normal noise of the means' shape."""
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """KL(self || other), or to the standard normal: nats, summed over all latents of a sample: (B,)."""
        if other is None:
            terms = self.mean.square() + self.var - 1 - self.logvar
        else:
            squares = ((self.mean - other.mean).square() + self.var) / other.var
            terms = squares - 1 - self.logvar + other.logvar
        return 0.5 * terms.flatten(1).sum(1)  # (B,)

    def nll(self, sample: Tensor) -> Tensor:
        """-log density of `sample`: nats, summed over all latents of a sample: (B,)."""
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(1)  # (B,)
