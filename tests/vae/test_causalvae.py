"""CausalVAE and WFVAE2: names of weights, sizes, tiling, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from vae.models.base import Autoencoder
from vae.models.causalvae import CausalVAE, CausalVAEConfig
from vae.models.load import build_model, load_model
from vae.models.wfvae2 import WFVAE2, WFVAE2Config

KEYS_DIR = Path(__file__).resolve().parents[3] / "shared" / "specs" / "keys"
TINY = CausalVAEConfig(hidden_size=32, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1)
TINY2 = WFVAE2Config(base_channels=(4, 6, 8), encoder_energy_flow_size=4, decoder_energy_flow_size=4)


def tiny(config: CausalVAEConfig | WFVAE2Config, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return (CausalVAE if isinstance(config, CausalVAEConfig) else WFVAE2)(config).eval()


def video(num_frames: int, height_px: int = 16, width_px: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, num_frames, height_px, width_px, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Names and sizes.


@pytest.mark.skipif(not KEYS_DIR.is_dir(), reason=f"no {KEYS_DIR}")
@pytest.mark.parametrize(
    ("name", "file", "num_parameters"),
    [("CausalVAE", "causalvae_default", 229_169_895), ("WFVAE2", "wfvae2_attnfix_default", None)],
)
def test_state_dict_names(name: str, file: str, num_parameters: int | None) -> None:
    with torch.device("meta"):
        model = build_model(name, json.loads((KEYS_DIR / f"{file}.config.json").read_text()))
        assert model.config == type(model)().config  # the files hold the defaults
    expected = json.loads((KEYS_DIR / f"{file}.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert num_parameters is None or sum(p.numel() for p in model.parameters()) == num_parameters


def test_encoder_attention_keeps_groupnorm() -> None:
    names = tiny(CausalVAEConfig(hidden_size=8, norm_type="layernorm")).state_dict()
    assert "encoder.mid.attn_1.norm.weight" in names and "decoder.mid.attn_1.norm.norm.weight" in names


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["CausalVAE", "WFVAE2"])
@torch.no_grad()
def test_shapes_and_modules(config: CausalVAEConfig | WFVAE2Config) -> None:
    model = tiny(config)
    x = video(9, 16, 24)
    assert model.latent_shape(9, 16, 24) == (4, 3, 2, 3) == tuple(model.encode(x).mean.shape[1:])
    output = model(x, noise=torch.zeros(1, 4, 3, 2, 3))
    assert output.sample.shape == x.shape and output.moments.shape == (1, 8, 3, 2, 3) and output.coefficients == ()
    assert torch.equal(output.sample, model(x).sample)  # noise of 0 is the mode
    assert not model.has_wavelet_coefficients
    assert any(model.last_layer is p for p in model.parameters())
    listed = [id(p) for m in model.encoder_modules() + model.decoder_modules() for p in m.parameters()]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_last_layer_gets_the_gradient() -> None:
    for config in (TINY, TINY2):
        model = tiny(config)
        model(video(5)).sample.sum().backward()
        assert model.last_layer.grad.abs().sum() > 0


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["CausalVAE", "WFVAE2"])
def test_sizes_are_checked(config: CausalVAEConfig | WFVAE2Config) -> None:
    model = tiny(config)
    model.check_size(1, 8, 800)
    with pytest.raises(ValueError, match=r"6 frames are not 4 n \+ 1: use 5 or 9; a width of 20 px .*use 16 or 24"):
        model.check_size(6, 16, 20)
    with pytest.raises(ValueError, match=r"6 frames are not 4 n \+ 1"):
        model(video(6))


def test_factors_follow_from_the_configuration() -> None:
    config = CausalVAEConfig(
        encoder_spatial_downsample=("Downsample", "Spatial2xTime2x3DDownsample", "", ""),
        encoder_temporal_downsample=("", "", "TimeDownsampleRes2x", ""),
        decoder_spatial_upsample=("", "", "Spatial2xTime2x3DUpsample", "Upsample"),
        decoder_temporal_upsample=("", "TimeUpsample2x", "", ""),
    )
    assert (config.spatial_factor, config.temporal_factor) == (4, 4)
    image = WFVAE2Config(
        layer_type=("hw",), layer_res_type=("ResnetBlock2D",), base_channels=(8, 8), input_type="image"
    )
    assert (image.spatial_factor, image.temporal_factor) == (4, 1)
    with torch.no_grad():
        assert tiny(image)(video(3)).sample.shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize("config", [TINY, TINY2], ids=["CausalVAE", "WFVAE2"])
@torch.no_grad()
def test_round_trip_through_a_folder(config: CausalVAEConfig | WFVAE2Config, tmp_path: Path) -> None:
    model = tiny(config)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == config
    assert torch.equal(again(video(5)).sample, model(video(5)).sample)


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_attention": "LinAttnBlock"},
            "encoder_attention names 'LinAttnBlock'; choose one of 'AttnBlock3D', ",
        ),
        ({"encoder_mid_resnet": ""}, "encoder_mid_resnet names ''; choose one of 'ResnetBlock2D', 'ResnetBlock3D'"),
        ({"decoder_resnet_blocks": ["ResnetBlock3D"]}, "decoder_resnet_blocks has 1 entries, .* has 4 levels"),
        ({"encoder_spatial_downsample": ["", "", "", ""]}, "divides height and width by 1, the decoder .* it by 8"),
        ({"decoder_temporal_upsample": ["", "", "", ""]}, "encoder divides time by 4, the decoder multiplies it by 1"),
        ({"double_z": False}, "double_z is false, but the encoder must give means and log variances"),
        ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm'; choose one of groupnorm, layernorm"),
        ({"hidden_sise": 8}, "unknown key 'hidden_sise', did you mean 'hidden_size'"),
    ],
)
def test_what_a_causalvae_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model("CausalVAE", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_channels": [8, 8]}, "base_channels has 2 entries, but 2 levels in layer_type need 3"),
        ({"decoder_base_channels": [8]}, "decoder_base_channels has 1 entries, .* need 3"),
        ({"layer_type": ["hw", "t"]}, "layer_type names 't'; choose one of 'hw', 'thw'"),
        ({"input_type": "audio"}, "input_type names 'audio'; choose one of 'video', 'image'"),
        ({"decoder_num_resblocks": 1}, "decoder_num_resblocks is 1, but must be at least 2"),
    ],
)
def test_what_a_wfvae2_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_model("WFVAE2", options)


def test_the_class_that_the_original_lacks_is_its_fixed_attention() -> None:
    with torch.device("meta"):
        named = build_model("WFVAE2", {"mid_layers_type": ["ResnetBlock3D", "Attention3DFix", "ResnetBlock3D"]})
        assert named.state_dict().keys() == WFVAE2().state_dict().keys()


def test_wfvae2_has_no_chunked_mode() -> None:
    with pytest.raises(ValueError, match="WFVAE2 cannot encode in chunks: leave tiling disabled"):
        tiny(TINY2).enable_tiling()


# Tiling of CausalVAE.


@torch.no_grad()
def test_tiling_leaves_small_clips_alone_and_keeps_shapes() -> None:
    model = tiny(TINY)
    x = video(21, 32, 24)
    whole = model(x).sample
    model.enable_tiling(tile_px=32, tile_frames=21, overlap=0.25)
    assert torch.equal(model(x).sample, whole)
    model.enable_tiling(tile_px=16, tile_frames=9, overlap=0.5)
    in_pieces = model(x)
    assert in_pieces.sample.shape == x.shape and in_pieces.moments.shape == (1, 8, 6, 4, 3)
    assert not torch.allclose(in_pieces.sample, whole)
    model.disable_tiling()
    assert torch.equal(model(x).sample, whole)


@pytest.mark.parametrize("num_frames", [13, 17, 21, 25, 29])
@pytest.mark.parametrize("shared_latents", [1, 2, 3])
@torch.no_grad()
def test_runs_of_frames_join_without_gaps(num_frames: int, shared_latents: int) -> None:
    model = tiny(TINY)
    model.enable_tiling(tile_px=256, tile_frames=9, shared_latents=shared_latents)
    # Networks without context: every fourth frame, and each latent four times.
    model._encode = lambda x: x[:, :, ::4].repeat(1, 2, 1, 1, 1)
    model._decode = lambda z: z.repeat_interleave(4, dim=2)[:, :, 3:]
    x = torch.arange(num_frames).float().view(1, 1, -1, 1, 1).expand(1, 3, -1, 16, 16)
    z = model.encode(x).mode()
    assert z[0, 0, :, 0, 0].tolist() == list(range(0, num_frames, 4))
    expected = [0, *(4 * i for i in range(1, (num_frames + 3) // 4) for _ in range(4))]
    assert model.decode(z)[0, 0, :, 0, 0].tolist() == expected


def test_pieces_of_broken_latents_are_refused() -> None:
    model = tiny(TINY)
    with pytest.raises(ValueError, match=r"tile_frames is 8, but must be 4 n \+ 1, n > 0: use 9"):
        model.enable_tiling(tile_frames=8)
    with pytest.raises(ValueError, match="shared_latents is 0, but must be at least 1"):
        model.enable_tiling(shared_latents=0)
    with pytest.raises(ValueError, match="tile_px is 20, but must be a multiple of 8: use 16"):
        model.enable_tiling(tile_px=20)
