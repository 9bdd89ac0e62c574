"""The pipeline and the frozen parts: layout of results, independence of objects, guidance, saving and loading."""

import json
import shutil
from pathlib import Path

import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from mvdiffusion.models import components
from mvdiffusion.models.initialise import load_unet
from mvdiffusion.models.layout import from_rows
from mvdiffusion.pipelines import MVDiffusionImagePipeline, generator_noise, load_pipeline
from mvdiffusion.pipelines.mvdiffusion_image import camera_table, denoise_views, fixed_cameras, released_cameras

VIEWS, SIZE_PX, LATENT_PX = 2, 64, 8
FEW = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_mvdiffusion_checkpoint(tmp_path_factory.mktemp("mv") / "tiny")


def build(
    checkpoint: Path, num_views: int = VIEWS, cd_attention_mid: bool = True, **settings
) -> MVDiffusionImagePipeline:
    """A pipeline whose UNet looks at all of its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {"cd_attention_mid": cd_attention_mid, **settings.pop("unet_config", {})}
        options = {"conv_in_init": "copy_random", "unet_config": config}
        unet, _ = load_unet(checkpoint, "unet", num_views=num_views, **options)
        for name, parameter in unet.named_parameters():
            if "joint" in name and "to_out" in name:
                torch.nn.init.normal_(parameter.detach(), std=0.5)
    pipeline = MVDiffusionImagePipeline(
        components.load_vae(str(checkpoint)),
        components.load_image_encoder(str(checkpoint)),
        unet,
        components.load_scheduler(str(checkpoint)),
        components.load_feature_extractor(str(checkpoint)),
        **settings,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> MVDiffusionImagePipeline:
    return build(checkpoint)


def photo(seed: int, size_px: int = SIZE_PX) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


# Results --------------------------------------------------------------------------------------------------------------


def test_normals_come_first(pipeline):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    calls = {
        kind: pipeline([photo(0), photo(1)], generator=seeded(0, 1), output_type=kind, **options)
        for kind in ("pil", "np", "pt", "latent")
    }
    pil, np_, pt, latent = calls.values()
    assert pt.images.shape == (8, 3, SIZE_PX, SIZE_PX) and pt.normals.shape == (2, VIEWS, 3, SIZE_PX, SIZE_PX)
    assert torch.equal(pt.images, torch.cat([pt.normals.flatten(0, 1), pt.colours.flatten(0, 1)]))
    assert 0 <= pt.images.min() and pt.images.max() <= 1 and pt.images.dtype == torch.float32
    assert np.array_equal(np_.colours, pt.colours.movedim(-3, -1).numpy())
    assert latent.images.shape == (8, 4, LATENT_PX, LATENT_PX) and latent.normals.shape[:2] == (2, VIEWS)
    assert [len(row) for row in (pil.images, pil.normals, pil.colours, pil.normals[1])] == [8, 2, 2, VIEWS]
    assert pil.images[3] is pil.normals[1][1] and pil.images[4] is pil.colours[0][0]
    expected = (pt.colours[1, 0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(pil.colours[1][0]), expected)


def test_objects_do_not_depend_on_each_other(pipeline):
    both = pipeline([photo(0), photo(1)], generator=seeded(7, 8), eta=1.0, **FEW)
    for number in (0, 1):
        alone = pipeline(photo(number), generator=seeded(7 + number), eta=1.0, **FEW)
        assert_near(both.normals[number], alone.normals[0])
        assert_near(both.colours[number], alone.colours[0])
    other = pipeline(photo(2), generator=seeded(7), eta=1.0, **FEW)
    assert (other.normals[0] - both.normals[0]).abs().max() > 0.01  # the image counts


def test_several_results_per_image(pipeline):
    twice = pipeline([photo(0), photo(1)], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **FEW)
    again = pipeline(photo(1), generator=seeded(3), **FEW)
    assert twice.images.shape[0] == 2 * 4 * VIEWS
    assert_near(twice.colours[2], again.colours[0])
    one = torch.Generator().manual_seed(5)
    first = pipeline([photo(0), photo(1)], generator=one, **FEW)
    alone = pipeline(photo(0), generator=one.manual_seed(5), **FEW)
    assert_near(first.normals[0], alone.normals[0])
    assert not torch.allclose(first.normals[0], first.normals[1])


def test_images_may_be_tensors_or_transparent(pipeline):
    image = photo(0)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    latents = torch.randn(2 * VIEWS, 4, LATENT_PX, LATENT_PX)
    expected = pipeline(image, latents=latents, **FEW).images
    assert torch.equal(pipeline(pixels, latents=latents, **FEW).images, expected)
    assert torch.equal(pipeline(pixels / 255, latents=latents, **FEW).images, expected)
    image.putalpha(Image.new("L", image.size, 0))
    white = pipeline(Image.new("RGB", image.size, "white"), latents=latents, **FEW).images
    assert torch.equal(pipeline(image, latents=latents, **FEW).images, white)


def test_another_image_may_give_the_condition_latents(pipeline):
    latents = torch.randn(4 * VIEWS, 4, LATENT_PX, LATENT_PX)
    images, others = [photo(0), photo(1)], [photo(2), photo(3)]
    seen = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, inputs, options: seen.append((inputs[0][:, 4:], options["encoder_hidden_states"])), with_kwargs=True
    )
    options = {"latents": latents, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    for condition in (dict(image=images), dict(image=others), dict(image=images, normal_cond=others)):
        pipeline(**condition, **options)
    hook.remove()
    own, other, mixed = seen
    assert torch.equal(mixed[0], other[0]) and torch.equal(mixed[1], own[1])
    assert not torch.equal(other[0], own[0]) and not torch.equal(other[1], own[1])


def test_half_precision(pipeline, checkpoint):
    half = build(checkpoint).to(torch.bfloat16)
    full = pipeline(photo(0), generator=seeded(0), **FEW).images
    difference = (half(photo(0), generator=seeded(0), **FEW).images - full).abs()
    assert 0 < difference.mean() < 0.1


def test_other_sizes(pipeline):
    assert pipeline(photo(0, 80), height=80, width=80, **FEW).images.shape == (2 * VIEWS, 4, 10, 10)


# Guidance -------------------------------------------------------------------------------------------------------------


def record_calls(pipeline, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The UNet's inputs and answers."""
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output[0])))
    pipeline([photo(0), photo(1)], generator=seeded(0, 1), num_inference_steps=1, output_type="latent", **options)
    hook.remove()
    return calls


