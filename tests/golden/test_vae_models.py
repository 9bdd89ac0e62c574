"""Layers, wavelets and WFVAE against the recorded vectors."""

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vae_cases import Case, by_case

from vae.models import layers, resample, wavelets
from vae.models.posterior import DiagonalGaussian
from vae.models.streaming import with_stream
from vae.models.wfvae import WFVAE

# Options of the original's layers that change nothing of a whole clip.
OF_CHUNKS = ("enable_cached", "depth", "unfold")


def module(case: Case) -> nn.Module:
    """The layer that a case names, with its weights."""
    return case.load_weights(made(case.config.get("cls", "CausalConv3d"), case.config["kwargs"]))


def made(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """A layer by its name and options in the original, whose norms and resamplers have some that are fixed here."""
    kwargs = {key: value for key, value in kwargs.items() if key not in OF_CHUNKS}
    if name == "Normalize":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "NORM_GROUPS", kwargs.get("num_groups", layers.NORM_GROUPS))
            return layers.normalize(kwargs["in_channels"], kwargs.get("norm_type", "groupnorm"))
    cls = getattr(layers, name, None) or getattr(resample, name)
    taken = inspect.signature(cls).parameters
    if "kernel_size" in kwargs and "kernel_size" not in taken:
        kernel_size = kwargs.pop("kernel_size")
        if kernel_size not in (3, [3, 3]):
            pytest.skip(f"{name} has kernels of 3 here, as in all released networks, not {kernel_size}")
    if "out_channels" in taken and kwargs.get("out_channels") is None:
        kwargs["out_channels"] = kwargs["in_channels"]
    return cls(**kwargs)


def test_options_of_the_original() -> None:
    assert made("Normalize", {"in_channels": 64}).num_groups == 32
    assert made("Normalize", {"in_channels": 12, "num_groups": 4}).num_groups == 4
    widths = {"in_channels": 4, "out_channels": 4}
    assert made("Spatial2xTime2x3DUpsample", widths | {"depth": 1, "enable_cached": True}).linear
    assert made("ResnetBlock3D", {"in_channels": 4, "norm_type": "layernorm"}).conv2.conv.out_channels == 4
    named = {"chan_in": 4, "chan_out": 4, "kernel_size": 3}
    assert isinstance(made("TimeDownsample2x", named), resample.TimeDownsample2x)
    assert made("CausalConv3d", named | {"enable_cached": True}).num_front == 2
    with pytest.raises(pytest.skip.Exception, match="TimeDownsample2x has kernels of 3 here"):
        made("TimeDownsample2x", named | {"kernel_size": 5})


def check_layer(case: Case) -> None:
    with torch.no_grad():
        case.check("y", module(case)(case.inputs["x"]))


@by_case("norms*")
def test_norms(case: Case) -> None:
    check_layer(case)


@by_case("conv2d*")
def test_conv2d(case: Case) -> None:
    check_layer(case)


@by_case("resnet_blocks*")
def test_resnet_blocks(case: Case) -> None:
    check_layer(case)


@by_case("attention*")
def test_attention(case: Case) -> None:
    check_layer(case)


@by_case("updown_blocks*")
def test_resamplers(case: Case) -> None:
    check_layer(case)


@by_case("silu*")
def test_silu(case: Case) -> None:
    case.check("y", F.silu(case.inputs["x"]))


@by_case("gaussian*")
def test_posterior(case: Case) -> None:
    posterior = DiagonalGaussian(case.inputs["params"])
    for name in ("mean", "logvar", "std", "var"):
        case.check(name, getattr(posterior, name))
    case.check("mode", posterior.mode())
    case.check("sampled", posterior.sample(case.inputs["eps"]))
    case.check("kl", posterior.kl())
    case.check("kl_other", posterior.kl(DiagonalGaussian(case.inputs["other"])))
    case.check("nll", posterior.nll(case.inputs["sample"]))


@by_case("causal_conv3d*")
@torch.no_grad()
def test_causal_conv3d(case: Case) -> None:
    """Whole, and where the case says so, in chunks, with what is kept after each."""
    conv = module(case)
    x = case.inputs["x"]
    if "chunks" not in case.config:
        return case.check("y", conv(x))
    case.check("y_direct", conv(x))
    outs = []
    for index, (chunk, stream) in enumerate(with_stream(x.split(case.config["chunks"], dim=2))):
        outs.append(conv(chunk, stream))
        if f"cache_after_{index}" in case.expected:
            case.check(f"cache_after_{index}", stream.states.get(conv, chunk[:, :, :0]))
    case.check("y", torch.cat(outs, dim=2))


@by_case("haar2d*")
@torch.no_grad()
def test_haar2d(case: Case) -> None:
    coefficients = wavelets.HaarWaveletTransform2D()(case.inputs["x"])
    case.check("coeffs", coefficients)
    case.check("recon", wavelets.InverseHaarWaveletTransform2D()(coefficients))


