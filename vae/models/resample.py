"""Changes of resolution in space and time, under the names that released configurations use.

Where T changes, frame 0 stays alone: T -> (T - 1) // 2 + 1 downwards, 2 T - 1 upwards.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.fused import compute_dtype, remaking
from vae.models.layers import CausalConv3d, channels_last, per_frame, repeat_front
from vae.models.streaming import Stream

T_INTERPOLATIONS = ("nearest", "trilinear")


def pad_right_bottom(x: Tensor) -> Tensor:
    """One more column and row of zeros."""
    return F.pad(x, (0, 1, 0, 1))


def pad_front_right_bottom(x: Tensor, num_frames: int) -> Tensor:
    """`num_frames` more of frame 0 before it, and one more column and row of zeros."""
    return pad_right_bottom(repeat_front(x, num_frames))


def bilinear_2x(x: Tensor) -> Tensor:
    """Each frame twice as high and wide: (..., H, W) -> (..., 2H, 2W), half-pixel centres."""
    return per_frame(partial(F.interpolate, scale_factor=2, mode="bilinear", align_corners=False), x)


class Downsample(nn.Module):
    """H, W / 2, per frame: (B, C, [T,] H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = channels_last(x).to(compute_dtype(x))
        padded = pad_right_bottom(x)
        with remaking(padded, pad_right_bottom, x):
            return per_frame(self.conv, padded)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of x enlarged twice by nearest neighbours, without enlarging x: (B, C, [T,] H, W).

    Enlarging is the transposed convolution with 2x2 ones; joined with a 3x3 kernel it is one with a 4x4 kernel.
    """
    flipped = weight.flip(2, 3)  # (C', C, 3, 3)
    kernel = F.pad(flipped, (0, 1, 0, 1)) + F.pad(flipped, (1, 0, 0, 1))
    kernel = kernel + F.pad(flipped, (0, 1, 1, 0)) + F.pad(flipped, (1, 0, 1, 0))  # (C', C, 4, 4)
    return per_frame(lambda frames: F.conv_transpose2d(frames, kernel.transpose(0, 1), bias, stride=2, padding=1), x)


class Upsample(nn.Module):
    """H, W * 2, per frame: (B, C, [T,] H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return upsample_conv(channels_last(x), self.conv.weight, self.conv.bias)


class SpatialDownsample2x(nn.Module):
    """H, W / 2 of a video."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(chan_in, chan_out, kernel_size=(1, 3, 3), stride=(1, 2, 2))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _strided(channels_last(x), self.conv, stream)


class SpatialUpsample2x(nn.Module):
    """H, W * 2 of a video."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(chan_in, chan_out, kernel_size=(1, 3, 3), padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return upsample_conv(channels_last(x), self.conv.conv.weight[:, :, 0], self.conv.conv.bias)


def _strided(x: Tensor, conv: CausalConv3d, stream: Stream | None) -> Tensor:
    """A causal convolution that starts at the upper left pixel and meets zeros beyond the right and bottom edges."""
    if stream is not None:
        return conv(pad_right_bottom(x), stream)
    if x.shape[2] == 1:
        return conv.convolve_repeated(pad_right_bottom(x))
    x = x.to(compute_dtype(x))
    padded = pad_front_right_bottom(x, conv.num_front)
    with remaking(padded, pad_front_right_bottom, x, conv.num_front):
        return conv.convolve(padded, repeated=True)


class Spatial2xTime2x3DDownsample(nn.Module):
    """T, H, W / 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _strided(channels_last(x), self.conv, stream)


class Spatial2x3DDownsample(nn.Module):
    """H, W / 2, by a convolution that looks back in time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size=3, stride=(1, 2, 2))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return _strided(channels_last(x), self.conv, stream)


class TimeDownsample2x(nn.Module):
    """T / 2: means of three frames."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return mean_of_three(_with_past(x, self, stream))


def _with_past(x: Tensor, module: nn.Module, stream: Stream | None) -> Tensor:
    """x behind what a window of 3 frames with stride 2 still needs of the past."""
    if stream is None:
        return repeat_front(x, 2)
    x = repeat_front(x, 2) if stream.first else stream.rejoin(module, x)
    num_out = max(0, (x.shape[2] - 1) // 2)
    stream.leave(module, x[:, :, 2 * num_out :])
    return x[:, :, : 2 * num_out + 1] if num_out else x[:, :, :0]


def mean_of_three(x: Tensor) -> Tensor:
    """(B, C, 2 n + 1, H, W) -> (B, C, n, H, W)."""
    return (x[:, :, :-2:2] + x[:, :, 1:-1:2] + x[:, :, 2::2]) / 3


class TimeDownsampleRes2x(nn.Module):
    """T / 2: a learnt mixture of means and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=(2, 1, 1), padding=(0, 1, 1))
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = _with_past(channels_last(x), self, stream)
        if not x.shape[2]:
            return x.new_empty((x.shape[0], self.conv.out_channels, *x.shape[2:]))
        mix = torch.sigmoid(self.mix_factor)
        return mix * mean_of_three(x) + (1 - mix) * self.conv(x)


