import json
import os
import re
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXImageToVideoPipeline,
    DDIMScheduler,
    StableDiffusionImageVariationPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPTokenizer

from diffnext.models.autoencoders import load_autoencoder
from training_ggi.models.base_lora import fuse, read_lora_file
from training_ggi.models.edges import edge_clip, load_hed, load_midas
from training_ggi.models.raft import clip_flow, load_raft
from training_ggi.models.transformer import check_video_size, load_transformer

SHARED = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared"))
KEYS_JSON = SHARED / "specs" / "keys" / "sd21_unclip_unet8.json"
REFERENCE = SHARED / "golden" / "gaussian_refiner" / "tiny_ckpt"
WEIGHTS = ("image_encoder", "image_normalizer", "text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_tiny_checkpoints.make_refiner_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> StableUnCLIPImg2ImgPipeline:
    return StableUnCLIPImg2ImgPipeline.from_pretrained(checkpoint)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def keys_of(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_pipeline_runs(pipeline):
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(photograph, "", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert result.shape == (1, 64, 64, 3)
    assert np.isfinite(result).all()


def test_weights_survive_saving_and_loading_bit_for_bit(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path)
    for name in WEIGHTS:
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys() and len(before) > 1, name
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_the_same_seed_gives_the_same_bytes(checkpoint, tmp_path):
    torch.manual_seed(1234)  # the state of the caller's generator must not matter
    again = make_tiny_checkpoints.make_refiner_checkpoint(tmp_path / "again")
    assert files_of(again) == files_of(checkpoint)


def test_another_seed_changes_all_weights_and_nothing_else(checkpoint, tmp_path):
    first, second = files_of(checkpoint), files_of(make_tiny_checkpoints.make_refiner_checkpoint(tmp_path, seed=1))
    assert first.keys() == second.keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}
    assert len(changed) == len(WEIGHTS)


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    make_tiny_checkpoints.make_refiner_checkpoint(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_unet_keys_do_not_depend_on_the_number_of_input_channels(pipeline):
    wide_input = UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=8).state_dict()
    narrow_input = pipeline.unet.state_dict()
    assert wide_input.keys() == narrow_input.keys()
    differing = [key for key in narrow_input if narrow_input[key].shape != wide_input[key].shape]
    assert differing == ["conv_in.weight"]
    assert narrow_input["conv_in.weight"].shape == (8, 4, 3, 3)
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 184_476


@pytest.mark.skipif(not KEYS_JSON.is_file(), reason=f"no key list of the released model at {KEYS_JSON}")
def test_unet_keys_are_those_of_the_released_model(pipeline):
    assert set(json.loads(KEYS_JSON.read_text())) == set(pipeline.unet.state_dict())


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no reference checkpoint at {REFERENCE}")
def test_files_keys_and_configs_are_those_of_the_reference(checkpoint):
    files, expected = files_of(checkpoint), files_of(REFERENCE)
    assert files.keys() == expected.keys()
    for name in files:
        if name.endswith(".safetensors"):
            assert keys_of(checkpoint / name) == keys_of(REFERENCE / name), name
        elif name.endswith(".json"):
            ours, theirs = json.loads(files[name]), json.loads(expected[name])
            # The libraries add their version, and with time fields of their own.
            assert {key for key in theirs if "version" not in key and ours.get(key) != theirs[key]} == set(), name
        else:
            assert files[name] == expected[name], name


def test_null_prompt_is_padded_with_id_zero(checkpoint):
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    assert ids == [518, 519] + [0] * 75


def test_tokenizer_merges_and_falls_back_to_bytes(checkpoint):
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("low best qu").input_ids) == [
        "<|startoftext|>",
        "low</w>",
        "best</w>",
        "q",
        "u</w>",
        "<|endoftext|>",
    ]


def test_fitted_vae_reconstructs_photographs(checkpoint, tmp_path, capsys):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    threads = torch.get_num_threads()
    make_tiny_checkpoints.make_refiner_checkpoint(tmp_path, vae_fit_steps=40)
    assert torch.get_num_threads() == threads
    psnr_db = float(capsys.readouterr().out.removeprefix("VAE after 40 steps: ").split()[0])
    assert psnr_db > 20

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.state_dict().keys() == AutoencoderKL.from_pretrained(checkpoint / "vae").state_dict().keys()
    photographs = make_tiny_checkpoints._photographs()
    with torch.no_grad():
        posteriors = [vae.encode(pixels).latent_dist for pixels in photographs]
    latents = torch.cat([posterior.mode().flatten(2) for posterior in posteriors], dim=2)  # (1, 4, N)
    scaled = latents * vae.config.scaling_factor
    torch.testing.assert_close(scaled.mean((0, 2)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2)), torch.ones(4), atol=1e-4, rtol=0)
    assert {float(value) for posterior in posteriors for value in posterior.logvar.unique()} == {-8.0}


