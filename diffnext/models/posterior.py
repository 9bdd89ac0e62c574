"""Posteriors of latents."""

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian for each latent, out of an encoder's output. `parameters` is that output, untouched.

    Means and variances are float32, whatever the parameters' type: half precision would round the standard deviations.

    Args:
        parameters: (B, 2 C, ...), C means and C logarithms of variances; with an odd number C + 1 of channels, the last
            one is the logarithm of all variances. Logarithms are clamped to [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        num_channels = parameters.shape[1]
        num_means = num_channels // 2 if num_channels % 2 == 0 else num_channels - 1
        mean, logvar = parameters.float().split([num_means, num_channels - num_means], dim=1)  # (B, C, ...)
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0).expand_as(mean)

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()  # (B, C, ...)

    @property
    def var(self) -> Tensor:
        return self.logvar.exp()  # (B, C, ...)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise as (B, C, ...) of the parameters' type.

        Args:
            generator: of the noise, on any device.
            noise: a standard normal draw (B, C, ...) to use instead.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)  # (B, C, ...)
        return (self.mean + self.std * noise.to(self.mean.device)).to(self.parameters.dtype)  # (B, C, ...)


class IdentityDistribution:
    """Latents (B, C, ...) of an autoencoder without variances (`double_z` false), in the shape of a posterior."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = self.mean = parameters

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """The latents themselves."""
        return self.parameters
