"""The refiner's maths and networks against recorded vectors."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import vectors as golden
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from vectors import Vectors

from common.diffusion import add_noise, signal_to_noise, velocity
from gaussian_refiner.models.denoise import decode, denoise, encode
from gaussian_refiner.models.objective import (
    ObjectiveSettings,
    RefinerConstants,
    RefinerDraws,
    RefinerInputs,
    class_labels,
    condition_keep_masks,
    interleave,
    mean_over_rows,
    repair_loss,
    snr_weights,
)
from gaussian_refiner.models.self_mutual_attention import (
    CondCache,
    SelfMutualAttnProcessor,
    install_self_mutual_attention,
)
from gaussian_refiner.models.unet import load_unet, widen_conv_in

TRAINER = "gaussian_refiner"
ROW_TOLERANCE = "masks/noisy/target"  # what the header calls the tensors that go into the UNet


def scheduler_of(config: dict[str, Any]) -> Any:
    """A diffusers scheduler from a header's config, whose key "class" names its type."""
    options = dict(config)
    return getattr(diffusers, options.pop("class", "PNDMScheduler")).from_config(options)


# The tiny checkpoint, rebuilt from its weights file.


@cache
def components_of(vectors_path: Path) -> Vectors:
    """The file of tiny weights that another file's header refers to."""
    header = golden.load(vectors_path).config
    named = re.match(r"\S+\.safetensors", header["weights"])
    path = vectors_path.parent / named[0] if named else vectors_path
    if not named or not path.is_file():
        path = next(iter(golden.files(TRAINER, "tiny_components*.safetensors")), path)
    return golden.load(path)


def build_component(components: Vectors, name: str) -> torch.nn.Module:
    """One network of the tiny checkpoint, strictly loaded."""
    config = dict(components.config[name])
    class_name = config.pop("class")
    if class_name == StableUnCLIPImageNormalizer.__name__:
        network = StableUnCLIPImageNormalizer(**config)
    elif hasattr(diffusers, class_name):
        network = getattr(diffusers, class_name).from_config(config)
    else:
        network_class = getattr(transformers, class_name)
        network = network_class(network_class.config_class(**config))
    state = components.under(f"{name}.")
    if not state.keys() & network.state_dict().keys():  # transformers writes or drops this prefix, by version
        state = {f"text_model.{key}": value for key, value in state.items()}
    network.load_state_dict(state)
    return network.eval()


def build_refiner(vectors: Vectors) -> tuple[diffusers.UNet2DConditionModel, CondCache]:
    """The tiny UNet with the file's 8-channel conv_in and self-mutual attention."""
    unet = widen_conv_in(build_component(components_of(vectors.path), "unet"))
    trained = vectors["in.conv_in_weight8"]
    assert torch.equal(unet.conv_in.weight[:, :4], trained[:, :4]), "the file's conv_in does not extend the tiny UNet's"
    with torch.no_grad():
        unet.conv_in.weight.copy_(trained)
    return unet, install_self_mutual_attention(unet)


def constants_of(components: Vectors) -> RefinerConstants:
    return RefinerConstants(
        alphas_cumprod=scheduler_of(components.config["scheduler"]).alphas_cumprod,
        image_alphas_cumprod=scheduler_of(components.config["image_noising_scheduler"]).alphas_cumprod,
        embed_mean=components["image_normalizer.mean"],
        embed_std=components["image_normalizer.std"],
    )


def grad_norm(unet: torch.nn.Module) -> torch.Tensor:
    return torch.stack([parameter.grad.norm() for parameter in unet.parameters()]).norm()


# Networks.


@golden.by_case(TRAINER, "attn_selfmutual*.safetensors", r"(.+)\.in\.hidden_states")
def test_self_mutual_attention(vectors: Vectors, case: str) -> None:
    options = {name: value for name, value in vectors.config[case].items() if name != "shape"}
    attention = Attention(**options, processor=SelfMutualAttnProcessor(CondCache(), case))
    attention.load_state_dict(vectors.under(f"{case}.weight."))
    inputs = vectors.under(f"{case}.in.")
    hidden_states = inputs.pop("hidden_states").clone().requires_grad_()
    cotangent = inputs.pop("cotangent")
    output = attention(hidden_states, **inputs)
    vectors.check(f"{case}.out.hidden_states", output)
    (output * cotangent).sum().backward()
    vectors.check(f"{case}.out.grad_hidden_states", hidden_states.grad)