def test_the_other_components_do_not_depend_on_the_fit(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(make_tiny_checkpoints, "fit_vae", lambda *arguments, **settings: 0.0)
    fitted, plain = (
        files_of(make_tiny_checkpoints.make_refiner_checkpoint(tmp_path, vae_fit_steps=1)),
        files_of(checkpoint),
    )
    assert {name for name in plain if plain[name] != fitted[name]} == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_command_line_writes_the_named_trainers(tmp_path, checkpoint, capsys):
    make_tiny_checkpoints.main(["--output", str(tmp_path), "--only", "gaussian_refiner"])
    assert capsys.readouterr().out == f"{tmp_path / 'gaussian_refiner'}\n"
    assert files_of(tmp_path / "gaussian_refiner") == files_of(checkpoint)


def test_command_line_refuses_negative_steps(capsys):
    with pytest.raises(SystemExit):
        make_tiny_checkpoints.main(["--vae_fit_steps", "-1"])
    assert "--vae_fit_steps is -1; it must be 0 (random VAE) or more" in capsys.readouterr().err


# diffnext


@pytest.mark.parametrize("kind", ["t2i", "t2v"])
def test_nova_checkpoints_have_the_released_layout(kind, tmp_path):
    folder = make_tiny_checkpoints.make_nova_checkpoint(tmp_path / "first", kind)
    torch.manual_seed(1234)
    again = files_of(make_tiny_checkpoints.make_nova_checkpoint(tmp_path / "again", kind))
    assert files_of(folder) == again
    other = files_of(make_tiny_checkpoints.make_nova_checkpoint(tmp_path / "other", kind, seed=1))
    assert {name for name in again if again[name] != other[name]} == {n for n in again if n.endswith(".safetensors")}

    index = json.loads((folder / "model_index.json").read_text())
    vae, scheduler = {
        "t2i": ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler"),
        "t2v": ("AutoencoderKLOpenSora", "DDPMScheduler"),
    }[kind]
    assert index["vae"] == ["__vae__", vae] and index["scheduler"] == ["diffusers", scheduler]
    assert index["transformer"] == ["__transformer__", "NOVATransformer3DModel"]
    assert (folder / "text_encoder" / "model-00002-of-00002.safetensors").is_file()
    assert {"vae/__vae__.py", "transformer/__transformer__.py", "text_encoder/__text_encoder__.py"} < set(again)


@pytest.mark.parametrize(("kind", "name"), [("t2i", "d48w1024_sdxl1024"), ("t2v", "d48w1024_osp480")])
def test_nova_keys_are_those_of_the_released_model_but_for_the_depth(kind, name, tmp_path):
    expected = SHARED / "specs" / "keys" / f"nova_{name}_transformer.json"
    if not expected.is_file():
        pytest.skip(f"no key list of the released model at {expected}")
    folder = make_tiny_checkpoints.make_nova_checkpoint(tmp_path, kind)
    keys = keys_of(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    without_depth = {re.sub(r"blocks\.\d+", "blocks.N", key) for key in json.loads(expected.read_text())}
    assert {re.sub(r"blocks\.\d+", "blocks.N", key) for key in keys} == without_depth


def test_nova_text_is_bytes_and_nothing_has_no_tokens(tmp_path):
    make_tiny_checkpoints.write_phi_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__.startswith("CodeGenTokenizer")
    ids = tokenizer(["a b", ""], max_length=2, truncation=True).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["a", "\u0120"] and ids[1] == []


def test_command_line_writes_nova(tmp_path, capsys):
    make_tiny_checkpoints.main(["--output", str(tmp_path), "--only", "diffnext_t2i"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "diffnext_t2i")
    assert (tmp_path / "diffnext_t2i" / "model_index.json").is_file()


@pytest.mark.parametrize("kind", ["t2i", "t2v"])
def test_vaes_of_nova_start_as_averages_of_pixels(kind, tmp_path, monkeypatch):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    fit = {"batch_size": 1, "short_side_px": 96, "learning_rate": 0.0}
    monkeypatch.setattr(make_tiny_checkpoints, "NOVA_VAE_FIT", fit)
    make_tiny_checkpoints.make_nova_checkpoint(tmp_path, kind, vae_fit_steps=1)
    vae = load_autoencoder(tmp_path / "vae")
    frames = torch.tensor([0.5, 0.0, -0.5]).reshape(1, 3, 1, 1, 1).expand(1, 3, 5, 64, 64)
    with torch.no_grad():
        clip = vae.decode(vae.encode(frames if kind == "t2v" else frames[:, :, 0]).latent_dist.mean).sample
    centre = clip[0, ..., 32, 32].reshape(3, -1)  # (3, T)
    assert torch.allclose(centre, torch.tensor([[0.5], [0.0], [-0.5]]), atol=0.05)


# mvdiffusion


@pytest.fixture(scope="module")
def variations(tmp_path_factory) -> Path:
    return make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path_factory.mktemp("tiny") / "variations")


def test_image_variation_pipeline_runs(variations):
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(variations)
    pipeline.set_progress_bar_config(disable=True)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    result = pipeline(photograph, num_inference_steps=2, height=64, width=64, output_type="np").images
    assert result.shape == (1, 64, 64, 3) and np.isfinite(result).all()
    assert pipeline.image_encoder.config.projection_dim == pipeline.unet.config.cross_attention_dim == 32
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 392_056


def test_ddim_reads_the_variations_schedule(variations):
    config = DDIMScheduler.from_pretrained(variations / "scheduler").config
    expected = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    expected |= dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")
    assert {key: config[key] for key in expected} == expected


def test_variations_weights_follow_from_the_seed(variations, tmp_path):
    torch.manual_seed(1234)
    again = files_of(make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path / "again"))
    other = files_of(make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path / "other", seed=1))
    assert again == files_of(variations)
    assert {name for name in again if again[name] != other[name]} == {n for n in again if n.endswith(".safetensors")}


