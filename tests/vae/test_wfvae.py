"""WFVAE and its layers: names of weights, sizes, files, what is refused; fused layers against plain ones."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.pretrained import PretrainedModel
from vae.models import fused, layers, resample, winograd
from vae.models.layers import AttnBlock2D, CausalConv3d, ResnetBlock2D, ResnetBlock3D, norm_silu_conv, normalize
from vae.models.load import build_model, load_model
from vae.models.posterior import DiagonalGaussian
from vae.models.resample import Downsample
from vae.models.wavelets import HaarWaveletTransform2D, HaarWaveletTransform3D, InverseHaarWaveletTransform3D
from vae.models.wfvae import WFVAE, WFVAEConfig

KEYS_DIR = Path(__file__).resolve().parents[3] / "shared" / "specs" / "keys"
TINY = {
    "latent_dim": 2,
    "base_channels": 4,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}
TWICE_IN_TIME = {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
LARGE = WFVAEConfig(
    latent_dim=16,
    base_channels=192,
    encoder_energy_flow_hidden_size=128,
    norm_type="layernorm",
    t_interpolation="trilinear",
)


def tiny(**changes: Any) -> WFVAE:
    torch.manual_seed(0)
    return WFVAE.from_config({**TINY, **changes})


def video(num_frames: int, height_px: int = 16, width_px: int = 8) -> Tensor:
    return torch.rand(1, 3, num_frames, height_px, width_px, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Names and sizes.


@pytest.mark.skipif(not KEYS_DIR.is_dir(), reason=f"no {KEYS_DIR}")
@pytest.mark.parametrize(
    ("file", "changes"), [("wfvae_default", {}), ("wfvae_large_16chn", {}), ("wfvae_large_16chn_888", TWICE_IN_TIME)]
)
def test_state_dict_names(file: str, changes: dict[str, str]) -> None:
    config = json.loads((KEYS_DIR / f"{file.removesuffix('_888')}.config.json").read_text())
    with torch.device("meta"):
        model = build_model("WFVAE", {**config, **changes})
    expected = json.loads((KEYS_DIR / f"{file}.json").read_text())
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected


def test_parameter_counts() -> None:
    """As the original counts them: with the wavelets' 2 x 64 frozen numbers."""
    for config, total, decoder in ((WFVAEConfig(), 145_576_780, 108.39e6), (LARGE, 317_081_372, 232.49e6)):
        with torch.device("meta"):
            model = WFVAE(config)
        parameters = list(model.parameters())
        assert sum(each.numel() for each in parameters) == total
        assert sum(each.numel() for each in model.decoder.parameters()) == pytest.approx(decoder, abs=5e3)
        assert (len(model.state_dict()), len(parameters), sum(each.requires_grad for each in parameters)) == (
            244,
            220,
            204,
        )
        assert model.last_layer.shape == (24, config.base_channels, 3, 3)


@pytest.mark.parametrize(("changes", "factor"), [({}, 4), (TWICE_IN_TIME, 8)], ids=["4x", "8x"])
@torch.no_grad()
def test_shapes(changes: dict[str, str], factor: int) -> None:
    model = tiny(**changes)
    x = video(2 * factor + 1, 16, 24)
    assert model.temporal_factor == factor
    assert model.latent_shape(*x.shape[2:]) == (2, 3, 2, 3)
    output = model(x)
    assert output.sample.shape == x.shape and output.moments.shape == (1, 4, 3, 2, 3)
    w2, v2, w3, v3 = output.coefficients
    assert w2.shape == v2.shape == (1, 24 if changes else 12, 5, 4, 6)
    assert w3.shape == v3.shape == (1, 24, 3, 2, 3)
    posterior = model.encode(x)
    torch.testing.assert_close(output.sample, model.decode(posterior.mode()), rtol=0, atol=0)
    noise = torch.randn(1, 2, 3, 2, 3)
    torch.testing.assert_close(model(x, noise).sample, model.decode(posterior.sample(noise)), rtol=0, atol=0)
    assert model.encoder_modules() == [model.encoder] and model.decoder_modules() == [model.decoder]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 16, 16), "WFVAE cannot take these clips: 16 frames are not 4 n + 1: use 13 or 17"),
        ((0, 16, 16), "WFVAE cannot take these clips: 0 frames are not 4 n + 1: use 1"),
        ((5, 20, 4), "a height of 20 px is no multiple of 8: use 16 or 24; a width of 4 px is no multiple of 8: use 8"),
    ],
)
def test_sizes_that_are_no_whole_latents(size: tuple[int, int, int], message: str) -> None:
    model = tiny()
    for refuse in (model.check_size, model.latent_shape):
        with pytest.raises(ValueError) as error:
            refuse(*size)
        assert message in str(error.value)
    if min(size) > 0:
        for refuse in (model.encode, model):
            with pytest.raises(ValueError) as error:
                refuse(torch.zeros(1, 3, *size))
            assert message in str(error.value)


