"""Classifier-free guidance of the token predictions, with its rescaled, truncated and image-conditional forms."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How the predictions of several conditions are combined. The batch holds the branches one after the other:

    1. text and previous frames, c;
    2. without either, u (with scale > 1);
    3. previous frames without text, i (with image_scale > 0).

    Attributes:
        scale: c counts so much more than u; <= 1 is no guidance.
        trunc: below this timestep (of 1000 ... 0) c alone counts.
        renorm: the guided prediction is shrunk towards the norm of c, at most by this factor; 1 is off.
        image_scale: i counts so much more than u; 0 is off.
        spatiotemporal_scale: not to be had, see the error.
    """

    scale: float = 1.0
    trunc: float = 0.0
    renorm: float = 1.0
    image_scale: float = 0.0
    spatiotemporal_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.spatiotemporal_scale:
            raise ValueError(
                f"spatiotemporal_guidance_scale is {self.spatiotemporal_scale}, but must be 0: it compares with a "
                "prediction of perturbed blocks, which this model does not have, so it would only cost a third pass"
            )
        if not 0 <= self.renorm <= 1:
            raise ValueError(f"guidance_renorm is {self.renorm}, but must be 0 ... 1: 1 keeps the guided prediction")
        if self.image_scale < 0:
            raise ValueError(f"image_guidance_scale is {self.image_scale}, but must be 0 (off) or more")
        if self.image_scale and self.scale <= 1:
            raise ValueError(
                f"image_guidance_scale {self.image_scale} needs a guidance_scale above 1, but that is {self.scale}"
            )

    @property
    def num_branches(self) -> int:
        """Passes through the networks per sample."""
        return 1 if self.scale <= 1 else 3 if self.image_scale else 2

    def expand(self, x: Tensor) -> Tensor:
        """(B, ...) -> (branches * B, ...): the same for every branch."""
        return torch.cat([x] * self.num_branches)

    def expand_frames(self, x: Tensor, no_frame: Tensor) -> Tensor:
        """Tokens of a previous frame (B, N, D); with image guidance, u sees `no_frame`, (1, D) or (1, N, D), instead.

        Returns (branches * B, N, D).
        """
        branches = [x] * self.num_branches
        if self.image_scale:
            branches[1] = no_frame.to(x).expand_as(x)
        return torch.cat(branches)

    def expand_text(self, text: Tensor, negative_text: Tensor) -> Tensor:
        """Text (B, L, D) and that of the unguided branches (B, L, D) -> (branches * B, L, D)."""
        return torch.cat([text, *[negative_text] * (self.num_branches - 1)])

    def combine(self, predictions: Tensor, timestep: float) -> Tensor:
        """Predictions at a timestep, (branches * B, N, D), or of c alone below `trunc`, (B, N, D) -> (B, N, D).

        p = u + scale (c - u), or with image guidance u + scale (c - i), to which image_scale (i - u) is added at last.
        renorm: p is multiplied by |c| / |p| limited to [renorm, 1], norms per sample.
        """
        if self.num_branches == 1 or timestep < self.trunc:
            return predictions
        cond, uncond, *images = predictions.chunk(self.num_branches)
        base = images[0] if images else uncond
        pred = uncond + self.scale * (cond - base)
        if self.renorm < 1:
            pred = pred * (_norms(cond) / _norms(pred)).clamp(self.renorm, 1)
        return pred + self.image_scale * (base - uncond) if images else pred


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))  # (B, 1, ...)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], (B, 3, H, W) or (B, 3, T, H, W) -> uint8 with channels last; fractions are cut off."""
    pixels = (pixels.float() * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.movedim(1, -1)  # (B, H, W, 3) or (B, T, H, W, 3)
