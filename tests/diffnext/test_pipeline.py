"""Folders of NOVA pipelines, and the call."""

import json
import shutil
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common.video import load_image, probe_video
from diffnext.models.parameters import frozen_parameters
from diffnext.models.text_encoders.phi import PhiEncoderModel
from diffnext.pipelines import NOVAPipeline, load_components
from diffnext.pipelines.nova.pipeline_train_t2i import NOVATrainT2IPipeline
from diffnext.pipelines.nova.pipeline_train_t2v import NOVATrainT2VPipeline
from diffnext.pipelines.nova_pipeline import fit_image
from diffnext.utils import export_to_image, export_to_video

FEW = {"num_inference_steps": 3, "num_diffusion_steps": 2, "disable_progress_bar": True}


@pytest.fixture(scope="module")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_nova_checkpoint(tmp_path_factory.mktemp("nova") / "t2i", "t2i")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_nova_checkpoint(tmp_path_factory.mktemp("nova") / "t2v", "t2v")


@pytest.fixture(scope="module")
def images(t2i: Path) -> NOVAPipeline:
    return NOVAPipeline.from_pretrained(t2i)


@pytest.fixture(scope="module")
def videos(t2v: Path) -> NOVAPipeline:
    return NOVAPipeline.from_pretrained(t2v)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pipelines_that_configurations_name(t2v: Path) -> None:
    for pipeline_class, kind in ((NOVATrainT2IPipeline, "t2i"), (NOVATrainT2VPipeline, "t2v")):
        model = pipeline_class.from_pretrained(t2v, vae=False, text_encoder=False).transformer
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        everything = {name for name, _ in model.named_parameters()}
        assert learning == everything - set(frozen_parameters(model, kind)) != everything and model.training


# Calls ----------------------------------------------------------------------------------------------------------------


def test_images(images: NOVAPipeline) -> None:
    result = images(["a fox", "snow"], num_images_per_prompt=2, generator=seeded(), **FEW)
    assert result.frames is None and [image.size for image in result.images] == [(64, 64)] * 4
    again = images(["a fox", "snow"], num_images_per_prompt=2, generator=seeded(), output_type="np", **FEW).images
    assert again.dtype == np.uint8 and again.shape == (4, 64, 64, 3)
    assert all(np.array_equal(image, array) for image, array in zip(result.images, again, strict=True))
    tensor = images("a fox", generator=seeded(), output_type="pt", **FEW).images
    assert tensor.dtype == torch.uint8 and tensor.shape == (1, 64, 64, 3)


def test_videos(videos: NOVAPipeline) -> None:
    result = videos("a fox", max_latent_length=5, generator=seeded(), **FEW)
    assert result.images is None and result.frames.shape == (1, 17, 64, 96, 3) and result.frames.dtype == np.uint8
    assert videos("a fox", generator=seeded(), **FEW).frames.shape == (1, 1, 64, 96, 3)


def test_latents_and_embeddings_at_any_guidance(images: NOVAPipeline) -> None:
    embeds = torch.randn(3, 32, generator=seeded())
    for scale in (0.5, 1, 3):
        latents = images(
            prompt_embeds=[embeds], guidance_scale=scale, generator=seeded(), output_type="latent", **FEW
        ).frames
        assert latents.shape == (1, 4, 1, 8, 8) and latents.dtype == torch.float32
    other = images(
        prompt_embeds=[embeds], negative_prompt_embeds=[-embeds], generator=seeded(), output_type="latent", **FEW
    ).frames
    same = images([embeds], negative_prompt=[-embeds], generator=seeded(), output_type="latent", **FEW).frames
    assert torch.equal(other, same) and not torch.allclose(other, latents)


def test_a_negative_prompt_counts(images: NOVAPipeline) -> None:
    without, with_one = (
        images("a fox", negative_prompt=text, generator=seeded(), output_type="latent", **FEW).frames
        for text in (None, "snow")
    )
    assert not torch.allclose(without, with_one, atol=1e-3)
    empty = images("a fox", negative_prompt="", generator=seeded(), output_type="latent", **FEW).frames
    assert torch.equal(empty, without)