def test_posterior_refusals() -> None:
    with pytest.raises(ValueError, match="moments have 3 channels; means and log variances make an even number"):
        DiagonalGaussian(torch.zeros(1, 3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"noise has shape \(1, 1\), the latents \(1, 2, 1, 1, 1\)"):
        DiagonalGaussian(torch.zeros(1, 4, 1, 1, 1)).sample(torch.zeros(1, 1))


# Configurations and files.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dims": 4}, "configuration of WFVAE: unknown key 'latent_dims', did you mean 'latent_dim'?"),
        ({"zzz": 1, "latent_dim": "4"}, "latent_dim is '4', but must be like 8; unknown key 'zzz'"),
        ({"use_attention": 1}, "use_attention is 1, but must be like True"),
        ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm'; choose one of groupnorm, layernorm"),
        ({"attention_type": "Attention3DFix"}, "attention_type is 'Attention3DFix'; choose one of AttnBlock3D, Attn"),
        ({"t_interpolation": "cubic"}, "t_interpolation is 'cubic'; choose one of nearest, trilinear"),
        (
            {"l1_upsample_block": "Spatial2xTime2x3DUpsample"},
            "l1 has the blocks Downsample, HaarWaveletTransform2D, Spatial2xTime2x3DUpsample, Inverse",
        ),
        ({"norm_type": "groupnorm"}, "groupnorm makes 32 groups, but a layer has 4 channels: choose widths that are"),
        ({"_class_name": "CausalVAEModel"}, "this configuration is of CausalVAEModel, not of WFVAEModel"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert message in str(error.value)


def test_model_names() -> None:
    assert type(build_model(None, {**TINY, "_class_name": "WFVAEModel", "_diffusers_version": "0.29.0"})) is WFVAE
    with pytest.raises(ValueError, match="there is no model 'WFVEA': give a model name, one of WFVAE, WFVAE2, Causal"):
        build_model("WFVEA", TINY)
    with pytest.raises(ValueError, match="the configuration has no _class_name: give a model name"):
        build_model(None, TINY)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = tiny()
    weight = model.decoder.conv_in.conv.weight
    weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    model.save_pretrained(tmp_path / "vae")
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["_class_name"] == "WFVAEModel" and config["scale"] == [0.18215] * 4
    for loaded in (load_model(tmp_path / "vae"), WFVAE.from_pretrained(tmp_path / "vae")):
        assert loaded.config == model.config and not loaded.training
        assert {name for name, each in loaded.named_parameters() if each.requires_grad} == {
            name for name, each in model.named_parameters() if each.requires_grad
        }
        torch.testing.assert_close(loaded(video(5)), model(video(5)), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_load_as_float32(tmp_path: Path) -> None:
    tiny().bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert {each.dtype for each in model.state_dict().values()} == {torch.float32}


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("decoder.conv_out.bias"), "1 missing: decoder.conv_out.bias"),
        (lambda state: state.update(ema=torch.zeros(1)), "1 unexpected: ema"),
        (
            lambda state: state.update({"decoder.conv_out.bias": torch.zeros(2)}),
            "1 of another shape: decoder.conv_out.bias (2,) instead of (24,)",
        ),
        (lambda state: [state.pop(name) for name in list(state) if "mid" in name], ", ..."),
        (
            lambda state: state["decoder.inverse_wavelet_transform_out.gh"].mul_(2**0.5 / 2),
            "decoder.inverse_wavelet_transform_out.gh holds [0.25",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    tiny().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json: give the folder of a model, with config.json and"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "WFVAEModel"}')
    with pytest.raises(FileNotFoundError, match="tried: diffusion_pytorch_model.safetensors, .* holds config.json$"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a mapping in braces, it holds a list"):
        load_model(tmp_path)


# Wavelets.


@torch.no_grad()
def test_wavelet_bands() -> None:
    """One block: band 1 is the difference in width, 2 in height, 4 in time; the first frame is a pair with itself."""
    x = torch.zeros(1, 1, 3, 2, 2)
    x[0, 0, 1, 0, 1] = 1  # the second frame's upper right pixel: first in its pair
    bands = HaarWaveletTransform3D()(x)
    assert bands.shape == (1, 8, 2, 1, 1) and not bands[:, :, 0].any()
    expected = 0.3536 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    torch.testing.assert_close(bands[0, :, 1, 0, 0], expected, rtol=0, atol=1e-7)
    restored = InverseHaarWaveletTransform3D()(bands)
    torch.testing.assert_close(restored, x * 8 * 0.3536**2, rtol=0, atol=1e-6)
    bands = HaarWaveletTransform2D()(torch.tensor([[1.0, 2.0], [3.0, 5.0]]).view(1, 1, 2, 2))
    assert bands.flatten().tolist() == [5.5, -2.5, -1.5, 0.5]  # sum, along height, along width, along both


@torch.no_grad()
def test_odd_sizes_lose_their_last_row() -> None:
    x = torch.rand(1, 2, 4, 5, 7)
    assert torch.equal(HaarWaveletTransform3D()(x), HaarWaveletTransform3D()(x[:, :, :3, :4, :6]))
    assert torch.equal(HaarWaveletTransform2D()(x), HaarWaveletTransform2D()(x[..., :4, :6]))


# Fused layers against plain ones.


def plain_block(block: ResnetBlock3D | ResnetBlock2D, x: Tensor) -> Tensor:
    """The definition, by ordinary operations."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            frames = isinstance(block, ResnetBlock2D)
            return layers.per_frame(lambda y: nn.GroupNorm.forward(module, y), x) if frames else module(x)
        return module.norm(x.movedim(1, -1)).movedim(-1, 1)

    def conv(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, CausalConv3d):
            return module.conv(torch.cat([x[:, :, :1]] * module.num_front + [x], dim=2))
        return layers.per_frame(lambda y: F.conv2d(y, module.weight, module.bias, padding=module.padding), x)

    out = conv(block.conv1, F.silu(norm(block.norm1, x)))
    out = conv(block.conv2, F.silu(norm(block.norm2, out)))
    return out + (conv(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x)


@pytest.mark.parametrize("norm_type", ["groupnorm", "layernorm"])
@pytest.mark.parametrize("cls", [ResnetBlock2D, ResnetBlock3D])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_blocks_equal_their_definition(cls: type[nn.Module], norm_type: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = cls(32, 64, norm_type=norm_type).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(shape[0], 32, shape[1], 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    actual, expected = block(x), plain_block(block, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (actual, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("norm_type", "channels"), [("layernorm", 3), ("groupnorm", 32)])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_gradcheck_of_a_fused_convolution(norm_type: str, channels: int, num_frames: int) -> None:
    torch.manual_seed(0)
    norm, conv = normalize(channels, norm_type).double(), CausalConv3d(channels, 2, 3, padding=1).double()
    x = torch.randn(2, channels, num_frames, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [*norm.parameters(), *conv.parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *_: norm_silu_conv(x, norm, conv), (x, *parameters), fast_mode=channels > 3
    )


def test_frozen_parts_get_no_gradients() -> None:
    block = ResnetBlock3D(4, 4, norm_type="layernorm")
    x = torch.randn(1, 4, 3, 4, 4, requires_grad=True)
    block.conv1.requires_grad_(False)
    block(x).sum().backward()
    assert block.conv1.conv.weight.grad is None and x.grad is not None and block.norm1.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (ResnetBlock3D, (1, 8, 16, 16, 16)),
        (ResnetBlock3D, (2, 8, 1, 32, 32)),
        (ResnetBlock2D, (1, 8, 16, 16, 16)),
        (ResnetBlock2D, (2, 8, 1, 32, 32)),
        (ResnetBlock2D, (4, 8, 32, 32)),
        (Downsample, (1, 8, 16, 16, 16)),
        (Downsample, (4, 8, 32, 32)),
    ],
)
def test_what_backward_keeps(cls: type[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the input what is between a residual block's convolutions, nothing else; no gradient changes by it."""
    torch.manual_seed(0)
    layer = cls(8, 8, **({} if cls is Downsample else {"norm_type": "layernorm"}))
    x = layers.channels_last(torch.randn(shape)).requires_grad_()
    inputs, kept = [x, *layer.parameters()], []

    def keeping(pack: Callable = lambda saved: saved, unpack: Callable = lambda packed: packed) -> Any:
        def count(saved: Tensor) -> Any:
            packed = pack(saved)
            if isinstance(packed, Tensor) and packed.numel() >= x.numel() and packed.data_ptr() != x.data_ptr():
                kept.append(packed.data_ptr())
            return packed

        return torch.autograd.graph.saved_tensors_hooks(count, unpack)

    monkeypatch.setattr(fused, "saved_tensors_hooks", keeping)
    with keeping():
        out = layer(x)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    assert len(set(kept)) == (cls is not Downsample)
    for module in (layers, resample):
        monkeypatch.setattr(module, "remaking", lambda *_: nullcontext())
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Convolutions in half precision, statistics in float32, gradients in float32; close to full precision."""
    torch.manual_seed(0)
    model = tiny(base_channels=16)
    x, noise = video(5), torch.randn(1, 2, 2, 2, 1)
    expected = model(x, noise)
    with torch.autocast("cpu", dtype=dtype):
        actual = model(x, noise)
    assert actual.moments.dtype == dtype
    assert (actual.sample - expected.sample).abs().mean() < 0.05 * expected.sample.abs().mean()
    actual.sample.float().square().mean().backward()
    gradients = [each.grad for each in model.parameters() if each.requires_grad and each.grad is not None]
    assert {each.dtype for each in gradients} == {torch.float32}
    assert all(each.isfinite().all() for each in gradients)


def test_half_precision_weights() -> None:
    model = tiny(base_channels=16).bfloat16()
    output = model(video(5).bfloat16())
    assert output.sample.dtype == torch.bfloat16 and output.sample.isfinite().all()


def test_training_after_inference_mode() -> None:
    model = tiny()
    with torch.inference_mode():
        model(video(9))
    model(video(9)).sample.sum().backward()


def test_dropout_is_applied_in_training_alone() -> None:
    torch.manual_seed(0)
    block = ResnetBlock3D(4, 4, dropout=0.5, norm_type="layernorm")
    x = torch.randn(1, 4, 3, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_attention_takes_images_of_any_layout() -> None:
    torch.manual_seed(0)
    block, x = AttnBlock2D(8, "layernorm"), torch.randn(2, 8, 4, 6)
    q, k, v = ((conv(block.norm(x))).flatten(2).transpose(1, 2) for conv in (block.q, block.k, block.v))
    attended = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
    expected = x + block.proj_out(attended.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inputs_stay_as_they_are() -> None:
    """Where memory is used again in inference, it is not the caller's."""
    for block in (ResnetBlock3D(4, 4, norm_type="layernorm"), ResnetBlock2D(4, 4, norm_type="layernorm")):
        x = torch.randn(1, 4, 3, 4, 4).to(memory_format=torch.channels_last_3d)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


# Fewer multiplications.


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 1), (1, 2), (2, 3), (1, 5), (2, 7), (1, 9)])
@pytest.mark.parametrize("block_positions", [1, 4096])
def test_winograd_is_a_convolution(
    monkeypatch: pytest.MonkeyPatch, num_samples: int, num_frames: int, repeated: bool, block_positions: int
) -> None:
    monkeypatch.setattr(winograd, "BLOCK_POSITIONS", block_positions)
    torch.manual_seed(0)
    frames = torch.randn(num_samples, 3, num_frames, 3, 4, dtype=torch.float64)
    past = (
        frames[:, :, :1].expand(-1, -1, 2, -1, -1)
        if repeated
        else torch.randn_like(frames[:, :, :1]).repeat(1, 1, 2, 1, 1)
    )
    weight = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    frames.requires_grad_()
    x = torch.cat([frames[:, :, :1]] * 2 + [frames] if repeated else [past, frames], dim=2)
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    actual = winograd.convolve(x, weight, bias, repeated)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * weights).sum(), (frames, weight, bias), retain_graph=True)
        for out in (actual, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-11)