@golden.by_file(TRAINER, "conv_in_expand*.safetensors")
def test_conv_in_expansion(vectors: Vectors) -> None:
    sample = vectors["in.sample"]
    channels = vectors["in.weight4"].shape[0]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(channels,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=1,
    )
    with torch.no_grad():
        unet.conv_in.weight.copy_(vectors["in.weight4"])
        unet.conv_in.bias.copy_(vectors["in.bias"])
    widen_conv_in(unet)
    vectors.check("out.weight8", unet.conv_in.weight)
    torch.testing.assert_close(unet.conv_in.bias, vectors["out.bias"], atol=0, rtol=0)

    repeats = sample.shape[0] // vectors["in.concat_conds"].shape[0]
    unet_input = torch.cat([sample, vectors["in.concat_conds"].repeat(repeats, 1, 1, 1)], dim=1)
    vectors.check("out.unet_input", unet_input)
    vectors.check("out.conv_in_at_init", unet.conv_in(unet_input))
    with torch.no_grad():
        unet.conv_in.weight.copy_(vectors["in.weight8_trained"])
    vectors.check("out.conv_in_trained", unet.conv_in(unet_input))


# The objective's formulas.


@golden.by_case(TRAINER, "dropout_masks*.safetensors", r"(.+)\.in\.random_p")
def test_condition_dropout_masks(vectors: Vectors, case: str) -> None:
    masks = condition_keep_masks(vectors[f"{case}.in.random_p"], vectors[f"{case}.in.prob"].item())
    for condition in ("render", "clip", "cond"):
        vectors.check(f"{case}.out.keep_{condition}", getattr(masks, condition))


@golden.by_case(TRAINER, "image_embed_class_labels*.safetensors", r"([^.]+)\.out\.class_labels_.+")
def test_class_labels(vectors: Vectors, case: str) -> None:
    alphas_cumprod = scheduler_of(
        {"class": "DDPMScheduler", **vectors.config["image_noising_scheduler"]}
    ).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod, vectors["ref.image_noising_alphas_cumprod"])
    names = ("image_embeds", "noise", "mean", "std")
    inputs = [vectors[f"{case}.in.{name}"] for name in names]
    for name in vectors.under(f"{case}.out.class_labels_"):
        level = int(name[5:]) if name.startswith("level") else vectors[f"{case}.in.{name}_levels"]
        labels = class_labels(*inputs, alphas_cumprod, level)
        vectors.check(f"{case}.out.class_labels_{name}", labels)


@golden.by_file(TRAINER, "diffusion_targets*.safetensors")
def test_diffusion_targets(vectors: Vectors) -> None:
    alphas_cumprod = scheduler_of(vectors.config["scheduler"]).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod, vectors["ref.alphas_cumprod"])
    timesteps = interleave(torch.zeros_like(vectors["in.timesteps"]), vectors["in.timesteps"])
    assert torch.equal(timesteps, vectors["out.combined_timesteps"])
    clean = interleave(vectors["in.cond_latents"], vectors["in.gt_latents"])
    noise = vectors["in.noise"]
    offset_noise = noise + vectors.config["noise_offset"] * vectors["in.offset_noise"]
    perturbation = vectors.config["input_perturbation"] * vectors["in.perturb_noise"]
    actual = {
        "out.combined_clean": clean,
        "out.noise_with_offset": offset_noise,
        "out.noisy": add_noise(clean, noise, timesteps, alphas_cumprod),
        "out.noisy_offset": add_noise(clean, offset_noise, timesteps, alphas_cumprod),
        "out.noisy_perturb": add_noise(clean, noise + perturbation, timesteps, alphas_cumprod),
        "out.noisy_offset_perturb": add_noise(clean, offset_noise + perturbation, timesteps, alphas_cumprod),
        "out.v_target": velocity(clean, noise, timesteps, alphas_cumprod),
        "out.v_target_offset": velocity(clean, offset_noise, timesteps, alphas_cumprod),
    }
    for name, value in actual.items():
        vectors.check(name, value, label="float32 outputs")