def test_variations_unet_keys_are_those_of_the_released_model(variations):
    path = SHARED / "specs" / "keys" / "mvunet_wonder3d.json"
    if not path.is_file():
        pytest.skip(f"no key list of the released model at {path}")
    added = re.compile(r"class_embedding|joint")  # by the multi-view model
    released = {key for key in json.loads(path.read_text())["params"] if not added.search(key)}
    assert keys_of(variations / "unet" / "diffusion_pytorch_model.safetensors") == released


def test_variations_vae_is_fitted_on_objects(tmp_path, capsys):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    make_tiny_checkpoints.main(["--output", str(tmp_path), "--only", "mvdiffusion", "--vae_fit_steps", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "mvdiffusion")
    assert float(lines[-2].removeprefix("VAE after 20 steps: ").removesuffix(" dB mean PSNR on the pictures")) > 12


def test_object_pictures_show_unit_normals_and_photographs_on_even_backgrounds():
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    pictures = make_tiny_checkpoints.object_pictures(8)
    assert {tuple(picture.shape) for picture in pictures} == {(1, 3, 64, 64)}
    for index, picture in enumerate(pictures):
        assert picture.abs().max() <= 1 + 1e-6 and picture[0, :, 0, 0].unique().numel() == 1
        inside = (picture != picture[:, :, :1, :1]).any(1)[0]  # (64, 64)
        assert 0.04 < inside.float().mean() < 0.7
        if index % 2 == 0:
            assert torch.allclose(picture[0].norm(dim=0)[inside], torch.ones(()), atol=1e-5)


# training_ggi


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory) -> Path:
    return make_tiny_checkpoints.make_ggi_checkpoint(tmp_path_factory.mktemp("tiny") / "cogvideox")