def test_guidance_costs_nothing_at_1_and_keeps_domains_in_halves(pipeline):
    half = 2 * VIEWS  # rows of one domain
    [(plain_input, plain)] = record_calls(pipeline, guidance_scale=1.0)
    [(sample, guided)] = record_calls(pipeline, guidance_scale=3.0)
    assert len(plain_input) == 2 * half and len(sample) == 4 * half
    quarters = sample.unflatten(0, (4, half))  # normal-uncond, normal-cond, colour-uncond, colour-cond
    assert not quarters[[0, 2], :, 4:].any() and quarters[[1, 3], :, 4:].flatten(2).any(-1).all()
    assert torch.equal(quarters[0, :, :4], plain_input[:half, :4])
    assert torch.equal(quarters[3], plain_input[half:])
    assert_near(guided.unflatten(0, (4, half))[[1, 3]].flatten(0, 1), plain)


def test_the_originals_order_matters_with_joint_attention_only(pipeline, checkpoint):
    options = {"latents": torch.randn(2 * VIEWS, 4, LATENT_PX, LATENT_PX), **FEW}
    without = build(checkpoint, cd_attention_mid=False)
    for pipe, is_equal in ((without, True), (pipeline, False)):
        ours = pipe(photo(0), **options).images
        theirs = pipe(photo(0), cfg_order="upstream", **options).images
        assert torch.allclose(ours, theirs, atol=1e-4) is is_equal


def test_sampling_leaves_things_as_they_were(pipeline):
    condition, asked = pipeline.encode([photo(0)]), []
    draw = generator_noise(seeded(0), VIEWS, (4, LATENT_PX, LATENT_PX))

    def noise(step: int) -> torch.Tensor:
        asked.append(step)
        return draw(step)

    scheduler = DDPMScheduler(prediction_type="v_prediction")
    before = dict(vars(scheduler))
    pipeline.unet.train()
    denoise_views(pipeline.unet, scheduler, condition, noise, num_steps=3)
    assert asked == [0] and pipeline.unet.training and vars(scheduler).keys() == before.keys()
    assert all(vars(scheduler)[name] is value for name, value in before.items())
    pipeline.unet.eval()
    denoise_views(pipeline.unet, scheduler, condition, noise, num_steps=2, eta=0.5)
    assert asked == [0, 0, 1, 2]


# Cameras --------------------------------------------------------------------------------------------------------------