@pytest.mark.parametrize(("dtype", "suffix"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
@golden.by_file(TRAINER, "diffusion_targets*.safetensors")
def test_half_precision_schedule_differs_from_ours(vectors: Vectors, dtype: torch.dtype, suffix: str) -> None:
    """Rounding the schedule before its square roots is what the recorded half variants did; ours stays in float32."""
    alphas_cumprod = vectors["ref.alphas_cumprod"]
    timesteps = vectors["out.combined_timesteps"]
    clean, noise = vectors["out.combined_clean"].to(dtype), vectors["in.noise"].to(dtype)
    rounded = alphas_cumprod.to(dtype)[timesteps][:, None, None, None]
    recorded = {
        f"out.noisy_{suffix}_upstream": rounded.sqrt() * clean + (1 - rounded).sqrt() * noise,
        f"out.v_target_{suffix}_upstream": rounded.sqrt() * noise - (1 - rounded).sqrt() * clean,
    }
    for name, value in recorded.items():
        vectors.check(name, value)

    ours = add_noise(clean, noise, timesteps, alphas_cumprod)
    assert ours.dtype == torch.float32
    error = (ours - vectors["out.noisy"]).abs().max()
    upstream_error = (vectors[f"out.noisy_{suffix}_upstream"].float() - vectors["out.noisy"]).abs().max()
    assert error < upstream_error, f"float32 schedule errs by {error}, the rounded one by {upstream_error}"


@golden.by_case(TRAINER, "snr_loss*.safetensors", r"out\.(g.+\.(?:epsilon|v_prediction))\.upstream_loss")
def test_snr_weights(vectors: Vectors, case: str) -> None:
    gamma_text, prediction_type = case.rsplit(".", 1)
    gamma = float(gamma_text.removeprefix("g"))
    alphas_cumprod = scheduler_of(vectors.config["scheduler"]).alphas_cumprod
    timesteps = vectors["in.timesteps"]
    vectors.check("out.snr_target", signal_to_noise(timesteps, alphas_cumprod))
    vectors.check("out.snr_combined", signal_to_noise(vectors["out.combined_timesteps"], alphas_cumprod))
    weights = {
        mode: snr_weights(timesteps, alphas_cumprod, gamma, prediction_type, mode)
        for mode in ("fixed", "pairwise", "upstream")
    }
    for mode, weight in weights.items():
        vectors.check(f"out.{case}.{mode}_loss", mean_over_rows(weight * vectors["in.per_row_mse"]))
    vectors.check(f"out.{case}.fixed_weights", weights["fixed"])
    vectors.check(f"out.{case}.upstream_weights", weights["pairwise"][1::2, None])


# Tiny checkpoint.


@golden.by_file(TRAINER, "tiny_components*.safetensors")
def test_tiny_text_embeddings(vectors: Vectors, tmp_path: Path) -> None:
    for name, content in vectors.under("tokenizer.").items():
        (tmp_path / name).write_bytes(content.numpy().tobytes())
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    prompts = re.findall(r"'([^']*)'", vectors.header["notes"].partition("rows:")[2].partition("]")[0])
    text_encoder = build_component(vectors, "text_encoder")
    ids_and_embeddings = {
        "null": ([""], "ref.null_input_ids", "ref.null_text_embedding"),
        "prompts": (prompts, "ref.prompt_input_ids", "ref.prompt_embeddings"),
    }
    for texts, ids_name, embeddings_name in ids_and_embeddings.values():
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        vectors.check(ids_name, ids)
        with torch.no_grad():
            vectors.check(embeddings_name, text_encoder(ids)[0])


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "image_encoder", "image_normalizer"])
@golden.by_file(TRAINER, "tiny_components*.safetensors")
def test_tiny_components_build(vectors: Vectors, component: str) -> None:
    network = build_component(vectors, component)
    assert sum(p.numel() for p in network.parameters()) > 0
    twin = vectors.path.parent / vectors.path.stem.replace("components", "ckpt")
    checkpoint = twin if twin.is_dir() else next(iter(sorted(vectors.path.parent.glob("tiny_ckpt*"))), twin)
    folder = checkpoint / component
    weights = next(iter(folder.glob("*.safetensors")), None)
    if weights is None:
        pytest.skip(f"no checkpoint folder {folder}")
    stored = golden.load(weights).tensors
    for name, value in vectors.under(f"{component}.").items():
        saved = stored[name] if name in stored else stored[f"text_model.{name}"]
        assert torch.equal(saved, value), f"{weights}: {name} differs"
    if component == "unet":
        unet = load_unet(checkpoint)
        assert unet.config.in_channels == unet.conv_in.in_channels == 8
        assert torch.equal(unet.conv_in.weight[:, :4], vectors["unet.conv_in.weight"])
        assert not unet.conv_in.weight[:, 4:].any()


# A training step.