def test_image_to_video_pipeline_runs(cogvideox):
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(cogvideox)
    pipeline.set_progress_bar_config(disable=True)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    settings = dict(height=64, width=96, num_frames=17, num_inference_steps=2, output_type="np")
    frames = pipeline(photograph, "a room", **settings).frames
    assert frames.shape == (1, 17, 64, 96, 3) and np.isfinite(frames).all()
    assert sum(parameter.numel() for parameter in pipeline.transformer.parameters()) == 323_968
    tokens = pipeline.tokenizer("a b\u00e9", padding="max_length", max_length=226, truncation=True).input_ids
    assert pipeline.tokenizer.convert_ids_to_tokens(tokens[:6]) == ["\u2581", "a", "\u2581", "b", "<unk>", "</s>"]
    assert tokens[6:] == [0] * 220
    with torch.no_grad():
        posterior = pipeline.vae.encode(torch.rand(1, 3, 5, 64, 96) * 2 - 1).latent_dist
    assert posterior.mean.shape == (1, 16, 2, 8, 12) and 0.5 < 0.7 * posterior.mean.std() < 1.5
    assert (posterior.logvar == -8).all()


def test_cogvideox_weights_follow_from_the_seed(cogvideox, tmp_path):
    torch.manual_seed(1234)
    again = files_of(make_tiny_checkpoints.make_ggi_checkpoint(tmp_path / "again"))
    other = files_of(make_tiny_checkpoints.make_ggi_checkpoint(tmp_path / "other", seed=1))
    assert again == files_of(cogvideox)
    assert {name for name in again if again[name] != other[name]} == {n for n in again if n.endswith(".safetensors")}
    assert {"tokenizer/tokenizer.json", "text_encoder/model-00002-of-00002.safetensors"} < set(again)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ggi_cogvideox5b_i2v_transformer_in32", "transformer/diffusion_pytorch_model.safetensors"),
        ("ggi_cogvideox_vae", "vae/diffusion_pytorch_model.safetensors"),
        ("ggi_base_lora_file_r2048", make_tiny_checkpoints.GGI_BASE_LORA),
        ("ggi_raft_large", make_tiny_checkpoints.GGI_FLOW),
        ("ggi_hed_annotator", make_tiny_checkpoints.GGI_EDGES),
    ],
)
def test_ggi_keys_are_those_of_the_released_files_but_for_the_depth(name, file, cogvideox):
    expected = SHARED / "specs" / "keys" / f"{name}.json"
    if not expected.is_file():
        pytest.skip(f"no key list of the released file at {expected}")
    without_depth = {re.sub(r"r_blocks\.\d+", "r_blocks.N", key) for key in json.loads(expected.read_text())}
    assert {re.sub(r"r_blocks\.\d+", "r_blocks.N", key) for key in keys_of(cogvideox / file)} == without_depth


def test_the_trainer_reads_the_miniatures(cogvideox, tmp_path):
    transformer = load_transformer(cogvideox, torch_dtype=torch.float32)
    assert check_video_size(transformer, 17, 64, 96) == (5, 8, 12)
    lora = read_lora_file(cogvideox / make_tiny_checkpoints.GGI_BASE_LORA, transformer)
    assert (lora.rank, lora.scale, lora.dtype) == (8, 1.0, torch.bfloat16)
    fuse(transformer, lora)
    larger = make_tiny_checkpoints.make_ggi_checkpoint(tmp_path, num_frames=49, height_px=256, width_px=384)
    assert check_video_size(load_transformer(larger), 49, 256, 384) == (13, 32, 48)


def test_the_annotators_draw_edges_and_see_hardly_any_motion(cogvideox):
    frames = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    frames[:, :, 40:] = 200
    hed = load_hed(cogvideox / make_tiny_checkpoints.GGI_EDGES)
    edges = edge_clip("hed", frames, hed, detect_resolution=64)  # (2, 64, 96)
    assert edges[:, 2:-2, 39:41].min() > 240 and edges[:, 2:-2, 3:37].max() < 10 and edges[:, 2:-2, 43:-3].max() < 10
    midas = load_midas(cogvideox / make_tiny_checkpoints.GGI_DEPTH)
    assert edge_clip("depth_hed", frames, hed, midas, detect_resolution=64).shape == (2, 64, 96)
    raft = load_raft(cogvideox / make_tiny_checkpoints.GGI_FLOW)
    flow = clip_flow(raft, torch.rand(1, 2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert flow.isfinite().all() and 0 < flow.abs().max() < 8


def test_command_line_writes_cogvideox(tmp_path, capsys):
    make_tiny_checkpoints.main(["--output", str(tmp_path), "--only", "training_ggi"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "training_ggi")
    assert (tmp_path / "training_ggi" / "model_index.json").is_file()
