"""What the video autoencoders share: their files, the sizes that they take, and how the trainer reaches their parts."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from common.pretrained import PretrainedModel
from vae.models.posterior import DiagonalGaussian


class VaeOutput(NamedTuple):
    """Of a forward pass.

    Attributes:
        sample: reconstruction (B, 3, T, H, W), about [-1, 1].
        moments: (B, 2z, t, h, w), see `posterior.DiagonalGaussian`.
        coefficients: of wavelets, which a loss compares in pairs: (encoder's, decoder's, encoder's, decoder's, ...).
    """

    sample: Tensor
    moments: Tensor
    coefficients: tuple[Tensor, ...]


class Autoencoder(PretrainedModel):
    """An autoencoder of clips (B, 3, T, H, W), T = temporal_factor * n + 1, H and W multiples of spatial_factor.

    Args:
        config: an instance of the class's `config_class`, with the properties `temporal_factor`, `spatial_factor` and
            `latent_channels`; None is its defaults.
    """

    has_wavelet_coefficients = False
    encoder: nn.Module
    decoder: nn.Module

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or self.config_class())

    @classmethod
    def json_class_name(cls) -> str:
        return f"{cls.__name__}Model"  # the original's name

    @classmethod
    def problem_of(cls, key: str, value: Any, default: Any) -> str | None:
        if key not in ("scale", "shift") and _is_negative(value):
            return f"{key} is {value!r}, but must not be negative"
        return super().problem_of(key, value, default)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent, after the first."""
        return self.config.temporal_factor

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, in height and width."""
        return self.config.spatial_factor

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight at which the losses' gradients are balanced."""
        return self.decoder.conv_out.weight

    def encoder_modules(self) -> list[nn.Module]:
        return [self.encoder]

    def decoder_modules(self) -> list[nn.Module]:
        return [self.decoder]

    def check_size(self, num_frames: int, height_px: int, width_px: int) -> None:
        """Raises ValueError, which names the nearest sizes that do, for clips that are not whole latents."""
        problems = []
        factor = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % factor:
            below = (num_frames - 1) // factor * factor + 1
            problems.append(f"{num_frames} frames are not {factor} n + 1: use {_either(below, below + factor)}")
        for name, size_px in (("height", height_px), ("width", width_px)):
            if size_px < 1 or size_px % self.spatial_factor:
                below = size_px // self.spatial_factor * self.spatial_factor
                choice = _either(below, below + self.spatial_factor)
                problems.append(f"a {name} of {size_px} px is no multiple of {self.spatial_factor}: use {choice}")
        if problems:
            raise ValueError(f"{type(self).__name__} cannot take these clips: " + "; ".join(problems))

    def latent_shape(self, num_frames: int, height_px: int, width_px: int) -> tuple[int, int, int, int]:
        """(z, t, h, w) of the latents of such a clip; ValueError as in `check_size`."""
        self.check_size(num_frames, height_px, width_px)
        latent_frames = (num_frames - 1) // self.temporal_factor + 1
        return self.latent_channels, latent_frames, height_px // self.spatial_factor, width_px // self.spatial_factor

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """(B, 3, T, H, W) in [-1, 1] -> posterior of (B, z, t, h, w); ValueError for sizes as in `check_size`."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, H, W), about [-1, 1]."""
        raise NotImplementedError

    def forward(self, x: Tensor, noise: Tensor | None = None) -> VaeOutput:
        """Reconstruction from a posterior sample, or from its mode without noise (B, z, t, h, w)."""
        posterior = self.encode(x)
        z = posterior.mode() if noise is None else posterior.sample(noise)
        return VaeOutput(self.decode(z), posterior.moments, ())


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if below > 0 else f"{above}"


def _is_negative(value: Any) -> bool:
    return any(map(_is_negative, value)) if isinstance(value, list | tuple) else isinstance(value, int) and value < 0
