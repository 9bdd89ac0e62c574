"""Haar wavelets: of videos with the constant that released weights were trained with, of images exactly.

A transform halves each axis and makes 8 (videos) or 4 (images) bands of each channel; channel band * C + c holds band
`band` of channel c. Band 0 is the sum over a block. In video bands, bits 1, 2 and 4 of the number say that the
difference along width, height and time is taken instead; in image bands, bits 1 and 2 stand for height and width.

State dicts hold the filters, although they are constants: they are compared on load, and never computed with.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vae.models.layers import CausalConv3d, repeat_front
from vae.models.streaming import Stream

# 0.3536 in float32, as released filters hold it, and not 1 / sqrt(8): analysis and synthesis multiply by 1.00026368.
GAIN_3D = 0.35359999537467957
GAIN_2D = 0.5
BANDS_3D = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
BANDS_2D = ("aa", "ad", "da", "dd")
SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in which a checkpoint may have rounded the filters
AXES_3D = (2, 3, 4)  # of the band number's highest bit, ..., lowest bit
AXES_2D = (3, 2)


def analyse(x: Tensor, axes: Sequence[int], gain: float) -> Tensor:
    """Bands of blocks of two along `axes`, times `gain`: (B, C, ...) -> (B, 2^n C, ...), each axis halved."""
    bands = [x]
    for axis in axes:
        halves = [band.unflatten(axis, (-1, 2)).unbind(axis + 1) for band in bands]
        bands = [part for one, two in halves for part in (one + two, one - two)]
    return torch.cat(bands, dim=1) * gain


def synthesise(coefficients: Tensor, axes: Sequence[int], gain: float) -> Tensor:
    """The transpose of `analyse`: (B, 2^n C, ...) -> (B, C, ...), each axis doubled."""
    bands = list((coefficients * gain).chunk(2 ** len(axes), dim=1))
    for axis in reversed(axes):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [torch.stack([low + high, low - high], axis + 1).flatten(axis, axis + 1) for low, high in pairs]
    return bands[0]


def filters(axes: Sequence[int], gain: float, names: Sequence[str]) -> dict[str, Tensor]:
    """What each band's filter is: {name: (1, 1, 2, ..., 2)}."""
    impulses = torch.eye(2 ** len(axes), device="cpu").view(-1, 2 ** len(axes), *[1] * len(axes))  # one band each
    blocks = synthesise(impulses, axes, gain)  # (bands, 1, 2, ..., 2)
    return {name: block[None] for name, block in zip(names, blocks, strict=True)}


def check_filters(
    expected: Mapping[str, Tensor], module: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: object
) -> None:
    """A hook before loading: filters that are not the constants are errors."""
    errors = rest[-1]
    for name, constant in expected.items():
        found = state.get(prefix + name)
        if found is None or found.is_meta or found.shape != constant.shape:
            continue  # strict loading speaks of names and shapes
        found = found.to("cpu", torch.float32)
        if not any(torch.allclose(found, constant.to(dtype).float(), rtol=1e-6, atol=0) for dtype in SAVED_DTYPES):
            errors.append(
                f"{prefix}{name} holds {found.flatten().tolist()}, but this wavelet's filter is the constant"
                f" {constant.flatten().tolist()}: these weights are of another transform"
            )
            return


class _Wavelet(nn.Module):
    def hold(self, expected: Mapping[str, Tensor], as_convolutions: bool = False) -> None:
        """Put the filters into the state dict: frozen weights of convolutions, or buffers."""
        names = {f"{name}_conv.conv.weight" if as_convolutions else name: value for name, value in expected.items()}
        for name, value in expected.items():
            if as_convolutions:
                conv = CausalConv3d(1, 1, kernel_size=2, stride=2, bias=False)
                conv.conv.weight = nn.Parameter(value.clone(), requires_grad=False)
                self.add_module(f"{name}_conv", conv)
            else:
                self.register_buffer(name, value.clone())
        self.register_load_state_dict_pre_hook(partial(check_filters, names))


class HaarWaveletTransform3D(_Wavelet):
    """(B, C, T, H, W) -> (B, 8 C, (T - 1) // 2 + 1, H // 2, W // 2): frame 0 is a pair with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hold(filters(AXES_3D, GAIN_3D, BANDS_3D), as_convolutions=True)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        if stream is None or stream.first:
            x = repeat_front(x, 1)
        else:
            x = stream.rejoin(self, x)
        _, _, num_frames, height, width = x.shape
        whole = num_frames // 2 * 2
        if stream is not None and whole < num_frames:
            stream.leave(self, x[:, :, whole:])
        return analyse(x[:, :, :whole, : height // 2 * 2, : width // 2 * 2], AXES_3D, GAIN_3D)


class InverseHaarWaveletTransform3D(_Wavelet):
    """(B, 8 C, T, H, W) -> (B, C, 2 T - 1, 2 H, 2 W): the copy of frame 0 is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.hold(filters(AXES_3D, GAIN_3D, BANDS_3D))

    def forward(self, coefficients: Tensor, stream: Stream | None = None) -> Tensor:
        x = synthesise(coefficients, AXES_3D, GAIN_3D)
        return x[:, :, 1:] if stream is None or stream.first else x


class HaarWaveletTransform2D(_Wavelet):
    """Of each frame: (B, C, [T,] H, W) -> (B, 4 C, [T,] H // 2, W // 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.hold(filters(AXES_2D, GAIN_2D, BANDS_2D))

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        height, width = x.shape[-2:]
        cropped = x[..., : height // 2 * 2, : width // 2 * 2]
        return analyse(cropped, [axis + x.ndim - 4 for axis in AXES_2D], GAIN_2D)


class InverseHaarWaveletTransform2D(_Wavelet):
    """Of each frame: (B, 4 C, [T,] H, W) -> (B, C, [T,] 2 H, 2 W)."""

    def __init__(self) -> None:
        super().__init__()
        self.hold(filters(AXES_2D, GAIN_2D, BANDS_2D))

    def forward(self, coefficients: Tensor, stream: Stream | None = None) -> Tensor:
        return synthesise(coefficients, [axis + coefficients.ndim - 4 for axis in AXES_2D], GAIN_2D)