@by_case("haar3d*")
@torch.no_grad()
def test_haar3d(case: Case) -> None:
    """Analysis, then synthesis of its result, both in chunks where the case says so; or synthesis alone."""
    analysis, synthesis = wavelets.HaarWaveletTransform3D(), wavelets.InverseHaarWaveletTransform3D()
    if "coeffs" in case.inputs:
        return case.check("x", synthesis(case.inputs["coeffs"]))
    x = case.inputs["x"]
    coefficients, frames = [], []
    for chunk, stream in with_stream(x.split(case.config.get("chunks", x.shape[2]), dim=2)):
        coefficients.append(analysis(chunk, stream))
        frames.append(synthesis(coefficients[-1], stream))
    case.check("coeffs", torch.cat(coefficients, dim=2))
    case.check("recon", torch.cat(frames, dim=2))


@by_case("haar_pyramid*")
@torch.no_grad()
def test_haar_pyramid(case: Case) -> None:
    outer = wavelets.HaarWaveletTransform3D()
    inner = wavelets.HaarWaveletTransform2D() if case.config["level2"] == "2d" else outer
    w1 = outer(case.inputs["x"])
    w2 = inner(w1[:, :3])
    for name, value in (("w1", w1), ("w2", w2), ("w3", outer(w2[:, :3]))):
        case.check(name, value)


def vae(case: Case) -> WFVAE:
    return case.load_weights(WFVAE.from_config(case.config["config"])).eval()


def check_vae(case: Case, model: WFVAE) -> None:
    """All that a case holds of encoding, decoding and both ways of the forward pass."""
    x = case.inputs["x"]
    posterior, mode = model.encode(x), model(x)
    _, *decoded = model.decoder(case.inputs["z"])
    results = {
        "moments": posterior.moments,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "kl": posterior.kl(),
        "dec": model.decode(case.inputs["z"]),
        "recon_mode": mode.sample,
        **{f"enc_coeffs_{level}": value for level, value in enumerate(mode.coefficients[::2])},
        **{f"dec_coeffs_{level}": value for level, value in enumerate(decoded)},
    }
    if "eps" in case.inputs:
        results["recon_sample"] = model(x, case.inputs["eps"]).sample
    assert set(case.expected) <= set(results)
    for name in case.expected:
        case.check(name, results[name])


@by_case("wfvae_tiny*")
@torch.no_grad()
def test_wfvae(case: Case) -> None:
    check_vae(case, vae(case))


@pytest.mark.slow
@by_case("wfvae_real_configs*")
@torch.no_grad()
def test_wfvae_at_full_width(case: Case) -> None:
    check_vae(case, vae(case))


@by_case("wfvae_chunked*")
@torch.no_grad()
def test_causal_cache(case: Case) -> None:
    """With the case's own chunks, those that the original would choose, and in one frame at a time."""
    model = vae(case)
    x, z = case.inputs["x"], case.inputs["z"]
    own = (case.config.get("t_chunk_enc"), case.config.get("t_chunk_dec"))
    chosen = case.expected["t_chunks"].tolist() if "t_chunks" in case.expected else (None, None)
    for chunks in (own, chosen, (1, 1)):
        model.enable_tiling(*chunks)
        case.check("moments_chunked", model.encode(x).moments)
        case.check("dec_chunked", model.decode(z))
    model.disable_tiling()
    case.check("moments_chunked", model.encode(x).moments)
    case.check("dec_chunked", model.decode(z))


@by_case("auto_chunk*")
@torch.no_grad()
def test_chunks_of_the_original(case: Case) -> None:
    """Every plan of the original, and every valid length that it refused (-1), gives the result of the whole clip."""
    torch.manual_seed(0)
    tiny = {
        "latent_dim": 2,
        "base_channels": 2,
        "encoder_energy_flow_hidden_size": 2,
        "decoder_energy_flow_hidden_size": 2,
        "norm_type": "layernorm",
        "t_interpolation": "trilinear",
    }
    slower = {
        "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
        "l1_downsample_wavelet": "HaarWaveletTransform3D",
        "l1_upsample_block": "Spatial2xTime2x3DUpsample",
        "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
    }
    models = {4: WFVAE.from_config(tiny).double(), 8: WFVAE.from_config(tiny | slower).double()}
    for factor, num_frames, chunk_frames, chunk_latents in case.expected["table"].tolist():
        if (num_frames - 1) % factor:
            continue  # the original's result would be shorter than the clip
        model = models[factor]
        x = torch.rand(1, 3, num_frames, 8, 8, dtype=torch.float64) * 2 - 1
        model.disable_tiling()
        moments = model.encode(x).moments
        z = moments[:, :2]
        sample = model.decode(z)
        model.enable_tiling(max(1, chunk_frames), max(1, chunk_latents))
        torch.testing.assert_close(model.encode(x).moments, moments, atol=1e-9, rtol=0)
        torch.testing.assert_close(model.decode(z), sample, atol=1e-9, rtol=0)


@by_case("wfvae_grads*")
def test_wfvae_gradients(case: Case) -> None:
    model = vae(case)
    sample, moments, coefficients = model(case.inputs["x"], case.inputs["eps"])
    loss = (sample * case.inputs["proj"]).sum() + 1e-3 * DiagonalGaussian(moments).kl().sum()
    if case.config["wl"]:
        pairs = zip(coefficients[::2], coefficients[1::2], strict=True)
        loss = loss + 0.1 * sum((encoder - decoder).abs().sum() for encoder, decoder in pairs)
    loss.backward()
    case.check("loss", loss)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name in case.config["grads"]:
        case.check(f"grad/{name}", parameters[name].grad)
    case.check("grad_norm", torch.stack([each.grad.double().norm() for each in parameters.values()]).norm())
