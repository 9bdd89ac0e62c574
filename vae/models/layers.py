"""The layers that the video autoencoders are made of, with the names that their released weights have.

Tensors are (B, C, T, H, W); per-frame layers take (B, C, H, W) too. Layers that mix frames see the past only, and take
a `Stream` when a video comes in chunks; the others accept it, so that any of them can stand in a `Chain`.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models import winograd
from vae.models.fused import Norm, compute_dtype, norm_silu_pad, remaking
from vae.models.streaming import Stream

NORM_EPS = 1e-6
NORM_GROUPS = 32


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images (B, C, H, W), applied to each frame of a video (B, C, T, H, W); images pass as they are."""
    if x.ndim == 4:
        return function(x)
    frames = x.transpose(1, 2).flatten(0, 1)  # (B*T, C, H, W)
    return function(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)  # (B, C', T, H', W')


def channels_last(x: Tensor) -> Tensor:
    """x with its channels innermost in memory, as all layers here prefer it."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


class Chain(nn.Sequential):
    """Layers one after another; those that need the stream get it."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        for layer in self:
            x = layer(x, stream)
        return x


class Conv2d(nn.Conv2d):
    """A 2-D convolution of each frame."""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return per_frame(super().forward, channels_last(x))


class CausalConv3d(nn.Module):
    """A 3-D convolution whose output frame i sees input frames up to i * stride.

    Args:
        kernel_size, stride, padding: (time, height, width) or one number for all; the padding in time is ignored:
            frame 0 is repeated kernel - 1 times before itself instead.
    """

    def __init__(
        self,
        chan_in: int,
        chan_out: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernel_size, stride, padding = _triple(kernel_size), _triple(stride), _triple(padding)
        self.num_front = kernel_size[0] - 1
        self.conv = nn.Conv3d(chan_in, chan_out, kernel_size, stride, (0, *padding[1:]), bias=bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H', W'), T' = (T - 1) // stride + 1 for a whole video."""
        x = channels_last(x)
        if self.conv.kernel_size == self.conv.stride == (1, 1, 1):
            weight = self.conv.weight.flatten(1)  # (C', C)
            return F.linear(x.movedim(1, -1), weight, self.conv.bias).movedim(-1, 1)
        if stream is not None:
            return self._continue(x, stream)
        if x.shape[2] == 1:
            return self.convolve_repeated(x)
        x = x.to(compute_dtype(x))
        prepared = repeat_front(x, self.num_front)
        with remaking(prepared, repeat_front, x, self.num_front):
            del x
            return self.convolve(prepared, repeated=True)

    def _continue(self, x: Tensor, stream: Stream) -> Tensor:
        x = repeat_front(x, self.num_front) if stream.first else stream.rejoin(self, x)
        (kernel, *_), (stride, *_) = self.conv.kernel_size, self.conv.stride
        num_out = max(0, (x.shape[2] - kernel) // stride + 1)
        stream.leave(self, x[:, :, num_out * stride :])
        if num_out:
            return self.convolve(x, repeated=stream.first)
        return x.new_empty((x.shape[0], self.conv.out_channels, 0, *self._out_size(x)))

    def _out_size(self, x: Tensor) -> list[int]:
        conv = self.conv
        sizes = zip(x.shape[3:], conv.kernel_size[1:], conv.stride[1:], conv.padding[1:], strict=True)
        return [(size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes]

    def convolve(self, x: Tensor, repeated: bool) -> Tensor:
        """The convolution of frames that have been padded in time; `repeated`: with the first of them."""
        conv = self.conv
        fits = conv.stride == (1, 1, 1) and conv.padding == (0, 1, 1) and conv.bias is not None
        if fits and winograd.saves(x, conv.weight):
            return winograd.convolve(x, conv.weight, conv.bias, repeated)
        if x.device.type == "cpu" and x.numel() < conv.weight.numel():
            x = x.contiguous()  # the other layout would be imposed on the weight, which is larger
        return conv(x)

    def convolve_repeated(self, x: Tensor) -> Tensor:
        """The result for (B, C, 1, H, W), a frame which repeats itself in time: a 2-D convolution is enough."""
        conv = self.conv
        convolve = partial(F.conv2d, stride=conv.stride[1:], padding=conv.padding[1:])
        return per_frame(lambda frames: convolve(frames, conv.weight.sum(2), conv.bias), x)


def _triple(value: int | tuple[int, int, int] | list[int]) -> tuple[int, int, int]:
    return (value, value, value) if isinstance(value, int) else tuple(value)


def repeat_front(x: Tensor, num_frames: int) -> Tensor:
    """x behind its own first frame, `num_frames` times: (B, C, num_frames + T, H, W)."""
    return torch.cat([x[:, :, :1].expand(-1, -1, num_frames, -1, -1), x], dim=2) if num_frames else x


class GroupNorm(nn.GroupNorm):
    """Over groups of channels and all positions and frames of a sample: a later frame changes earlier ones."""

    def __init__(self, channels: int) -> None:
        if channels % NORM_GROUPS:
            raise ValueError(
                f"groupnorm makes {NORM_GROUPS} groups, but a layer has {channels} channels: choose widths that are"
                f' multiples of {NORM_GROUPS}, or norm_type "layernorm"'
            )
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return super().forward(x)

    @property
    def fused(self) -> tuple[Tensor, Tensor, Norm]:
        return self.weight, self.bias, Norm(self.num_groups, self.eps)


class LayerNorm(nn.Module):
    """Over the channels at each position: frames stay apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return self.norm(channels_last(x).movedim(1, -1)).movedim(-1, 1)

    @property
    def fused(self) -> tuple[Tensor, Tensor, Norm]:
        return self.norm.weight, self.norm.bias, Norm(0, self.norm.eps)


NORMS = {"groupnorm": GroupNorm, "layernorm": LayerNorm}


def normalize(channels: int, norm_type: str = "groupnorm") -> GroupNorm | LayerNorm:
    """The norm of a name; ValueError for another name, or for channels which do not divide into groups."""
    if norm_type not in NORMS:
        raise ValueError(f"norm_type is {norm_type!r}; choose one of {', '.join(NORMS)}")
    return NORMS[norm_type](channels)


def norm_silu_conv(
    x: Tensor,
    norm: GroupNorm | LayerNorm,
    conv: nn.Conv2d | CausalConv3d,
    stream: Stream | None = None,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """conv(dropout(SiLU(norm(x)))) of stride 1, for whose backward only x is kept.

    Args:
        x: (B, C, T, H, W) or, where `conv` is 2-D, (B, C, H, W).
    """
    if dropout is not None and dropout.training and dropout.p:
        return conv(dropout(F.silu(norm(x))), *(() if isinstance(conv, Conv2d) else (stream,)))
    images = x.ndim == 4
    x = x.unsqueeze(2) if images else x
    num_front = conv.num_front if isinstance(conv, CausalConv3d) else 0
    past = stream.past(conv, x, num_front) if stream is not None and num_front else None
    past_is_front = past is None
    repeated = num_front and past is None and x.shape[2] == 1
    inputs = (x, past, *norm.fused, 0 if repeated else num_front, compute_dtype(x))
    del x, past
    prepared = norm_silu_pad(*inputs)
    with remaking(prepared, norm_silu_pad, *inputs):
        del inputs  # in inference, x may go before the convolution's result comes
        if not isinstance(conv, CausalConv3d):
            out = per_frame(lambda frames: F.conv2d(frames, conv.weight, conv.bias, padding=conv.padding), prepared)
        else:
            out = conv.convolve_repeated(prepared) if repeated else conv.convolve(prepared, past_is_front)
    return out.squeeze(2) if images else out


def add(out: Tensor, shortcut: Tensor) -> Tensor:
    """out + shortcut; into `out`, which must be of no other use, where no gradients are recorded."""
    if torch.is_grad_enabled() or out.dtype != shortcut.dtype:
        return out + shortcut
    return out.add_(shortcut)


class _ResnetBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, dropout, conv; plus the input, through a convolution where widths differ."""

    conv_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        norm_type: str = "groupnorm",
        conv_shortcut: bool = False,
    ) -> None:
        super().__init__()
        conv = self.conv_class
        self.norm1 = normalize(in_channels, norm_type)
        self.conv1 = conv(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = normalize(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = conv(in_channels, out_channels, kernel_size=3, padding=1)
        elif in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = channels_last(x)
        out = norm_silu_conv(
            norm_silu_conv(x, self.norm1, self.conv1, stream), self.norm2, self.conv2, stream, self.dropout
        )
        for name in ("nin_shortcut", "conv_shortcut"):
            if hasattr(self, name):
                x = getattr(self, name)(x, stream)
        return add(out, x)


class ResnetBlock2D(_ResnetBlock):
    """A residual block of each frame: (B, C, [T,] H, W) -> (B, C', [T,] H, W)."""

    conv_class = Conv2d

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        return per_frame(super().forward, channels_last(x))


class ResnetBlock3D(_ResnetBlock):
    """A causal residual block: (B, C, T, H, W) -> (B, C', T, H, W)."""

    conv_class = CausalConv3d


class _AttnBlock(nn.Module):
    """Single-head self-attention among the positions of a frame, plus the input."""

    conv_class: ClassVar[type[nn.Module]]

    def __init__(self, in_channels: int, norm_type: str = "groupnorm") -> None:
        super().__init__()
        conv = self.conv_class
        self.norm = normalize(in_channels, norm_type)
        self.q = conv(in_channels, in_channels, kernel_size=1)
        self.k = conv(in_channels, in_channels, kernel_size=1)
        self.v = conv(in_channels, in_channels, kernel_size=1)
        self.proj_out = conv(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = channels_last(x)
        normed = self.norm(x)
        q, k, v = (self.tokens(project(normed)) for project in (self.q, self.k, self.v))  # (frames, H*W, C) each
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return add(self.proj_out(self.untokens(attended, x)), x)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, [T,] H, W) -> (B*T, H*W, C)."""
        return x.movedim(1, -1).flatten(-3, -2).flatten(0, -3)

    def untokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of `tokens`, for the shape of `like`."""
        return tokens.reshape(like.movedim(1, -1).shape).movedim(-1, 1)


class AttnBlock2D(_AttnBlock):
    """For images (B, C, H, W)."""

    conv_class = Conv2d


class AttnBlock3DFix(_AttnBlock):
    """For the frames of a video (B, C, T, H, W)."""

    conv_class = CausalConv3d


class AttnBlock3D(AttnBlock3DFix):
    """The older block, which released weights rely on.

    It cuts the memory of (C, T, H, W) into T slabs of C * H * W and takes each for a frame (C, H, W), so for T > 1 it
    mixes channels and frames, future ones too. For T = 1 it equals `AttnBlock3DFix`.
    """

    def tokens(self, x: Tensor) -> Tensor:
        num_samples, channels, num_frames, height, width = x.shape
        slabs = x.contiguous().view(num_samples * num_frames, channels, height * width)
        return slabs.transpose(1, 2)  # (B*T, H*W, C)

    def untokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        return channels_last(tokens.transpose(1, 2).contiguous().view(like.shape))