class TimeUpsample2x(nn.Module):
    """T * 2 - 1, linearly."""

    def __init__(self, chan_in: int, chan_out: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return linear_2x(x, self, stream)


class TimeUpsampleRes2x(nn.Module):
    """T * 2 - 1: a learnt mixture of linear interpolation and a convolution of it."""

    def __init__(self, in_channels: int, out_channels: int, mix_factor: float = 2.0) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.mix_factor = nn.Parameter(torch.tensor([mix_factor]))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = linear_2x(channels_last(x), self, stream)
        mix = torch.sigmoid(self.mix_factor)
        return mix * x + (1 - mix) * self.conv(x, stream)


def linear_2x(x: Tensor, module: nn.Module, stream: Stream | None = None) -> Tensor:
    """Frame 0, then linear interpolation among the other frames a: (B, C, T, H, W) -> (B, C, 2 T - 1, H, W).

    With half-pixel centres and clamped ends the frames are a[0], then 3/4 a[i] + 1/4 a[i+1] and 1/4 a[i] + 3/4 a[i+1]
    for each pair of neighbours, then a[-1]. In a stream, the last frame waits for its right neighbour, so one frame
    comes later than it would otherwise.
    """
    x = x.movedim(1, -1)  # (B, T, H, W, C)
    first, last = (True, True) if stream is None else (stream.first, stream.last)
    parts = []
    if first:
        parts, x = [x[:, :1]], x[:, 1:]
    left = None if stream is None else stream.states.pop(module, None)
    if left is None:
        parts.append(x[:, :1])
    else:
        x = torch.cat([left, x], dim=1)
    here, following = x[:, :-1], x[:, 1:]
    pairs = torch.stack([torch.lerp(here, following, 0.25), torch.lerp(here, following, 0.75)], dim=2)
    parts.append(pairs.flatten(1, 2))
    if last:
        parts.append(x[:, -1:])
    elif x.shape[1]:
        stream.states[module] = x[:, -1:].clone()
    return torch.cat(parts, dim=1).movedim(-1, 1)


def nearest_2x(x: Tensor, stream: Stream | None = None) -> Tensor:
    """Frame 0, then each other frame twice: (B, C, T, H, W) -> (B, C, 2 T - 1, H, W)."""
    repeated = x.repeat_interleave(2, dim=2)
    return repeated[:, :, 1:] if stream is None or stream.first else repeated


def bilinear_conv(x: Tensor, conv: CausalConv3d, stream: Stream | None) -> Tensor:
    """conv (stride 1) of the frames enlarged twice; the past is kept at the size that x has."""
    x = channels_last(x).to(compute_dtype(x))
    past = stream.past(conv, x, conv.num_front) if stream is not None else None
    repeated = past is None and x.shape[2] == 1
    if past is not None:
        x = torch.cat([past, x], dim=2)
    elif not repeated:
        x = repeat_front(x, conv.num_front)
    enlarged = bilinear_2x(x)
    with remaking(enlarged, bilinear_2x, x):
        return conv.convolve_repeated(enlarged) if repeated else conv.convolve(enlarged, past is None)


class Spatial2x3DUpsample(nn.Module):
    """H, W * 2, by a convolution that looks back in time."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return bilinear_conv(x, self.conv, stream)


class Spatial2xTime2x3DUpsample(nn.Module):
    """H, W * 2 and T * 2 - 1; `t_interpolation` in time is "nearest" or "trilinear"."""

    def __init__(self, in_channels: int, out_channels: int, t_interpolation: str = "trilinear") -> None:
        super().__init__()
        if t_interpolation not in T_INTERPOLATIONS:
            raise ValueError(f"t_interpolation is {t_interpolation!r}; choose one of {', '.join(T_INTERPOLATIONS)}")
        self.linear = t_interpolation == "trilinear"
        self.conv = CausalConv3d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = channels_last(x)
        x = linear_2x(x, self, stream) if self.linear else nearest_2x(x, stream)
        return bilinear_conv(x, self.conv, stream)
