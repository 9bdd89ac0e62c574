"""Autoencoders: the documented lines, folders of weights, sizes that are refused."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vaes import TINY, write_image_vae, write_vae, write_video_vae
from torch import Tensor

import diffnext.models.autoencoders.layers as layers
from diffnext.models.autoencoders import latent_scale, load_autoencoder
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_ltx_video import AutoencoderKLLTXVideo
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.autoencoders.tiling import TemporalTiling
from diffnext.models.posterior import DiagonalGaussianDistribution

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY_LTX = {"block_out_channels": [8, 16, 32, 64, 128], "layers_per_block": [1, 1, 1, 1, 1], "latent_channels": 8}
TINY_LTX |= {"decoder_block_out_channels": [8, 16, 32, 64], "decoder_layers_per_block": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image") / "vae"
    write_image_vae(folder)
    return folder


@pytest.fixture(scope="module")
def video_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video") / "vae"
    write_video_vae(folder)
    return folder


def copy_with(folder: Path, target: Path, **config: Any) -> Path:
    """A folder with other settings and the same weights."""
    target.mkdir()
    values = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(values))
    (target / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    return target


# The documented lines


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_image_lines_of_the_guide(image_vae: Path, dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    vae = AutoencoderKL.from_pretrained(image_vae)
    vae = vae.to(device=device, dtype=dtype).eval()
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    x = torch.as_tensor(np.array(image)[None, ...].transpose(0, 3, 1, 2)).to(device).to(dtype)
    with torch.no_grad():
        x = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.cpu().numpy()[0]
    assert x.shape == (8, 4, 6)
    assert x.dtype == (np.float16 if dtype is torch.float16 else np.float32)
    assert np.isfinite(x).all()


def test_video_lines_of_the_guide(video_vae: Path) -> None:
    vae = AutoencoderKLOpenSora.from_pretrained(video_vae)
    vae = vae.to(device="cpu", dtype=torch.float32).eval()
    clip = np.random.default_rng(0).integers(0, 256, (33, 16, 24, 3), np.uint8)
    x = torch.as_tensor(clip[None, ...].transpose((0, 4, 1, 2, 3))).to(torch.float32)
    with torch.no_grad():
        x = vae.encode(x.sub(127.5).div(127.5)).latent_dist.parameters.cpu().numpy()[0]
    assert x.shape == (8, 9, 2, 3)


def test_an_image_is_a_clip_of_one_frame(video_vae: Path) -> None:
    vae = AutoencoderKLOpenSora.from_pretrained(video_vae)
    image = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        parameters = vae.encode(image).latent_dist.parameters
        torch.testing.assert_close(parameters, vae.encode(image[:, :, None]).latent_dist.parameters[:, :, 0])
        latents = parameters[:, :4]
        assert vae.decode(latents).sample.shape == (2, 3, 16, 24)
    assert image.shape == (2, 3, 16, 24), "the caller's tensor has changed its shape"
    assert latents.shape == (2, 4, 2, 3), "the caller's tensor has changed its shape"


# Latents


def test_scale_is_in_place_and_reversible() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({"scaling_factor": 0.5, "shift_factor": 2.0})
    x = torch.tensor([4.0, 6.0])
    assert vae.scale_(x) is x and x.tolist() == [1.0, 2.0]
    assert vae.unscale_(x) is x and x.tolist() == [4.0, 6.0]


def test_scale_by_channels() -> None:
    statistics = {"latents_mean": [1.0] * 8, "latents_std": [2.0] * 8, "scaling_factor": 4.0}
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo.from_config(TINY_LTX | statistics)
    x = torch.full((1, 8, 2, 1, 1), 3.0)
    torch.testing.assert_close(vae.scale_(x), torch.full_like(x, 4.0))
    torch.testing.assert_close(vae.unscale_(x), torch.full_like(x, 3.0))


def test_posterior_types_and_draws() -> None:
    parameters = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    posterior = DiagonalGaussianDistribution(parameters)
    assert posterior.parameters is parameters
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    sample = posterior.sample(torch.Generator().manual_seed(3))
    assert sample.dtype == torch.bfloat16
    assert torch.equal(sample, posterior.sample(noise=noise))


def test_no_variances(tmp_path: Path) -> None:
    vae = write_vae(tmp_path, AutoencoderKL, **TINY, double_z=False)
    with torch.no_grad():
        posterior = vae.encode(torch.randn(1, 3, 16, 16)).latent_dist
    assert posterior.parameters.shape == (1, 4, 2, 2)
    assert posterior.sample() is posterior.parameters


# Folders


def test_what_is_saved_loads_in_diffusers(image_vae: Path) -> None:
    ours = AutoencoderKL.from_pretrained(image_vae)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = diffusers.AutoencoderKL(**TINY, **blocks).eval()
    theirs.load_state_dict(load_file(image_vae / WEIGHTS))
    x = torch.randn(1, 3, 32, 16)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        torch.testing.assert_close(ours.encode(x).latent_dist.parameters, expected.parameters)
        torch.testing.assert_close(ours.decode(expected.mean).sample, theirs.decode(expected.mean).sample)


def test_weights_of_diffusers_cogvideox(tmp_path: Path) -> None:
    config = {"block_out_channels": [32, 32, 64, 32], "layers_per_block": 1}
    theirs = diffusers.AutoencoderKLCogVideoX(**config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert isinstance(ours, AutoencoderKLCogVideoX)
    x = torch.randn(1, 3, 9, 16, 24)
    with torch.no_grad():
        parameters = ours.encode(x).latent_dist.parameters
        # Theirs encodes 8 frames at a time with cached context, but norms by the frames at hand: compare one window.
        torch.testing.assert_close(parameters, theirs.encoder(x)[0], rtol=1e-4, atol=1e-5)
        z = parameters[:, :16]
        torch.testing.assert_close(ours.decode(z).sample, theirs.decoder(z)[0], rtol=1e-4, atol=1e-5)


def test_legacy_names_shards_and_bin(image_vae: Path, tmp_path: Path) -> None:
    state = load_file(image_vae / WEIGHTS)
    legacy = {}
    for name, value in state.items():
        for new, old in {
            ".to_q.": ".query.",
            ".to_k.": ".key.",
            ".to_v.": ".value.",
            ".to_out.0.": ".proj_attn.",
        }.items():
            is_projection = new in name and name.endswith("weight")
            name, value = name.replace(new, old), value[..., None, None] if is_projection else value
        legacy[name] = value
    shards = {"a.safetensors": sorted(legacy)[::2], "b.safetensors": sorted(legacy)[1::2]}
    config = (image_vae / "config.json").read_text()
    for folder in (tmp_path / "shards", tmp_path / "bin"):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    for file, names in shards.items():
        save_file({name: legacy[name].contiguous() for name in names}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / "shards" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    torch.save(legacy, tmp_path / "bin" / "diffusion_pytorch_model.bin")
    for folder in (tmp_path / "shards", tmp_path / "bin"):
        loaded = AutoencoderKL.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
    (tmp_path / "shards" / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks b.safetensors, which .*index.json names"):
        AutoencoderKL.from_pretrained(tmp_path / "shards")


def test_scale_without_weights(image_vae: Path) -> None:
    vae = latent_scale(image_vae)
    assert all(each.is_meta for each in vae.parameters())
    assert vae.scale_(torch.ones(2)).tolist() == pytest.approx([0.13025] * 2)


def test_dtype_of_weights(image_vae: Path) -> None:
    vae = AutoencoderKL.from_pretrained(image_vae, dtype=torch.bfloat16)
    assert {each.dtype for each in vae.parameters()} == {torch.bfloat16}
    assert not vae.training


def test_released_settings_are_known(image_vae: Path, tmp_path: Path) -> None:
    ignored = {
        "act_fn": "silu",
        "norm_num_groups": 32,
        "force_upcast": True,
        "latents_mean": None,
        "_name_or_path": "x",
    }
    ignored |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "_diffusers_version": "0.20.0"}
    assert AutoencoderKL.from_pretrained(copy_with(image_vae, tmp_path / "vae", **ignored)).latent_channels == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_facter": 1.0}, "unknown key 'scaling_facter', did you mean 'scaling_factor'?"),
        ({"latent_channels": "4"}, "latent_channels is '4', but must be like 16"),
        ({"_class_name": "AutoencoderTiny"}, "this configuration is of AutoencoderTiny, not of AutoencoderKL"),
        ({"latent_channels": 8}, "encoder.conv_out.weight (8, 32, 3, 3) instead of (16, 32, 3, 3)"),
        ({"layers_per_block": 2}, "missing: encoder.down_blocks.0.resnets.1.norm1.weight"),
        ({"use_quant_conv": False}, "2 unexpected: quant_conv.bias, quant_conv.weight"),
    ],
)
def test_folders_that_do_not_fit(image_vae: Path, tmp_path: Path, config: dict, message: str) -> None:
    folder = copy_with(image_vae, tmp_path / "vae", **config)
    with pytest.raises(ValueError) as error:
        AutoencoderKL.from_pretrained(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_folders_that_are_incomplete(image_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*config.json: give the folder of a model"):
        AutoencoderKL.from_pretrained(tmp_path)
    folder = copy_with(image_vae, tmp_path / "vae")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{WEIGHTS} was refused: it is damaged"):
        AutoencoderKL.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*; tried: .* holds config.json$"):
        AutoencoderKL.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="_class_name is 'VQModel', but must be one of AutoencoderKL, AutoencoderKLOpen"
    ):
        load_autoencoder(copy_with(image_vae, tmp_path / "other", _class_name="VQModel"))


def test_a_pickle_with_code_is_refused(image_vae: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((image_vae / "config.json").read_text())
    torch.save({"x": Path("/")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin was refused: .* more than tensors"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"down_block_types": ["DownEncoderBlock3D"]}, "must have one entry for each of the 4 block_out_channels"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 4}, "but must be 3D for every one of block_out_channels"),
    ],
)
def test_levels_that_do_not_exist(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderKLOpenSora.from_config(TINY | config)


# Sizes


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (3, 25, 16, 24),
            r"the end of 25 frames would be lost: use 17 or 33 \(any of 1, 5, 9, 13, 17 and 16 n \+ 1 frames does\)",
        ),
        ((3, 16, 16, 24), "the end of 16 frames would be lost: use 13 or 17"),
        ((3, 34, 16, 24), "the end of 34 frames would be lost: use 33 or 49"),
        ((3, 17, 20, 24), "a height of 20 px is no multiple of 8: use 16 or 24"),
        ((3, 1, 16, 4), "a width of 4 px is no multiple of 8: use 8"),
    ],
)
def test_clips_that_are_refused(video_vae: Path, shape: tuple[int, ...], message: str) -> None:
    vae = AutoencoderKLOpenSora.from_pretrained(video_vae)
    with pytest.raises(ValueError, match=message):
        vae.check_size(*shape[1:])
    if "px" in message:
        with pytest.raises(ValueError, match=message):
            vae.encode(torch.zeros(1, *shape))


def test_latents_that_are_refused() -> None:
    tiling = AutoencoderKLOpenSora.tiling
    with pytest.raises(ValueError, match="the end of 6 latent frames would be lost: use 5 or 9"):
        tiling.check_latents(6)
    assert [tiling.whole_latents(length) for length in (1, 4, 5, 6, 8, 9, 10, 13)] == [1, 4, 5, 5, 5, 9, 9, 13]
    assert [AutoencoderKLCogVideoX.tiling.whole_latents(length) for length in (5, 9, 10, 11)] == [5, 5, 10, 10]


@torch.no_grad()
def test_ends_that_fill_no_window_are_dropped_as_in_the_original(video_vae: Path) -> None:
    vae = AutoencoderKLOpenSora.from_pretrained(video_vae)
    clip, latents = torch.randn(1, 3, 25, 16, 24), torch.randn(1, 4, 6, 2, 3)
    parameters, pixels = vae.encode(clip).latent_dist.parameters, vae.decode(latents).sample
    assert parameters.shape == (1, 8, 5, 2, 3) and pixels.shape == (1, 3, 17, 16, 24)
    assert torch.equal(parameters, vae.encode(clip[:, :, :17]).latent_dist.parameters)
    assert torch.equal(pixels, vae.decode(latents[:, :, :5]).sample)


def test_images_that_are_refused(image_vae: Path) -> None:
    vae = AutoencoderKL.from_pretrained(image_vae)
    with pytest.raises(ValueError, match=r"encodes images \(B, 3, H, W\), not \(1, 3, 5, 16, 16\)"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="a height of 12 px is no multiple of 8: use 8 or 16"):
        vae.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="decodes images, but these latents have 2 frames"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="takes images, not clips of 33 frames"):
        vae.check_size(33, 16, 16)


def test_ltx_sizes() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLLTXVideo.from_config(TINY_LTX)
        with pytest.raises(ValueError, match="12 frames are not 8 n \\+ 1: use 9 or 17"):
            vae.encode(torch.zeros(1, 3, 12, 32, 32))
        with pytest.raises(ValueError, match="a width of 40 px is no multiple of 32: use 32 or 64"):
            vae.encode(torch.zeros(1, 3, 9, 32, 40))
        assert vae.encode(torch.zeros(1, 3, 17, 32, 64)).latent_dist.mean.shape == (1, 8, 3, 1, 2)
        assert vae.decode(torch.zeros(1, 8, 3, 1, 2)).sample.shape == (1, 3, 17, 32, 64)
    with pytest.raises(ValueError, match=r"layers_per_block is \(1,\), but must have 5 values"):
        AutoencoderKLLTXVideo.from_config({"layers_per_block": [1]})


@pytest.mark.parametrize(("num_frames", "num_latents"), [(1, 1), (9, 3), (17, 5), (33, 10), (49, 15)])
def test_cogvideox_lengths(num_frames: int, num_latents: int) -> None:
    config = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(config)
        assert vae.encode(torch.zeros(1, 3, num_frames, 8, 16)).latent_dist.mean.shape == (1, 16, num_latents, 1, 2)
        assert vae.decode(torch.zeros(1, 16, num_latents, 1, 2)).sample.shape == (1, 3, num_frames, 8, 16)


# Windows


def test_windows_of_frames() -> None:
    seen = []

    def every_fourth(x: Tensor) -> Tensor:
        seen.append((int(x[0, 0, 0]), int(x[0, 0, -1])))
        return x[:, :, ::4]

    frames = torch.arange(33.0)[None, None]
    assert TemporalTiling().encode(every_fourth, frames).flatten().tolist() == list(range(0, 33, 4))
    assert seen == [(0, 16), (16, 32)]
    assert TemporalTiling(overlap_latents=0).encode(every_fourth, frames).flatten().tolist() == [
        *range(0, 17, 4),
        *range(16, 33, 4),
    ]


def test_windows_of_latents() -> None:
    def four_times(z: Tensor) -> Tensor:
        return (4 * z[..., :1] + torch.arange(4.0 * z.shape[2] - 3)[None, None]) if z.shape[2] > 1 else 4 * z

    latents = torch.arange(9.0)[None, None]
    assert TemporalTiling().decode(four_times, latents).flatten().tolist() == list(range(33))


@pytest.mark.parametrize("causal", [True, False])
def test_convolutions_in_pieces(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    conv = layers.CausalConv3d(2, 3, 3, causal=causal)
    x = torch.randn(1, 2, 11, 4, 4)
    whole = conv(x)
    monkeypatch.setattr(layers, "MAX_CONV_ELEMENTS", 2 * 5 * 4 * 4)
    torch.testing.assert_close(conv(x), whole)
    if causal:  # no frame sees a later one
        torch.testing.assert_close(conv(x[:, :, :6]), whole[:, :, :6])