@torch.no_grad()
def test_rounding_of_winograd() -> None:
    """About twice that of the definition, in float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 11, 8, 8), torch.randn(16, 256, 3, 3, 3) / (27 * 256) ** 0.5
    exact = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    error = (winograd.convolve(x, weight, torch.zeros(16), False) - exact).abs().max()
    assert error < 2e-5


def test_a_model_with_fewer_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny().double(), video(9).double()
    parameters = [each for each in model.parameters() if each.requires_grad]

    def results() -> list[Tensor]:
        output = model(x)
        loss = output.sample.square().sum()
        return [output.sample, output.moments, *torch.autograd.grad(loss, parameters)]

    expected = results()
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_POSITIONS", 1)
    torch.testing.assert_close(results(), expected, rtol=1e-8, atol=1e-8)
    model.enable_tiling(4, 1)
    torch.testing.assert_close(results(), expected, rtol=1e-8, atol=1e-8)


# Names that are refused.


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="norm_type is 'instancenorm'; choose one of groupnorm, layernorm"):
        normalize(32, "instancenorm")
    with pytest.raises(
        ValueError, match='48 channels: choose widths that are multiples of 32, or norm_type "layernorm'
    ):
        normalize(48)
    with pytest.raises(ValueError, match="t_interpolation is 'area'; choose one of nearest, trilinear"):
        resample.Spatial2xTime2x3DUpsample(4, 4, "area")
    assert issubclass(WFVAE, PretrainedModel)
