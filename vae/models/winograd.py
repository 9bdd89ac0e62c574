"""3x3x3 convolutions over time with about half the multiplications: Winograd's method along the time axis, for CPUs.

m output frames are linear combinations of m + 2 products of frames and kernels, where the definition takes 3 m
(Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308). A product here is a 2-D
convolution of a combination of m + 2 input frames with a combination of the kernel's three. The rounding error is about
twice that of the definition. On GPUs, half-precision matrix units are faster than any such saving.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae.models.fused import channels_innermost

# Points of evaluation beside infinity. These halve the rounding error of the usual 0, 1, -1, 2, -2.
POINTS = {2: (0, 1, -1), 4: (0, 0.75, -0.75, 1.5, -1.5)}
MIN_CHANNELS = 4096  # input times output channels, from which products outweigh combinations
MIN_POSITIONS = 4096  # from which they outweigh the combinations of kernels
BLOCK_POSITIONS = 4096  # to convolve at once


class Transforms(NamedTuple):
    """Output frames = outputs @ products, of frames @ m + 2 input frames with kernels @ 3 kernels in time."""

    outputs: Tensor  # (m, products)
    kernels: Tensor  # (products, 3)
    frames: Tensor  # (products, m + 2)


@cache
def transforms(num_outputs: int, repeated: bool, dtype: torch.dtype) -> Transforms:
    """For that many output frames; `repeated`: for one, whose three input frames are the same."""
    if num_outputs == 1:
        matrices = ([[1]], [[1, 1, 1]], [[0, 0, 1]]) if repeated else ([[1, 1, 1]], np.eye(3), np.eye(3))
    else:
        points = np.asarray(POINTS[num_outputs])

        def powers(number: int) -> np.ndarray:
            """Values at the points of the monomials up to degree number - 1; at infinity, the leading coefficient."""
            return np.vstack([np.vander(points, number, increasing=True), np.eye(number)[-1]])

        # Toom-Cook: polynomials multiplied by their values at points. A correlation is the transpose of that product.
        matrices = powers(num_outputs).T, powers(3), np.linalg.inv(powers(num_outputs + 2)).T
    return Transforms(*(torch.as_tensor(np.asarray(each), dtype=dtype, device="cpu") for each in matrices))


class Run(NamedTuple):
    """Output frames start, ..., start + num_outputs - 1 of a sample."""

    sample: int
    start: int
    num_outputs: int


def runs(num_samples: int, num_frames: int, block: int) -> Iterator[list[Run]]:
    """All output frames, in lists of at most `block` runs of one length: 1 and 2 for the remainder first, then 4."""
    start = 0
    for num_outputs, number in ((1, num_frames % 2), (2, num_frames // 2 % 2), (4, num_frames // 4)):
        places = [
            Run(sample, start + index * num_outputs, num_outputs)
            for sample in range(num_samples)
            for index in range(number)
        ]
        yield from (places[first : first + block] for first in range(0, len(places), block))
        start += num_outputs * number


def saves(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` is the faster way for padded frames (B, C, T + 2, H, W)."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and weight.shape[2:] == (3, 3, 3)
        and weight.shape[0] * weight.shape[1] >= MIN_CHANNELS
        and x.shape[0] * (x.shape[2] - 2) * x.shape[3] * x.shape[4] >= MIN_POSITIONS
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor, repeated: bool) -> Tensor:
    """`F.conv3d(x, weight, bias, padding=(0, 1, 1))`.

    Args:
        x: (B, C, T + 2, H, W).
        weight: (C', C, 3, 3, 3). bias: (C',).
        repeated: frames 0, 1 and 2 are the same.

    Returns:
        (B, C', T, H, W).
    """
    return _Winograd.apply(x, weight, bias, repeated)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, repeated):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, weight)
        ctx.repeated = repeated
        frames = channels_innermost(x)  # (B, T + 2, H, W, C)
        num_samples, num_padded, height, width, _ = frames.shape
        out = x.new_empty((num_samples, num_padded - 2, height, width, len(weight)))
        flat, offset = out.flatten(2), bias.repeat(height * width)  # (B, T, H*W*C'), (H*W*C',)
        for block in _blocks(frames):
            matrices = _matrices(block, repeated, x.dtype)
            combined = _combine(frames, block, matrices.frames)  # (products, runs, C, H, W)
            products = flat.new_empty((len(combined), len(block), flat.shape[2]))
            for product, images, factors in zip(products, combined, matrices.kernels, strict=True):
                product.copy_(_rows(F.conv2d(images, _kernel(weight, factors), padding=1)))
            for index, run in enumerate(block):
                target = flat[run.sample, run.start : run.start + run.num_outputs]
                torch.addmm(offset, matrices.outputs, products[:, index], out=target)
        return out.permute(0, 4, 1, 2, 3)  # (B, C', T, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        frames, grads = channels_innermost(x), channels_innermost(grad)  # (B, T + 2, H, W, C), (B, T, H, W, C')
        dx = torch.zeros_like(frames) if needs_x else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        for block in _blocks(frames) if needs_x or needs_weight else ():
            matrices = _matrices(block, ctx.repeated, x.dtype)
            dproducts = _combine(grads, block, matrices.outputs.T.contiguous(), padded=False)
            combined = _combine(frames, block, matrices.frames)
            dcombined = torch.empty_like(combined) if needs_x else None
            for index, (dproduct, images, factors) in enumerate(
                zip(dproducts, combined, matrices.kernels, strict=True)
            ):
                dimages, dkernel, _ = torch.ops.aten.convolution_backward(
                    dproduct,
                    images,
                    _kernel(weight, factors),
                    None,
                    [1, 1],
                    [1, 1],
                    [1, 1],
                    False,
                    [0, 0],
                    1,
                    [needs_x, needs_weight, False],
                )
                if needs_x:
                    dcombined[index] = dimages
                for time, factor in enumerate(factors.tolist() if needs_weight else ()):
                    dweight[:, :, time].add_(dkernel, alpha=factor)
            for index, run in enumerate(block if needs_x else ()):
                target = dx.flatten(2)[run.sample, run.start : run.start + run.num_outputs + 2]
                target.addmm_(matrices.frames.T, dcombined.movedim(2, -1).flatten(2)[:, index])
        dx = dx.permute(0, 4, 1, 2, 3) if needs_x else None
        return dx, dweight, grads.sum((0, 1, 2, 3)) if needs_bias else None, None


def _kernel(weight: Tensor, factors: Tensor) -> Tensor:
    """The sum of the kernel's three in time, times factors (3,): (C', C, 3, 3)."""
    one, two, three = factors.tolist()
    return (weight[:, :, 0] * one).add_(weight[:, :, 1], alpha=two).add_(weight[:, :, 2], alpha=three)


def _blocks(frames: Tensor) -> Iterator[list[Run]]:
    num_samples, num_padded, height, width, _ = frames.shape
    return runs(num_samples, num_padded - 2, block=max(1, BLOCK_POSITIONS // (height * width)))


def _matrices(block: Sequence[Run], repeated: bool, dtype: torch.dtype) -> Transforms:
    return transforms(block[0].num_outputs, repeated and block[0].start == 0, dtype)


def _combine(frames: Tensor, block: Sequence[Run], matrix: Tensor, padded: bool = True) -> Tensor:
    """Each run's frames (its input frames if `padded`), combined: (products, runs, C, H, W), channels innermost."""
    rows = frames.flatten(2)
    combined = rows.new_empty((len(matrix), len(block), rows.shape[2]))
    for index, run in enumerate(block):
        stop = run.start + run.num_outputs + (2 if padded else 0)
        torch.mm(matrix, rows[run.sample, run.start : stop], out=combined[:, index])
    return combined.unflatten(2, frames.shape[2:]).movedim(-1, 2)


def _rows(images: Tensor) -> Tensor:
    """(runs, C, H, W) -> (runs, H*W*C)."""
    return images.movedim(1, -1).flatten(1)
