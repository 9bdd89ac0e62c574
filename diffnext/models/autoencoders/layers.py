"""Layers of the video autoencoders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Inputs of convolutions are cut in time above this size: cuDNN counts elements with 32 bits.
MAX_CONV_ELEMENTS = 2**30


class CausalConv3d(nn.Conv3d):
    """Convolution of (B, C, T, H, W), with zeros around frames and copies of the first frame before it.

    Args:
        causal: otherwise half as many copies of the first frame, and as many of the last frame after it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int = 1,
        padding_px: int | None = None,
        causal: bool = True,
    ) -> None:
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        padding_px = kernel[-1] // 2 if padding_px is None else padding_px
        super().__init__(in_channels, out_channels, kernel, stride, padding=(0, padding_px, padding_px))
        num_copies = kernel[0] - 1
        self.frames_after = 0 if causal else num_copies // 2
        self.frames_before = num_copies - self.frames_after

    def forward(self, x: Tensor) -> Tensor:
        if self.frames_before:
            first, last = x[:, :, :1], x[:, :, -1:]
            x = torch.cat([first] * self.frames_before + [x] + [last] * self.frames_after, dim=2)
        if x.numel() <= MAX_CONV_ELEMENTS or self.stride[0] != 1:
            return super().forward(x)
        overlap = self.kernel_size[0] - 1
        frames = max(1, x.shape[2] * MAX_CONV_ELEMENTS // x.numel() - overlap)
        parts = [x[:, :, start : start + frames + overlap] for start in range(0, x.shape[2] - overlap, frames)]
        return torch.cat([super(CausalConv3d, self).forward(part) for part in parts], dim=2)


def group_norm(channels: int) -> nn.GroupNorm:
    """Over 32 groups; in clips (B, C, T, H, W), the statistics are those of all frames."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def fold_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(x: Tensor, num_frames: int) -> Tensor:
    """(B T, C, H, W) -> (B, C, T, H, W)."""
    return x.unflatten(0, (-1, num_frames)).transpose(1, 2)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with a shortcut.

    Args:
        conv: nn.Conv2d for images (B, C, H, W), or CausalConv3d for clips (B, C, T, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, conv: type[nn.Conv2d] | type[CausalConv3d]) -> None:
        super().__init__()
        pad = {"padding": 1} if conv is nn.Conv2d else {}
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, **pad)
        self.norm2 = group_norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, **pad)
        self.conv_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return self.conv_shortcut(x) + residual


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame of (B, C, T, H, W), plus its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        num_frames, height, width = x.shape[2:]
        tokens = fold_frames(self.group_norm(x)).flatten(2).transpose(1, 2)  # (B T, H W, C)
        q, k, v = (project(tokens).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))  # (B T, 1, H W, C)
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))  # (B T, H W, C)
        return x + unfold_frames(tokens.transpose(1, 2).unflatten(2, (height, width)), num_frames)
