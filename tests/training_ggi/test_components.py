"""The frozen parts on a miniature checkpoint: what they answer, and what is said where they are not there."""

import shutil
from pathlib import Path

import make_tiny_checkpoints
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from training_ggi.models import components
from training_ggi.models.components import (
    _tiles_fit,
    decode_video,
    encode_prompts,
    load_scheduler_config,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    video_moments,
)

SIZE = 64, 96


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_checkpoints.make_ggi_checkpoint(tmp_path_factory.mktemp("ggi") / "tiny", num_frames=9))


@pytest.fixture(scope="module")
def vae(base: str):
    return load_vae(base)


def clips(count: int, num_frames: int) -> torch.Tensor:
    return torch.rand(count, num_frames, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_moments_are_those_of_the_vae(vae):
    clip = clips(2, 9)
    moments = video_moments(vae, clip)
    assert moments.shape == (2, 32, 3, 8, 12) and moments.dtype == torch.float32 and not moments.requires_grad
    posterior = vae.encode(clip[1:].transpose(1, 2)).latent_dist
    assert torch.allclose(moments[1:, :16], posterior.mean, atol=1e-5)
    assert torch.equal(video_moments(vae, clip[1:]), posterior.parameters)
    assert video_moments(vae, clip[:, :1]).shape == (2, 32, 1, 8, 12)


def test_the_vae_is_frozen_and_obeys_its_options(base, vae):
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    assert (vae.use_tiling, vae.use_slicing) == (False, False)
    assert load_vae(base, slicing=True).use_slicing


def test_tiles_that_do_not_fit_are_left_out(base, vae, tmp_path, caplog):
    """Of 32 px with a stride of 26, which is no multiple of a latent's 8."""
    small = AutoencoderKLCogVideoX.from_config(dict(vae.config) | {"sample_height": 64, "sample_width": 96})
    small.save_pretrained(tmp_path / "vae")
    assert not load_vae(str(tmp_path), tiling=True).use_tiling
    assert "is made for small frames, which do not divide into tiles: none are used" in caplog.text
    fitting = AutoencoderKLCogVideoX.from_config(dict(vae.config) | {"sample_height": 96, "sample_width": 160})
    fitting.save_pretrained(tmp_path / "vae")
    tiled = load_vae(str(tmp_path), tiling=True)
    assert tiled.use_tiling and video_moments(tiled, clips(1, 1)).shape == (1, 32, 1, 8, 12)
    with torch.device("meta"):
        released = AutoencoderKLCogVideoX()
    assert released.tile_sample_min_height == 240 and _tiles_fit(released)


@pytest.mark.parametrize("latent_frames", [1, 3, 4])
def test_decoding_makes_four_frames_of_a_latent_but_of_the_first_one(vae, latent_frames):
    latents = torch.randn(2, latent_frames, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    clip = decode_video(vae, latents)
    assert clip.shape == (2, 4 * (latent_frames - 1) + 1, 3, 64, 96) and clip.dtype == torch.float32
    assert 0 <= clip.min() < clip.max() <= 1
    if latent_frames == 3:
        expected = vae.decode(latents.transpose(1, 2) / 0.7).sample / 2 + 0.5  # (B, 3, F, H, W)
        assert torch.equal(clip, expected.clamp(0, 1).transpose(1, 2))


def test_prompts_are_padded_or_cut_and_padding_is_attended_to(base):
    tokenizer, text_encoder = load_tokenizer(base), load_text_encoder(base)
    assert not text_encoder.training and not any(p.requires_grad for p in text_encoder.parameters())
    embeds = encode_prompts(tokenizer, text_encoder, ["a cat", "", "long " * 300])
    assert embeds.shape == (3, 226, 32)
    padding = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * 225
    assert torch.equal(embeds[1], text_encoder(torch.tensor([padding])).last_hidden_state[0])
    ids = tokenizer("a cat").input_ids
    assert ids[-1] == tokenizer.eos_token_id
    expected = text_encoder(torch.tensor([ids + [tokenizer.pad_token_id] * (12 - len(ids))])).last_hidden_state
    assert torch.allclose(encode_prompts(tokenizer, text_encoder, ["a cat"], 12), expected, atol=1e-6)


def test_half_precision_spares_the_projections_that_would_overflow(base):
    text_encoder = load_text_encoder(base, dtype=torch.float16)
    kinds = {name.endswith("wo.weight"): p.dtype for name, p in text_encoder.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.float16}
    assert encode_prompts(load_tokenizer(base), text_encoder, ["a cat"]).dtype == torch.float16


def test_the_scheduler_is_what_its_file_says(base):
    config = load_scheduler_config(base)
    assert (config["_class_name"], config["snr_shift_scale"]) == ("CogVideoXDPMScheduler", 1.0)


LOADERS = {
    "vae": (load_vae, "VAE"),
    "text_encoder": (load_text_encoder, "text encoder"),
    "tokenizer": (load_tokenizer, "tokenizer"),
    "scheduler": (load_scheduler_config, "scheduler"),
}


@pytest.mark.parametrize("part", LOADERS)
def test_what_is_missing_is_named(part, base, tmp_path):
    load, name = LOADERS[part]
    with pytest.raises(FileNotFoundError, match=f"the folder {tmp_path}/no, where the {name} is looked for, does not"):
        load(f"{tmp_path}/no")
    (tmp_path / "lora").mkdir()
    with pytest.raises(FileNotFoundError, match=f"the {name} is looked for in .*, but .* has no {part}; it has lora$"):
        load(str(tmp_path))
    if part != "tokenizer":
        (tmp_path / part).mkdir()
        with pytest.raises(FileNotFoundError, match=f"the {name} cannot be loaded from {tmp_path}/{part} "):
            load(str(tmp_path))


def test_a_tokenizer_that_cannot_be_read_asks_for_sentencepiece(base, tmp_path, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("tiktoken is required\nto read")

    shutil.copytree(Path(base) / "tokenizer", tmp_path / "tokenizer")
    monkeypatch.setattr(components.AutoTokenizer, "from_pretrained", fail)
    expected = r"cannot be read \(tiktoken is required\): a spiece.model needs the package sentencepiece \(extra t5"
    with pytest.raises(ValueError, match=expected):
        load_tokenizer(str(tmp_path))
