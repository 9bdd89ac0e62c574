"""Long clips in windows of frames that are coded one after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TemporalTiling:
    """Windows of `window_frames` frames, which are `window_latents` latent frames.

    Windows overlap by `overlap_frames` when they are encoded, and by `overlap_latents` when they are decoded. From the
    second window on, that many latents and frames are dropped at the front, the other way round. What is at most one
    window long is coded as a whole; of what is longer, a tail that fills no window is dropped, as in the original.
    """

    window_frames: int = 17
    window_latents: int = 5
    overlap_frames: int = 1
    overlap_latents: int = 1

    def encode(self, encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) -> (B, 2 C, t, h, w) with `encode` for windows."""
        return _by_windows(encode, x, self.window_frames, self.overlap_frames, self.overlap_latents)

    def decode(self, decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Latents (B, C, t, h, w) -> (B, 3, T, H, W) with `decode` for windows."""
        return _by_windows(decode, z, self.window_latents, self.overlap_latents, self.overlap_frames)

    def whole_latents(self, num_latents: int) -> int:
        """How many of so many latent frames are decoded."""
        window, stride = self.window_latents, self.window_latents - self.overlap_latents
        return num_latents - max(0, num_latents - window) % stride

    def check_frames(self, num_frames: int, factor: int) -> None:
        """Raises ValueError, which names the nearest lengths that do, for clips whose end would be lost.

        Args:
            factor: frames per latent frame after the first.
        """
        window, stride = self.window_frames, self.window_frames - self.overlap_frames
        _check_length(num_frames, [*range(1, window, factor), window], window, stride, "frames")

    def check_latents(self, num_latents: int) -> None:
        """Raises ValueError, which names the nearest lengths that do, for latents whose end would be lost."""
        window, stride = self.window_latents, self.window_latents - self.overlap_latents
        _check_length(num_latents, list(range(1, window + 1)), window, stride, "latent frames")


def _by_windows(code: Callable[[Tensor], Tensor], x: Tensor, window: int, overlap: int, dropped: int) -> Tensor:
    if x.shape[2] <= window:
        return code(x)
    starts = range(0, x.shape[2] - window + 1, window - overlap)
    parts = [code(x[:, :, start : start + window]) for start in starts]
    return torch.cat([parts[0], *(part[:, :, dropped:] for part in parts[1:])], dim=2)


def _check_length(length: int, short: list[int], window: int, stride: int, unit: str) -> None:
    if length in short or (length > window and (length - window) % stride == 0):
        return
    steps = max(0, length - window) // stride
    candidates = {*short, window + steps * stride, window + (steps + 1) * stride}
    below = [each for each in candidates if each < length]
    choice = [str(max(below))] if below else []
    choice.append(str(min(each for each in candidates if each > length)))
    rest = f" + {window % stride}" if window % stride else ""
    raise ValueError(
        f"the end of {length} {unit} would be lost: use {' or '.join(choice)} "
        f"(any of {', '.join(map(str, short))} and {stride} n{rest} {unit} does)"
    )