def test_labels_of_views(pipeline, checkpoint):
    assert pipeline.views == ["front", "back"] and pipeline.azimuths[1] == pytest.approx(np.pi, abs=1e-3)
    cameras = [["front", 0.0, 0.0], ["left", 0.1, 4.5]]
    other = build(checkpoint, cameras=cameras)
    labels = other.class_labels(3)
    assert labels["colour"].shape == (3, VIEWS, 10)
    expected = np.array([0, 0.1, 4.5, 0, 1])
    assert labels["colour"][2, 1].numpy() == pytest.approx(
        np.concatenate([np.sin(expected), np.cos(expected)]), abs=1e-6
    )
    assert torch.equal(labels["normal"][..., :3], labels["colour"][..., :3])
    rows = torch.zeros(2 * VIEWS, 5)
    rows[:VIEWS, 3], rows[VIEWS:, 4], rows[[1, 3], 1:3] = 1, 1, torch.tensor([0.1, 4.5])
    given = pipeline.class_labels(3, rows)
    for domain in labels:
        torch.testing.assert_close(given[domain], labels[domain])
    each = pipeline.class_labels(3, from_rows(rows, VIEWS)["normal"].repeat(6, 1, 1).flatten(0, 1))
    assert torch.equal(each["colour"], given["normal"])
    narrow = build(checkpoint, unet_config={"projection_class_embeddings_input_dim": 6})
    assert narrow.class_labels(1)["normal"].shape == (1, VIEWS, 6)
    assert narrow(photo(0), **FEW).images.isfinite().all()


def test_tables_of_cameras():
    names = ("right", "back")
    upright = fixed_cameras(names, "upright")
    assert [name for name, *_ in upright] == ["right", "back"]
    assert [angles for _, *angles in upright] == [pytest.approx([0, np.pi / 2]), pytest.approx([0, np.pi])]
    assert [name for name, *_ in released_cameras(names)] == ["right", "back"]
    assert released_cameras(names)[0][1:] == pytest.approx([-0.1686, 1.6935], abs=2e-4)
    with pytest.raises(ValueError, match="zip"):
        camera_table(["front"], np.tile(np.eye(3, 4), (2, 1, 1)))


# Files ----------------------------------------------------------------------------------------------------------------


def test_saved_pipelines_load_everywhere(pipeline, tmp_path, capfd):
    cameras = [["front", 0.0, 0.0], ["left", 0.25, 4.5]]
    pipeline = MVDiffusionImagePipeline(**pipeline.components, cameras=cameras)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "export")
    expected = pipeline(photo(0), generator=seeded(0), **FEW).images
    capfd.readouterr()
    loaded = [
        MVDiffusionImagePipeline.from_pretrained(tmp_path / "export"),
        DiffusionPipeline.from_pretrained(tmp_path / "export"),
        load_pipeline(str(tmp_path / "export")),
    ]
    warnings = [line for line in capfd.readouterr().err.splitlines() if line and "Loading" not in line]
    assert not any(warnings)
    for each in loaded:
        each.set_progress_bar_config(disable=True)
        assert type(each) is MVDiffusionImagePipeline and each.config.cameras == cameras
        assert_near(each(photo(0), generator=seeded(0), **FEW).images, expected)


def test_released_pipelines_load(checkpoint, tmp_path):
    """Their model_index.json names modules of the original, and their weights may have older names."""
    pipeline = build(checkpoint, num_views=6)
    folder = tmp_path / "wonder3d"
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("cameras", "camera_type", "num_views", "camera_embedding_type"):
        index.pop(name)
    index["unet"] = ["mvdiffusion.models.unet_mv2d_condition", "UNetMV2DConditionModel"]
    index |= {"safety_checker": [None, None], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    for loaded in (
        MVDiffusionImagePipeline.from_pretrained(folder),
        MVDiffusionImagePipeline.from_pretrained(folder, **unchecked),
        MVDiffusionImagePipeline(**pipeline.components, **unchecked),
        load_pipeline(str(folder)),
    ):
        assert loaded.views == ["front", "front_right", "right", "back", "left", "front_left"]
        assert loaded.config.cameras == released_cameras(loaded.views)
        weights = loaded.unet.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in pipeline.unet.state_dict().items())


def test_another_unet(pipeline, checkpoint, tmp_path):
    pipeline.unet.save_pretrained(tmp_path / "checkpoint-5" / "unet")
    for source in (tmp_path / "checkpoint-5", tmp_path / "checkpoint-5" / "unet"):
        loaded = load_pipeline(str(checkpoint), unet=str(source))
        assert loaded.config.num_views == VIEWS
        assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_weights_that_are_not_there_or_not_trained(pipeline, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is one that training starts from: .* tensors are not in it"):
        load_pipeline(str(checkpoint))
    pipeline.save_pretrained(tmp_path / "export")
    file = tmp_path / "export" / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "cd_attention_mid": False}))
    with pytest.raises(ValueError, match="turns off: set cd_attention_mid to true there"):
        load_pipeline(str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "export" / "vae")
    with pytest.raises(
        FileNotFoundError, match="the VAE is looked for in .*/vae, but .*/export has no vae; it has feat"
    ):
        load_pipeline(str(tmp_path / "export"))
    with pytest.raises(FileNotFoundError, match="the folder /no/where, where the VAE is looked for, does not exist"):
        load_pipeline("/no/where")
    (tmp_path / "empty" / "image_encoder").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="the image encoder cannot be loaded from .*/empty/image_encoder"):
        components.load_image_encoder(str(tmp_path / "empty"))


