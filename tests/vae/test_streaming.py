"""A video in chunks gives what the whole video gives, however it is cut."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vae.models import resample
from vae.models.layers import AttnBlock3DFix, CausalConv3d, Chain, ResnetBlock2D, ResnetBlock3D
from vae.models.streaming import in_chunks, in_groups, with_stream
from vae.models.wavelets import HaarWaveletTransform3D, InverseHaarWaveletTransform3D
from vae.models.wfvae import WFVAE, WFVAEConfig

CHANNELS = 8
LAYERS = {
    "conv": lambda: CausalConv3d(CHANNELS, 2, 3, padding=1),
    "conv1": lambda: CausalConv3d(CHANNELS, 2, 1),
    "conv5": lambda: CausalConv3d(CHANNELS, 2, (5, 3, 3), padding=1),
    "strided": lambda: CausalConv3d(CHANNELS, 2, 3, stride=2),
    "pairs": lambda: CausalConv3d(CHANNELS, 2, 2, stride=2),
    "resnet2d": lambda: ResnetBlock2D(CHANNELS, 4, norm_type="layernorm"),
    "resnet3d": lambda: ResnetBlock3D(CHANNELS, 4, norm_type="layernorm"),
    "resnet3d_conv": lambda: ResnetBlock3D(CHANNELS, 4, norm_type="layernorm", conv_shortcut=True),
    "attention": lambda: AttnBlock3DFix(CHANNELS, "layernorm"),
    "haar": HaarWaveletTransform3D,
    "inverse_haar": InverseHaarWaveletTransform3D,
    "down": lambda: resample.Downsample(CHANNELS, 2),
    "up": lambda: resample.Upsample(CHANNELS, 2),
    "down_space": lambda: resample.SpatialDownsample2x(CHANNELS, 2),
    "up_space": lambda: resample.SpatialUpsample2x(CHANNELS, 2),
    "down_time": lambda: resample.TimeDownsample2x(CHANNELS, CHANNELS),
    "up_time": lambda: resample.TimeUpsample2x(CHANNELS, CHANNELS),
    "down_time_res": lambda: resample.TimeDownsampleRes2x(CHANNELS, CHANNELS),
    "up_time_res": lambda: resample.TimeUpsampleRes2x(CHANNELS, CHANNELS),
    "down_3d": lambda: resample.Spatial2x3DDownsample(CHANNELS, 2),
    "up_3d": lambda: resample.Spatial2x3DUpsample(CHANNELS, 2),
    "down_both": lambda: resample.Spatial2xTime2x3DDownsample(CHANNELS, 2),
    "up_linear": lambda: resample.Spatial2xTime2x3DUpsample(CHANNELS, 2, "trilinear"),
    "up_nearest": lambda: resample.Spatial2xTime2x3DUpsample(CHANNELS, 2, "nearest"),
    "two_delays": lambda: Chain(
        resample.TimeUpsample2x(CHANNELS, CHANNELS), resample.Spatial2xTime2x3DUpsample(CHANNELS, 2, "trilinear")
    ),
}
TINY = {
    "latent_dim": 3,
    "base_channels": 4,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
}
TWICE_IN_TIME = {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}


def cut(x: Tensor, lengths: list[int]) -> Iterator[Tensor]:
    """x in pieces of those lengths; the rest is the last piece."""
    start = 0
    for length in lengths:
        if start + length >= x.shape[2]:
            break
        yield x[:, :, start : start + length]
        start += length
    yield x[:, :, start:]


def streamed(layer: nn.Module, x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([layer(chunk, stream) for chunk, stream in with_stream(cut(x, lengths))], dim=2)


def tiny(**changes: object) -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(WFVAEConfig(**{**TINY, **changes})).double()


def clip(num_frames: int, height_px: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(1, 3, num_frames, height_px, 8, dtype=torch.float64, generator=generator) * 2 - 1


# Layers.


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12, deadline=None)
@given(num_frames=st.integers(1, 9), lengths=st.lists(st.integers(1, 4), max_size=6))
@torch.no_grad()
def test_a_layer_in_chunks(name: str, num_frames: int, lengths: list[int]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, CHANNELS, num_frames, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(streamed(layer, x, lengths), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_pass_between_chunks(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(1, CHANNELS, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    whole = layer(x)
    weights = torch.randn_like(whole)
    inputs = [x, *(each for each in layer.parameters() if each.requires_grad)]
    expected = torch.autograd.grad((whole * weights).sum(), inputs)
    actual = torch.autograd.grad((streamed(layer, x, [1, 2, 1]) * weights).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_what_a_linear_upsampler_knows_it_emits() -> None:
    """Frames 0, 1 and 2 of the input at once: a[0] and the two between a[0] and a[1]; the rest at the end."""
    layer = resample.TimeUpsample2x(1, 1)
    x = torch.tensor([7.0, 0.0, 4.0, 8.0]).view(1, 1, 4, 1, 1)
    outs = [layer(chunk, stream).flatten().tolist() for chunk, stream in with_stream(x.split([3, 1], dim=2))]
    assert outs == [[7.0, 0.0, 1.0, 3.0], [5.0, 7.0, 8.0]]


def test_nothing_stays_on_modules() -> None:
    """A video that is left in the middle does not leak into the next one."""
    layer = CausalConv3d(1, 1, 3, padding=1)
    x = torch.randn(1, 1, 5, 4, 4)
    with torch.no_grad():
        expected = streamed(layer, x, [2, 2])
        next(iter(layer(chunk, stream) for chunk, stream in with_stream(cut(x + 1, [3]))))
        assert torch.equal(streamed(layer, x, [2, 2]), expected)


# Cutting.


def test_flags() -> None:
    chunks = [torch.zeros(1, 1, n, 1, 1) for n in (2, 1, 3)]
    flags = [(chunk.shape[2], stream.first, stream.last) for chunk, stream in with_stream(chunks)]
    assert flags == [(2, True, False), (1, False, False), (3, False, True)]
    assert [(stream.first, stream.last) for _, stream in with_stream(chunks[:1])] == [(True, True)]
    assert list(with_stream([])) == []


@pytest.mark.parametrize(
    ("num_frames", "chunk", "expected"), [(9, 4, [5, 4]), (8, 4, [5, 3]), (1, 4, [1]), (3, 1, [2, 1])]
)
def test_in_chunks(num_frames: int, chunk: int, expected: list[int]) -> None:
    assert [each.shape[2] for each in in_chunks(torch.zeros(1, 1, num_frames, 1, 1), chunk)] == expected


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), group=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_in_groups(lengths: list[int], group: int) -> None:
    x = torch.arange(float(sum(lengths))).view(1, 1, -1, 1, 1)
    chunks = list(in_groups(x.split(lengths, dim=2), group))
    assert torch.equal(torch.cat(chunks, dim=2), x)
    sizes = [each.shape[2] for each in chunks]
    whole = sizes if (x.shape[2] - 1) % group == 0 else sizes[:-1]
    assert all(size > 0 for size in sizes)
    assert [size % group for size in whole] == [1 % group] * min(1, len(whole)) + [0] * (len(whole) - 1)


# Models.


@pytest.mark.parametrize("interpolation", ["nearest", "trilinear"])
@pytest.mark.parametrize("level", [{}, TWICE_IN_TIME], ids=["4x", "8x"])
@settings(max_examples=8, deadline=None)
@given(latents=st.integers(1, 6), data=st.data())
@torch.no_grad()
def test_a_model_in_chunks(level: dict[str, str], interpolation: str, latents: int, data: st.DataObject) -> None:
    model = tiny(t_interpolation=interpolation, **level)
    num_frames = model.temporal_factor * (latents - 1) + 1
    x = clip(num_frames)
    moments = model.encode(x).moments
    lengths = data.draw(st.lists(st.integers(1, 12), max_size=8))
    chunked = torch.cat(list(model.encode_chunks(cut(x, lengths))), dim=2)
    torch.testing.assert_close(chunked, moments, rtol=0, atol=1e-9)
    z = moments[:, :3]
    lengths = data.draw(st.lists(st.integers(1, 3), max_size=6))
    frames = torch.cat(list(model.decode_chunks(cut(z, lengths))), dim=2)
    torch.testing.assert_close(frames, model.decode(z), rtol=0, atol=1e-9)


def test_training_in_chunks_gives_coefficients_and_gradients() -> None:
    model = tiny(t_interpolation="trilinear")
    x, noise = clip(13), torch.randn(1, 3, 4, 1, 1, dtype=torch.float64)
    results = []
    for chunks in (None, (4, 1), (3, 2)):
        model.disable_tiling() if chunks is None else model.enable_tiling(*chunks)
        output = model(x, noise)
        pairs = zip(output.coefficients[::2], output.coefficients[1::2], strict=True)
        loss = output.sample.square().sum() + sum((encoder - decoder).abs().sum() for encoder, decoder in pairs)
        gradients = torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])
        results.append((*output[:2], *output.coefficients, *gradients))
    for chunked in results[1:]:
        torch.testing.assert_close(chunked, results[0], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_long_video_needs_constant_memory() -> None:
    """What is remembered between chunks does not grow, and results come while frames come."""
    model, seen = tiny(t_interpolation="trilinear"), []

    def frames() -> Iterator[Tensor]:
        for index in range(8):
            seen.append(index)
            yield clip(5 if index == 0 else 4)

    first = next(model.decode_chunks(moments[:, :3] for moments in model.encode_chunks(frames())))
    assert first.shape[2] == 3 and max(seen) <= 2  # of 2 latents' 5 frames, the last 2 wait for the next latent
    sizes = []
    chunks = (clip(5 if index == 0 else 4) for index in range(6))
    for chunk, stream in with_stream(chunks):
        model.encoder(chunk, stream)
        sizes.append(sum(state.numel() for state in stream.states.values()))
    assert len(set(sizes)) == 1


@torch.no_grad()
def test_causality() -> None:
    """Latent i sees frames up to 4 i; frame 0 makes latent 0, and a frame sees one latent ahead at most."""
    model = tiny(t_interpolation="trilinear")
    x = clip(13)
    moments = model.encode(x).moments
    torch.testing.assert_close(model.encode(x[:, :, :1]).moments, moments[:, :, :1], rtol=0, atol=1e-10)
    for latent in range(1, 4):
        changed = x.clone()
        changed[:, :, 4 * latent - 3 :] += 1
        difference = (model.encode(changed).moments - moments).abs().amax(dim=(0, 1, 3, 4))
        assert (difference[:latent] < 1e-10).all() and (difference[latent:] > 1e-6).all()
    z = moments[:, :3]
    torch.testing.assert_close(model.decode(z[:, :, :2])[:, :, :3], model.decode(z)[:, :, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm_type": "groupnorm", "base_channels": 32, "encoder_energy_flow_hidden_size": 32}
            | {"decoder_energy_flow_hidden_size": 32},
            "norm_type groupnorm takes its statistics over all frames, so a clip in chunks would give another result:"
            " leave tiling disabled and take shorter or smaller clips, or a model with layernorm",
        ),
        ({"attention_type": "AttnBlock3D"}, "attention_type AttnBlock3D mixes all frames, so .* with AttnBlock3DFix"),
    ],
)
def test_models_that_cannot_be_chunked(changes: dict[str, object], message: str) -> None:
    model = tiny(**changes)
    with pytest.raises(ValueError, match=message):
        model.enable_tiling()
    for generator in (model.encode_chunks([clip(5)]), model.decode_chunks([clip(5)])):
        with pytest.raises(ValueError, match=message):
            next(generator)


def test_wrong_chunks_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="chunk_frames is 0, but must be at least 1"):
        model.enable_tiling(chunk_frames=0)
    with pytest.raises(ValueError, match="7 frames are not 4 n \\+ 1: use 5 or 9"), torch.no_grad():
        list(model.encode_chunks([clip(5), clip(2)]))
    with pytest.raises(ValueError, match="a height of 12 px is no multiple of 8: use 8 or 16"), torch.no_grad():
        next(model.encode_chunks([clip(5, height_px=12)]))