def test_image_to_video(videos: NOVAPipeline) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 200, 3), dtype=np.uint8))
    latents = videos(
        "a fox", max_latent_length=2, image=picture, generator=seeded(), output_type="latent", **FEW
    ).frames
    posterior = videos.vae.encode(
        torch.from_numpy(fit_image(picture, (64, 96))).permute(2, 0, 1)[None].float() / 127.5 - 1
    ).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=seeded())
    expected = posterior.sample(noise=noise) * videos.vae.config.scaling_factor
    torch.testing.assert_close(latents[:, :, 0], expected.detach())
    given = videos("a fox", max_latent_length=2, latents=[expected], generator=seeded(), output_type="latent", **FEW)
    assert torch.equal(given.frames[:, :, 0], expected)


def test_an_image_is_cut_to_the_aspect_and_resized() -> None:
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 10:30] = 200  # the centre of a 1:2 image is all of it
    assert np.array_equal(fit_image(pixels, (10, 20)), np.full((10, 20, 3), 200, np.uint8))
    assert fit_image(Image.new("L", (7, 90)), (64, 96)).shape == (64, 96, 3)
    with pytest.raises(ValueError, match=r"must be PIL or uint8 \(H, W, 3\), got float64 \(2, 2\)"):
        fit_image(np.zeros((2, 2)), (8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either prompt or prompt_embeds"),
        ({"prompt": []}, "there are no prompts"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type is 'jpg', but must be pil, np, pt or latent"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0, but must be at least 1"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "there are 2 negative prompts for 3 prompts"),
        ({"prompt": "a", "max_latent_length": 9}, "max_latent_length is 9, but this model makes single images"),
        ({"prompt": "a", "image": Image.new("RGB", (8, 8))}, "the given frames leave nothing to generate: raise it"),
        ({"prompt": "a", "spatiotemporal_guidance_scale": 1.0}, "this model does not have, so it would only cost"),
    ],
)
def test_calls_that_cannot_be(images: NOVAPipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        images(**options)
    assert message in str(error.value)


def test_lengths_that_the_vae_would_cut_are_refused_before_the_work(videos: NOVAPipeline) -> None:
    with pytest.raises(ValueError, match="the end of 7 latent frames would be lost: use 5 or 9"):
        videos("a fox", max_latent_length=7)


def test_without_a_vae_there_are_latents(images: NOVAPipeline) -> None:
    bare = NOVAPipeline(images.transformer, images.scheduler)
    with pytest.raises(ValueError, match="this pipeline has no VAE"):
        bare(prompt_embeds=[torch.zeros(1, 32)])
    assert bare(prompt_embeds=[torch.zeros(1, 32)], output_type="latent", **FEW).frames.shape == (1, 4, 1, 8, 8)
    with pytest.raises(ValueError, match="the prompt 'fox' needs a text encoder"):
        bare("fox", output_type="latent")


def test_results_that_are_not_finite_are_refused(t2i: Path) -> None:
    pipeline = NOVAPipeline.from_pretrained(t2i)
    pipeline.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the result is not finite: use bf16 or float32 instead of fp16"):
        pipeline("a fox", **FEW)


def test_half_precision_runs(t2v: Path) -> None:
    pipeline = NOVAPipeline.from_pretrained(t2v, torch_dtype=torch.bfloat16, trust_remote_code=True).to("cpu")
    assert pipeline.text_encoder.dtype == pipeline.transformer.mask_embed.bos_token.dtype == torch.bfloat16
    assert pipeline("a fox", max_latent_length=2, generator=seeded(), **FEW).frames.shape == (1, 5, 64, 96, 3)


# Folders --------------------------------------------------------------------------------------------------------------


def changed(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_saved_pipelines_load_again(videos: NOVAPipeline, tmp_path: Path) -> None:
    videos.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "NOVAPipeline" and index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["vae"] == ["diffnext.models.autoencoders.autoencoder_kl_opensora", "AutoencoderKLOpenSora"]
    loaded = NOVAPipeline.from_pretrained(tmp_path)
    options = {"max_latent_length": 2, "output_type": "latent", **FEW}
    first, second = (each("a fox", generator=seeded(), **options).frames for each in (videos, loaded))
    assert torch.equal(first, second)
    NOVAPipeline(videos.transformer, videos.scheduler).save_pretrained(tmp_path / "bare")
    bare = NOVAPipeline.from_pretrained(tmp_path / "bare")
    assert bare.vae is bare.text_encoder is bare.tokenizer is None


def test_module_dict_replaces_and_leaves_out(t2i: Path, t2v: Path, tmp_path: Path) -> None:
    parts = load_components(t2i, {"vae": str(t2v / "vae"), "text_encoder": "", "tokenizer": None})
    assert type(parts.vae).__name__ == "AutoencoderKLOpenSora" and parts.text_encoder is parts.tokenizer is None
    # A checkpoint that holds a transformer only, the rest from elsewhere.
    shutil.copytree(t2i / "transformer", tmp_path / "checkpoint-5" / "transformer")
    rest = {name: str(t2i / name) for name in ("scheduler", "text_encoder", "tokenizer", "vae")}
    parts = load_components(tmp_path / "checkpoint-5", {**rest, "model_index": str(t2i / "model_index.json")})
    assert parts.tokenizer("ab").input_ids and parts.vae_config.scaling_factor == 0.13025
    assert parts.scheduler_config["_class_name"] == "FlowMatchEulerDiscreteScheduler"


def test_only_the_settings_of_the_vae_and_no_text_encoder(t2i: Path, tmp_path: Path) -> None:
    folder = changed(t2i, tmp_path / "light")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / "text_encoder")
    parts = load_components(folder, vae=False, text_encoder=False)
    assert parts.vae is None and parts.vae_config.scaling_factor == 0.13025 and parts.text_encoder is None
    with pytest.raises(FileNotFoundError, match="no text_encoder at .*light/text_encoder: a NOVA pipeline has the"):
        load_components(folder, vae=False)


def test_given_settings_keep_the_others_of_the_checkpoint(t2v: Path, tmp_path: Path) -> None:
    folder = changed(t2v, tmp_path / "mixer")
    pipeline = NOVAPipeline.from_pretrained(t2v)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    model = type(pipeline.transformer).from_config({**config, "video_mixer_rank": 4})
    model.save_pretrained(folder / "transformer")
    parts = load_components(folder, module_config={"transformer": {"video_base_size": [9, 2, 3]}})
    assert parts.transformer.config.video_mixer_rank == 4 and parts.transformer.config.video_base_size == (9, 2, 3)
    assert torch.equal(parts.transformer.mask_embed.bos_token, model.mask_embed.bos_token)


def test_new_weights_are_asked_for(t2i: Path, tmp_path: Path) -> None:
    folder = changed(t2i, tmp_path / "new")
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["mask_embed.bos_token"].float()
    assert not torch.equal(load_components(folder, random_transformer=True).transformer.mask_embed.bos_token, stored)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(FileNotFoundError, match="no transformer at"):
        load_components(folder)
    with pytest.raises(ValueError, match="new weights for a transformer need its settings: give module_config.transf"):
        load_components(folder, random_transformer=True)
    made = load_components(folder, module_config={"transformer": settings}, random_transformer=True).transformer
    assert made.text_embed.weight.std() == pytest.approx(0.02, rel=0.1)


def test_averaged_weights_load(t2i: Path, tmp_path: Path) -> None:
    """Their config.json also holds the counters of the average."""
    shutil.copytree(t2i / "transformer", tmp_path / "transformer_ema")
    path = tmp_path / "transformer_ema" / "config.json"
    counters = {"decay": 0.97, "optimization_step": 3, "use_ema_warmup": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | counters))
    load_components(t2i, {"transformer": str(tmp_path / "transformer_ema")}, vae=False, text_encoder=False)


