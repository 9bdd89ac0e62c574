"""Norm, SiLU and padding before a convolution, without their intermediate results.

Activations are laid out with the channels innermost (`torch.channels_last_3d`): then a norm over channels reads whole
rows, a frame is one block of memory, and folding time into the batch is free.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

# Rows are normed and activated piece by piece, so that a piece is still in the cache for its next operation.
PIECE_ELEMENTS = {"cpu": 1 << 18}
PIECE_ELEMENTS_ELSEWHERE = 1 << 26  # of a GPU: few launches, little scratch memory


class _View(NamedTuple):
    """How a saved tensor looks at the memory of one that is made again."""

    shape: torch.Size
    stride: tuple[int, ...]


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes: autocast's choice, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def channels_innermost(x: Tensor) -> Tensor:
    """(B, C, T, H, W) as (B, T, H, W, C), contiguous; no copy if x is laid out so already."""
    return x.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1)


def remaking(prepared: Tensor, prepare: Callable[..., Tensor], *inputs: Any) -> AbstractContextManager[Any]:
    """Within this context, operations that save `prepared` for backward do not: it is made again from `inputs`.

    That holds for views of all of it too, such as its frames side by side (B*T, C, H, W).

    Args:
        prepared: `prepare(*inputs)`, cheap beside the convolution that follows.
    """
    if not (torch.is_grad_enabled() and prepared.requires_grad):
        return nullcontext()
    kept = [each.detach() if isinstance(each, Tensor) else each for each in inputs]
    same = (prepared.data_ptr(), prepared.numel(), prepared.dtype)

    def pack(saved: Tensor) -> Any:
        is_same = (saved.data_ptr(), saved.numel(), saved.dtype) == same
        return _View(saved.shape, saved.stride()) if is_same else saved

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        with torch.no_grad():
            remade = prepare(*kept)
            return remade.as_strided(packed.shape, packed.stride, remade.storage_offset())

    return saved_tensors_hooks(pack, unpack)


class Norm(NamedTuple):
    """What kind of norm: over all channels of a position, or (groups > 0) over groups of channels of a sample."""

    groups: int
    eps: float


def norm_silu_pad(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, norm: Norm, num_front: int, dtype: torch.dtype
) -> Tensor:
    """SiLU(norm(x)) behind `num_front` more frames: those of `past` treated alike, or its own first frame repeated.

    Args:
        x: (B, C, T, H, W). past: (B, C, num_front, H, W) or None.
        weight, bias: (C,) of the norm, whose statistics are at least float32.
        dtype: of the result (B, C, num_front + T, H, W).
    """
    return _NormSiluPad.apply(x, past, weight, bias, norm, num_front, dtype)


class _NormSiluPad(torch.autograd.Function):
    """Keeps only its inputs for backward, which norms again, piece by piece."""

    @staticmethod
    def forward(ctx, x, past, weight, bias, norm, num_front, dtype):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, past, weight, bias)
        ctx.norm, ctx.num_front = norm, num_front
        frames = channels_innermost(x)  # (B, T, H, W, C)
        num_samples, num_frames, *position = frames.shape
        out = frames.new_empty((num_samples, num_front + num_frames, *position), dtype=dtype)
        one = not (norm.groups or num_front)  # all samples may be treated as one
        for sample, result in zip(_joined(frames, one), _joined(out, one)[:, num_front:], strict=True):
            _norm_silu(sample, result, weight, bias, norm)
        if past is None:
            out[:, :num_front] = out[:, num_front : num_front + 1]
        else:
            for sample, result in zip(channels_innermost(past), out, strict=True):
                _norm_silu(sample, result[:num_front], weight, bias, norm)
        return out.permute(0, 4, 1, 2, 3)  # (B, C, num_front + T, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, past, weight, bias = ctx.saved_tensors
        grads = channels_innermost(grad)  # (B, num_front + T, H, W, C)
        front, own = grads[:, : ctx.num_front], grads[:, ctx.num_front :]
        dtype = _statistics_dtype(x)
        dweight, dbias = weight.new_zeros(weight.shape, dtype=dtype), bias.new_zeros(bias.shape, dtype=dtype)
        arguments = (weight, bias, ctx.norm, dweight, dbias)
        frames = channels_innermost(x)
        dx, dpast = torch.empty_like(frames), None
        one = not (ctx.norm.groups or ctx.num_front)
        own = _joined(own, one)
        if past is None and ctx.num_front:  # frame 0 stands num_front more times before itself
            first = torch.cat([front, own[:, :1]], dim=1).sum(1, keepdim=True, dtype=dtype)
        else:
            first = own[:, :1]
        for index, (sample, dsample) in enumerate(zip(_joined(frames, one), _joined(dx, one), strict=True)):
            _norm_silu_backward(sample, (first[index], own[index, 1:]), dsample, *arguments)
        if past is not None:
            before = channels_innermost(past)
            dpast = torch.empty_like(before)
            for index, sample in enumerate(before):
                _norm_silu_backward(sample, (front[index, :1], front[index, 1:]), dpast[index], *arguments)
            dpast = dpast.permute(0, 4, 1, 2, 3)
        return dx.permute(0, 4, 1, 2, 3), dpast, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


def _joined(frames: Tensor, one: bool) -> Tensor:
    """(B, T, H, W, C); as (1, B*T, H, W, C) if `one`."""
    return frames.flatten(0, 1)[None] if one else frames


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pieces(*arrays: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows (positions) of several (T, H, W, C), some at a time: tuples of (rows, C)."""
    rows = [each.flatten(0, 2) for each in arrays]
    device = arrays[0].device.type
    num_rows = max(1, PIECE_ELEMENTS.get(device, PIECE_ELEMENTS_ELSEWHERE) // arrays[0].shape[-1])
    return zip(*(each.split(num_rows) for each in rows), strict=True)


def _norm_silu(sample: Tensor, out: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> None:
    """(T, H, W, C) -> out of the same shape; the channels of `out` are innermost too."""
    dtype = _statistics_dtype(sample)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if norm.groups:
        mean, rstd = _group_statistics(sample, norm)
        scale = weight * rstd
        shift = bias - mean * scale
    for rows, result in _pieces(sample, out):
        rows = rows.to(dtype)
        if norm.groups:
            normed = torch.addcmul(shift, rows, scale)
        else:
            normed = torch.native_layer_norm(rows, weight.shape, weight, bias, norm.eps)[0]
        result.copy_(F.silu(normed, inplace=True))


def _group_statistics(sample: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of a sample (T, H, W, C), per group but written for each channel: (C,), (C,)."""
    num_channels = sample.shape[-1]
    grouped = sample.reshape(-1, norm.groups, num_channels // norm.groups).to(_statistics_dtype(sample))
    var, mean = torch.var_mean(grouped, dim=(0, 2), correction=0)  # (groups,)
    rstd = torch.rsqrt(var + norm.eps)
    repeats = num_channels // norm.groups
    return mean.repeat_interleave(repeats), rstd.repeat_interleave(repeats)


def _norm_silu_backward(
    sample: Tensor,
    grads: tuple[Tensor, Tensor],
    dsample: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Fills dsample (T, H, W, C), adds to dweight and dbias; `grads` are those of frame 0 and of the others."""
    dtype = _statistics_dtype(sample)
    weight, bias = weight.to(dtype), bias.to(dtype)
    backward = _group_norm_backward if norm.groups else _layer_norm_backward
    parts = [(sample[:1], grads[0], dsample[:1]), (sample[1:], grads[1], dsample[1:])]
    backward([part for part in parts if part[0].numel()], sample, weight, bias, norm, dweight, dbias)


def _layer_norm_backward(
    parts: list[tuple[Tensor, ...]],
    sample: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    shape, dtype = weight.shape, weight.dtype
    for rows, grad, drows in (piece for part in parts for piece in _pieces(*part)):
        rows = rows.to(dtype)
        normed, mean, rstd = torch.native_layer_norm(rows, shape, weight, bias, norm.eps)
        grad = torch.ops.aten.silu_backward(grad.to(dtype), normed)
        result = torch.ops.aten.native_layer_norm_backward(grad, rows, shape, mean, rstd, weight, bias, [True] * 3)
        drows.copy_(result[0])
        dweight += result[1]
        dbias += result[2]


def _group_norm_backward(
    parts: list[tuple[Tensor, ...]],
    sample: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """dx = r (g w - mean(g w) - n mean(g w n)) of n = (x - m) r, g that of n w + b; means over a group."""
    dtype = weight.dtype
    mean, rstd = _group_statistics(sample, norm)
    scale = weight * rstd
    shift = bias - mean * scale
    total, correlation = torch.zeros_like(mean), torch.zeros_like(mean)  # over positions: of g, of g (x - m) r
    pieces = [piece for part in parts for piece in _pieces(*part)]
    for rows, grad, _ in pieces:
        rows = rows.to(dtype)
        grad = torch.ops.aten.silu_backward(grad.to(dtype), torch.addcmul(shift, rows, scale))
        total += grad.sum(0)
        correlation += ((rows - mean) * rstd).mul_(grad).sum(0)
    dweight += correlation
    dbias += total

    def group_mean(per_channel: Tensor) -> Tensor:
        groups = per_channel.unflatten(0, (norm.groups, -1)).sum(1) / (sample.numel() // norm.groups)
        return groups.repeat_interleave(weight.numel() // norm.groups)

    offset, slope = group_mean(total * weight) * rstd, group_mean(correlation * weight) * rstd
    for rows, grad, drows in pieces:
        rows = rows.to(dtype)
        grad = torch.ops.aten.silu_backward(grad.to(dtype), torch.addcmul(shift, rows, scale))
        drows.copy_(grad.mul_(scale).sub_(offset).sub_(((rows - mean) * rstd).mul_(slope)))
