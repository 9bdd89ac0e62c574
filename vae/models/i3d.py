"""I3D (Carreira & Zisserman 2017, "Quo Vadis, Action Recognition?"), whose Kinetics-400 logits FVD compares.

State-dict names are those of the videogpt FVD. The pooling and convolution windows are padded as TensorFlow's "SAME".
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_FRAMES = 9
SIZE_PX = 224
# Widths of a Mixed block: 1x1; 1x1 then 3x3; 1x1 then 3x3; 1x1 after the pooling.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


class InceptionI3d(nn.Module):
    """Clips to class logits. Build it in eval mode: its batch norms are meant to use their running statistics."""

    def __init__(self, num_classes: int = 400) -> None:
        super().__init__()
        self.logits = _Unit(1024, num_classes, 1, is_logits=True)
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        for name, (channels, widths) in MIXED.items():
            self.add_module(name, _Mixed(channels, widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, 224, 224) in [-1, 1] -> logits (B, num_classes), averaged over time.

        Raises:
            ValueError: fewer than 9 frames, or another size.
        """
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] < MIN_FRAMES or x.shape[3:] != (SIZE_PX, SIZE_PX):
            raise ValueError(
                f"I3D needs clips (B, 3, T, {SIZE_PX}, {SIZE_PX}) of at least {MIN_FRAMES} frames, got {tuple(x.shape)}"
            )
        x = self.Conv3d_1a_7x7(x)  # (B, 64, ceil(T / 2), 112, 112)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 64, ceil(T / 2), 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))  # (B, 192, ceil(T / 2), 56, 56)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 192, ceil(T / 2), 28, 28)
        x = self.Mixed_3c(self.Mixed_3b(x))  # (B, 480, ceil(T / 2), 28, 28)
        x = _max_pool(x, (3, 3, 3), (2, 2, 2))  # (B, 480, ceil(T / 4), 14, 14)
        x = self.Mixed_4f(
            self.Mixed_4e(self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x))))
        )  # (B, 832, ceil(T / 4), 14, 14)
        x = _max_pool(x, (2, 2, 2), (2, 2, 2))  # (B, 832, ceil(T / 8), 7, 7)
        x = self.Mixed_5c(self.Mixed_5b(x))  # (B, 1024, ceil(T / 8), 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (B, 1024, ceil(T / 8) - 1, 1, 1)
        return self.logits(x).mean(dim=(2, 3, 4))  # (B, num_classes)


class _Unit(nn.Module):
    """Convolution, batch norm, ReLU; the last layer is a convolution with bias alone."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, is_logits: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride, self.is_logits = (kernel,) * 3, (stride,) * 3, is_logits
        self.conv3d = nn.Conv3d(channels, out_channels, kernel, stride, bias=is_logits)
        if not is_logits:
            self.bn = nn.BatchNorm3d(out_channels)  # with PyTorch's epsilon 1e-5, as VideoGPT's, not TensorFlow's 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_pad_same(x, self.kernel, self.stride))
        return x if self.is_logits else F.relu(self.bn(x))


class _Mixed(nn.Module):
    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.b0 = _Unit(channels, widths[0], 1)
        self.b1a, self.b1b = _Unit(channels, widths[1], 1), _Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = _Unit(channels, widths[3], 1), _Unit(widths[3], widths[4], 3)
        self.b3b = _Unit(channels, widths[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_pad_same(x, kernel, stride), kernel, stride)  # padding by 0 is none: x >= 0 after ReLU


def _pad_same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Zeros around T, H, W so that a window gives ceil(size / stride) outputs; the odd one goes behind."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