def test_what_a_folder_lacks_is_said(t2i: Path, t2v: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a model that can be had"):
        load_components(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="module_dict or module_config names unet; the first may hold transformer"):
        load_components(t2i, {"unet": "x"})
    with pytest.raises(ValueError, match="model_index.json leaves out the scheduler, which is always needed"):
        load_components(t2i, {"scheduler": ""})
    with pytest.raises(FileNotFoundError, match="no .*x.json, which module_dict names as model_index"):
        load_components(t2i, {"model_index": str(tmp_path / "x.json")})
    folder = changed(t2i, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["__vae__", "AutoencoderTiny"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="the class of .*vae is 'AutoencoderTiny', but must be one of AutoencoderKL,"):
        load_components(folder)
    wide = make_wide_vae(t2v, tmp_path / "wide")
    with pytest.raises(ValueError, match="the VAE has 8 latent channels and stride 8, but the transformer image_dim 4"):
        NOVAPipeline.from_pretrained(t2i, module_dict={"vae": str(wide)})


def make_wide_vae(t2v: Path, folder: Path) -> Path:
    from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora

    config = json.loads((t2v / "vae" / "config.json").read_text()) | {"latent_channels": 8}
    AutoencoderKLOpenSora.from_config(config).save_pretrained(folder)
    return folder


def test_folders_without_an_index_name_their_classes(t2i: Path, tmp_path: Path) -> None:
    folder = changed(t2i, tmp_path / "plain")
    (folder / "model_index.json").unlink()
    assert type(load_components(folder).vae).__name__ == "AutoencoderKL"


def test_text_encoders_that_do_not_fit_are_refused(t2i: Path, tmp_path: Path) -> None:
    encoder = PhiEncoderModel.from_pretrained(t2i / "text_encoder", dtype=torch.float32)
    assert encoder.config.rope_parameters["partial_rotary_factor"] == 0.4
    encoder.save_pretrained(tmp_path / "phi")
    path = tmp_path / "phi" / "model.safetensors"
    # As released: rotary settings in config.json itself.
    config = json.loads((tmp_path / "phi" / "config.json").read_text())
    config |= {"partial_rotary_factor": 0.25, "rope_theta": 500.0, "architectures": ["PhiEncoderModel"]}
    del config["rope_parameters"]
    (tmp_path / "phi" / "config.json").write_text(json.dumps(config))
    loaded = PhiEncoderModel.from_pretrained(tmp_path / "phi")
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert loaded.config.rope_parameters["rope_theta"] == 500.0
    state = load_file(path)
    state["model.extra"] = state.pop("model.final_layernorm.bias")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: model.final_layernorm.bias; 1 unexpected: model.extra"):
        PhiEncoderModel.from_pretrained(tmp_path / "phi")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="the text encoder in .*phi cannot be loaded"):
        PhiEncoderModel.from_pretrained(tmp_path / "phi")
    with pytest.raises(FileNotFoundError, match="no .*config.json: give the folder of a Phi text encoder"):
        PhiEncoderModel.from_pretrained(tmp_path / "none")


# Files ----------------------------------------------------------------------------------------------------------------


def test_export(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    path = export_to_image(Image.fromarray(pixels[0]), tmp_path / "new" / "a.png")
    assert np.array_equal(load_image(path), pixels[0])
    assert export_to_image(pixels[0]).endswith(".webp")
    video = export_to_video(pixels, tmp_path / "a.mp4")
    info = probe_video(video)
    assert (info.num_frames, info.fps, info.width_px) == (5, 12, 24)
    assert probe_video(export_to_video([Image.fromarray(each) for each in pixels], fps=6)).fps == 6