def settings_of(vectors: Vectors, variant: str) -> ObjectiveSettings:
    """A variant's name says what it changes: nodrop, epsilon, offset, perturb, snr (with its mode)."""
    config = vectors.config
    modes = [mode for mode in ("fixed", "pairwise", "upstream") if mode in variant]
    return ObjectiveSettings(
        condition_dropout_prob=None if "nodrop" in variant else config["condition_dropout_prob"],
        noise_offset=config["noise_offset"] if "offset" in variant else 0.0,
        input_perturbation=config["input_perturbation"] if "perturb" in variant else 0.0,
        prediction_type="epsilon" if "epsilon" in variant else "v_prediction",
        snr_gamma=config["snr_gamma"] if "snr" in variant else None,
        snr_mode=modes[0] if modes else "fixed",
    )


@golden.by_case(TRAINER, "train_step*.safetensors", r"out\.([^.]+)\.loss", having="in.gt_latents")
def test_train_step(vectors: Vectors, case: str) -> None:
    unet, _ = build_refiner(vectors)
    unet.train()
    components = components_of(vectors.path)
    names = ("render_latents", "cond_latents", "gt_latents", "image_embeds")
    inputs = RefinerInputs(**{n: vectors[f"in.{n}"] for n in names}, text_embeds=vectors["in.null_text_embedding"])
    names = ("image_embed_noise", "noise", "timesteps", "random_p", "offset_noise", "perturb_noise")
    draws = RefinerDraws(**{name: vectors[f"in.{name}"] for name in names})
    result = repair_loss(unet, inputs, draws, constants_of(components), settings_of(vectors, case))
    result.loss.backward()

    vectors.check(f"out.{case}.loss", result.loss)
    vectors.check(f"out.{case}.model_pred", result.pred)
    vectors.check(f"out.{case}.grad_norm", grad_norm(unet))
    check_rows(vectors, case, result)
    check_gradients(vectors, case, unet)
    check_update(vectors, case, unet)


def check_rows(vectors: Vectors, case: str, result: Any) -> None:
    """What goes into the UNet, where the file has it."""
    rows = result.rows
    actual = {
        "combined_clean": rows.clean,
        "masked_cond": rows.clean[::2],
        "masked_render": rows.render[::2],
        "masked_class": rows.class_labels[::2],
        "unet_class_labels": rows.class_labels,
        "unet_concat_conds": rows.render,
        "noisy": rows.noisy,
        "target": rows.target,
        "per_row_mse": result.per_row_mse,
    }
    for name, value in actual.items():
        if f"out.{case}.{name}" in vectors:
            label = f"out.{case}.model_pred" if name == "per_row_mse" else ROW_TOLERANCE
            vectors.check(f"out.{case}.{name}", value, label=label)
    if f"out.{case}.combined_timesteps" in vectors:
        assert torch.equal(rows.timesteps, vectors[f"out.{case}.combined_timesteps"])


def check_gradients(vectors: Vectors, case: str, unet: torch.nn.Module) -> None:
    parameters = dict(unet.named_parameters())
    if f"out.{case}.param_grad_norms" in vectors:
        norms = torch.stack([parameters[name].grad.norm() for name in vectors.config["param_names"]])
        vectors.check(f"out.{case}.param_grad_norms", norms)
    for name in vectors.under(f"out.{case}.grad."):
        vectors.check(f"out.{case}.grad.{name}", parameters[name].grad)


def check_update(vectors: Vectors, case: str, unet: torch.nn.Module) -> None:
    """Clip the gradients and take one AdamW step, where the file has the weights after it."""
    updated = vectors.under(f"out.{case}.after_step.")
    if not updated:
        return
    parameters = dict(unet.named_parameters())
    torch.nn.utils.clip_grad_norm_(unet.parameters(), vectors.config["max_grad_norm_for_clipped"])
    for name in vectors.tensors:
        match = re.fullmatch(rf"out\.{re.escape(case)}\.clipped_[\d.]+\.grad\.(.+)", name)
        if match:
            vectors.check(name, parameters[match[1]].grad, label=f"out.{case}.grad.{match[1]}")
    options = {name: value for name, value in vectors.config["optimizer"].items() if name != "name"}
    torch.optim.AdamW(unet.parameters(), **options).step()
    for name, expected in updated.items():
        # AdamW's first step is the gradient's sign: where that is rounding noise, the header excuses a difference.
        vanishing = parameters[name].grad.abs() < 1e-7
        assert vanishing.float().mean() < 0.5, f"most gradients of {name} vanish"
        vectors.check(f"out.{case}.after_step.{name}", torch.where(vanishing, expected, parameters[name]))
        assert (parameters[name] - expected).abs().max() <= 2.5 * options["lr"]


