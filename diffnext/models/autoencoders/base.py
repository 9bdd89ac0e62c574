"""What the autoencoders share: latents' scale, sizes that they take."""

from typing import Any, NamedTuple

from torch import Tensor

from common.pretrained import PretrainedModel
from diffnext.models.autoencoders.tiling import TemporalTiling
from diffnext.models.posterior import DiagonalGaussianDistribution, IdentityDistribution


class EncoderOutput(NamedTuple):
    """Of `encode`: the posterior of the latents."""

    latent_dist: DiagonalGaussianDistribution | IdentityDistribution


class DecoderOutput(NamedTuple):
    """Of `decode`: pixels, about [-1, 1]."""

    sample: Tensor


class Autoencoder(PretrainedModel):
    """An autoencoder whose latents a model sees as (z - shift_factor) * scaling_factor.

    Attributes:
        spatial_factor: pixels per latent, in height and width.
    """

    spatial_factor: int

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.latent_channels = config.latent_channels

    def scale_(self, x: Tensor) -> Tensor:
        """Latents as a model sees them; changes `x`, keeps its type."""
        if self.config.shift_factor:
            x.sub_(self.config.shift_factor)
        return x.mul_(self.config.scaling_factor)

    def unscale_(self, x: Tensor) -> Tensor:
        """Latents as `decode` takes them; changes `x`, keeps its type."""
        x.mul_(1 / self.config.scaling_factor)
        return x.add_(self.config.shift_factor) if self.config.shift_factor else x

    def check_size(self, num_frames: int, height_px: int, width_px: int) -> None:
        """Raises ValueError, which names the nearest sizes that do, for what is not a whole number of latents."""
        for name, size_px in (("height", height_px), ("width", width_px)):
            below = size_px // self.spatial_factor * self.spatial_factor
            if below != size_px or size_px < 1:
                choice = f"{below} or {below + self.spatial_factor}" if below else f"{self.spatial_factor}"
                raise ValueError(f"a {name} of {size_px} px is no multiple of {self.spatial_factor}: use {choice}")

    def _posterior(self, parameters: Tensor) -> EncoderOutput:
        is_gaussian = getattr(self.config, "double_z", True)
        return EncoderOutput((DiagonalGaussianDistribution if is_gaussian else IdentityDistribution)(parameters))


class VideoAutoencoder(Autoencoder):
    """An autoencoder of clips; images (B, 3, H, W) are clips of one frame.

    Attributes:
        temporal_factor: frames per latent frame after the first.
        tiling: of clips that are too long to be coded as a whole.
    """

    temporal_factor: int
    tiling: TemporalTiling | None = None

    def check_size(self, num_frames: int, height_px: int, width_px: int) -> None:
        super().check_size(num_frames, height_px, width_px)
        if self.tiling is not None:
            self.tiling.check_frames(num_frames, self.temporal_factor)
        elif num_frames < 1 or (num_frames - 1) % self.temporal_factor:
            below = (num_frames - 1) // self.temporal_factor * self.temporal_factor + 1
            choice = f"{below} or {below + self.temporal_factor}" if below > 0 else "1"
            raise ValueError(f"{num_frames} frames are not {self.temporal_factor} n + 1: use {choice}")

    def encode(self, x: Tensor) -> EncoderOutput:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> posterior with parameters (B, 2 C, t, h, w); without T no t.

        With windows, frames at the end that fill none are dropped (see `TemporalTiling`); `check_size` refuses them.

        Raises:
            ValueError: sizes that are not whole latents.
        """
        clips = x.unsqueeze(2) if x.dim() == 4 else x  # (B, 3, T, H, W)
        if self.tiling is not None:
            super().check_size(*clips.shape[2:])
            parameters = self.tiling.encode(self._encode, clips)  # (B, 2 C, t, h, w)
        else:
            self.check_size(*clips.shape[2:])
            parameters = self._encode(clips)  # (B, 2 C, t, h, w)
        return self._posterior(parameters.squeeze(2) if x.dim() == 4 else parameters)

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, C, t, h, w) -> pixels (B, 3, T, H, W); without t no T.

        With windows, latents at the end that fill none are dropped; `tiling.check_latents` refuses them.
        """
        latents = z.unsqueeze(2) if z.dim() == 4 else z  # (B, C, t, h, w)
        if self.tiling is not None:
            pixels = self.tiling.decode(self._decode, latents)  # (B, 3, T, H, W)
        else:
            pixels = self._decode(latents)  # (B, 3, T, H, W)
        return DecoderOutput(pixels.squeeze(2) if z.dim() == 4 else pixels)

    def _encode(self, x: Tensor) -> Tensor:
        """One window: (B, 3, T, H, W) -> (B, 2 C, t, h, w)."""
        raise NotImplementedError

    def _decode(self, z: Tensor) -> Tensor:
        """One window: (B, C, t, h, w) -> (B, 3, T, H, W)."""
        raise NotImplementedError