def test_parts(checkpoint):
    scheduler = components.load_scheduler(str(checkpoint))
    assert not scheduler.config.clip_sample and scheduler.config.steps_offset == 1
    assert scheduler.config.beta_schedule == "scaled_linear"
    vae = components.load_vae(str(checkpoint))
    pixels = torch.rand(2, 3, SIZE_PX, SIZE_PX) * 2 - 1
    posterior, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    noise = torch.randn(posterior.mean.shape)
    torch.testing.assert_close(components.encode_images(vae, pixels), posterior.mode() * scale)
    sampled = (posterior.mean + posterior.std * noise) * scale
    torch.testing.assert_close(components.encode_images(vae, pixels, noise), sampled)
    many = pixels.repeat(components.ENCODED_AT_ONCE_ROWS, 1, 1, 1)  # encoded in parts
    for ours, row in zip(components.posterior_moments(vae, many), (posterior.mean, posterior.std), strict=True):
        torch.testing.assert_close(ours, (row * scale).repeat(components.ENCODED_AT_ONCE_ROWS, 1, 1, 1))
    decoded = components.decode_latents(vae, sampled)
    torch.testing.assert_close(decoded, (vae.decode(sampled / scale).sample / 2 + 0.5).clamp(0, 1))
    assert not any(parameter.requires_grad for parameter in vae.parameters()) and not vae.training


# What is told ---------------------------------------------------------------------------------------------------------


def test_calls_that_cannot_be(pipeline):
    noise = torch.randn(3, 4, LATENT_PX, LATENT_PX)
    cases = {
        "output_type is 'jpg', but must be one of pil, np, pt, latent": {"output_type": "jpg"},
        "num_images_per_prompt is 0, but must be at least 1": {"num_images_per_prompt": 0},
        r"an image is 10 x 10 px where 64 x 64 are generated \(width x height\): resize it": {"image": photo(0, 10)},
        "there is no image": {"image": []},
        r"image is a tensor \(3, 64, 64\), but must be \(B, 3, H, W\)": {"image": torch.zeros(3, 64, 64)},
        "there are 2 generators for 1 results: give one, or 1": {"generator": seeded(0, 1)},
        "latents has 3 rows, but 1 results of 2 views need twice as many as 2": {"latents": noise},
        "normal_cond has 2 images for 1 in image: give one for each": {"normal_cond": [photo(0), photo(1)]},
        r"camera_embedding is \(3, 5\), but must have 2 V = 4 rows": {"camera_embedding": torch.zeros(3, 5)},
        "cfg_order is 'both', but must be domain or upstream": {"cfg_order": "both"},
        r"eta is 1.5, but must be in \[0, 1\]": {"eta": 1.5},
        r"num_inference_steps is 0, but must be in 1..999": {"num_inference_steps": 0},
        r"num_inference_steps is 1000, but must be in 1..999": {"num_inference_steps": 1000},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            pipeline(**{"image": photo(0), "num_inference_steps": 1, **options})


def test_noise_of_another_shape(pipeline):
    noise = generator_noise(seeded(0), VIEWS + 1, (4, LATENT_PX, LATENT_PX))
    with pytest.raises(ValueError, match=r"the noise is \(1, 2, 3, 4, 8, 8\), but the condition needs \(1, 2, 2, 4,"):
        denoise_views(pipeline.unet, pipeline.scheduler, pipeline.encode([photo(0)]), noise)


def test_results_that_are_not_finite(pipeline):
    latents = torch.full((2 * VIEWS, 4, LATENT_PX, LATENT_PX), torch.nan)
    with pytest.raises(ValueError, match="the result is not finite: use bf16 or float32 instead of fp16"):
        pipeline(photo(0), latents=latents, **FEW)


def test_settings_that_contradict_each_other(pipeline):
    with pytest.raises(ValueError, match="num_views is 6, the UNet's 2, and there are 6 cameras: all three must be"):
        MVDiffusionImagePipeline(**pipeline.components, num_views=6)
    with pytest.raises(ValueError, match="num_views is 2, the UNet's 2, and there are 1 cameras"):
        MVDiffusionImagePipeline(**pipeline.components, cameras=[["front", 0, 0]])
    with pytest.raises(ValueError, match="camera_embedding_type is 'plucker', but must be e_de_da_sincos"):
        MVDiffusionImagePipeline(**pipeline.components, camera_embedding_type="plucker")