@golden.by_file(TRAINER, "train_step*.safetensors", having="in.gt_u8_hwc")
def test_train_step_from_pixels(vectors: Vectors) -> None:
    components = components_of(vectors.path)
    vae = build_component(components, "vae")
    latents = {}
    for name in ("cond", "render", "gt"):
        pixels = vectors[f"in.{name}_u8_hwc"].permute(0, 3, 1, 2).float() / 127.5 - 1
        latents[f"{name}_latents"] = encode(vae, pixels)
        vectors.check(f"out.{name}_latents", latents[f"{name}_latents"])

    crops = [np.asarray(image) for image in vectors["in.cond_u8_hwc"]]
    pixel_values = transformers.CLIPImageProcessor()(images=crops, return_tensors="pt").pixel_values
    vectors.check("out.clip_pixel_values_avgpool14", F.avg_pool2d(pixel_values, 14))
    with torch.no_grad():
        image_embeds = build_component(components, "image_encoder")(pixel_values).image_embeds
    vectors.check("out.image_embeds", image_embeds)

    unet, _ = build_refiner(vectors)
    inputs = RefinerInputs(**latents, image_embeds=image_embeds, text_embeds=components["ref.null_text_embedding"])
    names = ("image_embed_noise", "noise", "timesteps", "random_p")
    draws = RefinerDraws(**{name: vectors[f"in.{name}"] for name in names})
    settings = ObjectiveSettings(condition_dropout_prob=vectors.config["condition_dropout_prob"])
    constants = constants_of(components)
    labels = class_labels(
        image_embeds,
        draws.image_embed_noise,
        constants.embed_mean,
        constants.embed_std,
        constants.image_alphas_cumprod,
    )
    vectors.check("out.class_labels", labels)
    result = repair_loss(unet, inputs, draws, constants, settings)
    result.loss.backward()
    vectors.check("out.loss", result.loss)
    vectors.check("out.model_pred", result.pred)
    vectors.check("out.grad_norm", grad_norm(unet))


# Sampling.


def sampler_of(vectors: Vectors, case: str) -> Any:
    """PNDM where the header lists its options; DDIM where it describes a change of those in words."""
    described = vectors.config["scheduler"]
    options = next(value for value in described.values() if isinstance(value, dict))
    if isinstance(described[case], dict):
        return scheduler_of(described[case])
    return diffusers.DDIMScheduler.from_config(options, clip_sample=False)


@pytest.mark.parametrize("use_cond_cache", [False, True], ids=["pairs", "cached"])
@golden.by_case(TRAINER, "val_denoise*.safetensors", r"out\.([^.]+)\.latents")
def test_denoise(vectors: Vectors, case: str, use_cond_cache: bool) -> None:
    components = components_of(vectors.path)
    constants = constants_of(components)
    unet, cond_cache = build_refiner(vectors)
    noise = vectors["in.image_embed_noise"]
    embeds = vectors["in.image_embeds"].repeat_interleave(noise.shape[0] // vectors["in.image_embeds"].shape[0], dim=0)
    labels = class_labels(embeds, noise, constants.embed_mean, constants.embed_std, constants.image_alphas_cumprod)
    vectors.check("out.class_labels_cfg", torch.cat([torch.zeros_like(labels), labels]))

    steps = []
    result = denoise(
        unet,
        cond_cache,
        sampler_of(vectors, case),
        cond_latents=vectors["in.cond_latents"],
        render_latents=vectors["in.render_latents"],
        text=(vectors["in.neg_prompt_embeds"], vectors["in.pos_prompt_embeds"]),
        class_labels=labels,
        init_noise=vectors["in.init_noise"],
        num_inference_steps=vectors.config["steps"],
        guidance_scale=vectors.config["guidance_scale"],
        use_cond_cache=use_cond_cache,
        callback=steps.append,
    )
    vectors.check(f"out.{case}.timesteps", torch.tensor([step.timestep for step in steps]))
    cond = vectors["in.cond_latents"]
    vectors.check(f"out.{case}.latents", torch.stack([interleave(cond, step.latents) for step in steps]))
    recorded = vectors[f"out.{case}.guided_pred"]
    assert [step.cond_prediction is None for step in steps] == [use_cond_cache] * len(steps)
    cond_preds = recorded[:, ::2] if use_cond_cache else torch.stack([step.cond_prediction for step in steps])
    pairs = zip(cond_preds, steps, strict=True)
    vectors.check(f"out.{case}.guided_pred", torch.stack([interleave(c, step.prediction) for c, step in pairs]))

    images = decode(build_component(components, "vae"), interleave(cond, result))
    pixels_u8 = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
    vectors.check(f"out.{case}.image_u8_hwc", pixels_u8)
