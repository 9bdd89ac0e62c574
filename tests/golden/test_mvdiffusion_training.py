"""The multi-view objective and its training steps against recorded vectors."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import vectors as golden
from vectors import Vectors

from common.config import OptimConfig
from common.diffusion import signal_to_noise
from common.optim import EMA, Learner, build_adamw, lr_schedule
from mvdiffusion.config import switches
from mvdiffusion.data.preparation import ClipTransform
from mvdiffusion.models.components import embed_images, encode_images
from mvdiffusion.models.layout import DOMAINS
from mvdiffusion.models.objective import (
    MVDraws,
    MVInputs,
    MVLoss,
    ObjectiveSettings,
    drop_masks,
    mv_loss,
    mv_rows,
    snr_weights,
)
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel

TRAINER = "mvdiffusion"
# The vectors were made with Stable Diffusion 1.x's schedule.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ENOUGH_GRADIENT = 1e-4  # where AdamW's first step, the gradient's sign, can be compared, by the header's notes


def alphas_of(options: dict[str, Any]) -> torch.Tensor:
    return diffusers.DDIMScheduler(**options).alphas_cumprod


def by_object(rows: torch.Tensor, num_views: int, settings: ObjectiveSettings) -> torch.Tensor:
    """Rows in the order of the halves to (B, D, V, ...) in the order of `DOMAINS`."""
    halves = rows.unflatten(0, (settings.num_domains, -1, num_views))  # (D, B, V, ...)
    return (halves.flip(0) if settings.half_order == "image_first" else halves).transpose(0, 1)


def uniform_by_object(uniform: torch.Tensor, num_views: int, settings: ObjectiveSettings) -> torch.Tensor:
    """Recorded draws of dropout, flat, to the axes that their drop type has."""
    if settings.drop_type == "drop_independent":
        return by_object(uniform, num_views, settings)  # (B, D, V)
    return uniform.unflatten(0, (-1, num_views)) if settings.drop_type == "drop_joint" else uniform


def single_view_inputs(clean: torch.Tensor, **given: torch.Tensor) -> MVInputs:
    """Rows as objects of one view and one drawn domain, for functions of rows."""
    count = len(clean)
    others = {"condition_latents": torch.zeros_like(clean), "image_embeds": torch.zeros(count, 1)} | given
    camera = torch.zeros(count, 1, 1)
    return MVInputs(clean[:, None], clean[:, None], normal_camera=camera, colour_camera=camera, **others)


def single_view_draws(noise: torch.Tensor, timesteps: torch.Tensor, **given: torch.Tensor) -> MVDraws:
    domain = torch.zeros(len(noise), dtype=torch.int64)
    rows = {name: value[:, None, None] for name, value in given.items()}
    return MVDraws(noise=noise[:, None, None], timesteps=timesteps[:, None, None], domain=domain, **rows)


SINGLE_VIEW = ObjectiveSettings(stage="mixed", timestep_sharing="row", condition_drop_rate=0)


# Condition dropout.


@golden.by_case(TRAINER, "09_cfg_dropout*.safetensors", r"((?:joint|mix)\..+\.rate[^/]+)\.u")
def test_drop_masks(vectors: Vectors, case: str) -> None:
    stage, drop_type, rate = case.split(".", maxsplit=2)
    num_views = vectors.config["Nv"]
    settings = ObjectiveSettings(
        stage="joint" if stage == "joint" else "mixed",
        drop_type=drop_type,
        condition_drop_rate=float(rate.removeprefix("rate")),
    )
    uniform = uniform_by_object(vectors[f"{case}.u"], num_views, settings)
    drop = drop_masks(uniform, num_views, settings)
    vectors.check(f"{case}.keep_vae", (~drop.latent).float())
    vectors.check(f"{case}.keep_clip", (~drop.embed).float())


@golden.by_case(TRAINER, "09_cfg_dropout*.safetensors", r"gnn3d\.mask_p(.+)")
def test_original_dropout(vectors: Vectors, case: str) -> None:
    settings = replace(SINGLE_VIEW, drop_type="row_both", condition_drop_rate=float(case))
    uniform, latents = vectors["gnn3d.u"], vectors["gnn3d.latents_in"]
    drop = drop_masks(uniform[:, None, None], 1, settings)
    vectors.check(f"gnn3d.mask_p{case}", drop.latent)
    vectors.check(f"gnn3d.mask_p{case}", drop.embed)
    zeroed = ~vectors["gnn3d.latents_out"].flatten(1).any(dim=1)  # one of the rates made these
    if not torch.equal(zeroed, vectors[f"gnn3d.mask_p{case}"].flatten()):
        assert len(vectors.under("gnn3d.mask_p")) > 1
        return
    inputs = single_view_inputs(latents, condition_latents=latents, image_embeds=vectors["gnn3d.embeds_in"])
    draws = single_view_draws(latents, torch.zeros(len(latents), dtype=torch.int64), dropout=uniform)
    rows = mv_rows(inputs, draws, torch.ones(1), settings)
    vectors.check("gnn3d.latents_out", rows.condition)
    vectors.check("gnn3d.embeds_out", rows.image_embeds[:, 0])


# Noise, targets, weights, loss.


@golden.by_case(TRAINER, "10_noise_snr_loss*.safetensors", r"([^.]+)\.alphas_cumprod")
def test_schedule(vectors: Vectors, case: str) -> None:
    options = {"num_train_timesteps": vectors.config["num_train_timesteps"], **vectors.config["schedulers"][case]}
    alphas_cumprod = alphas_of(options)
    vectors.check(f"{case}.alphas_cumprod", alphas_cumprod)
    vectors.check(f"{case}.snr", signal_to_noise(vectors["timesteps"], alphas_cumprod))


@golden.by_case(TRAINER, "10_noise_snr_loss*.safetensors", r"(.+\.gamma[^/]+)\.loss")
def test_noising_weights_and_loss(vectors: Vectors, case: str) -> None:
    schedule, prediction_type, gamma = case.split(".", maxsplit=2)
    alphas_cumprod = vectors[f"{schedule}.alphas_cumprod"]
    settings = replace(
        SINGLE_VIEW,
        prediction_type=prediction_type,
        snr_gamma=None if gamma == "gammaNone" else float(gamma.removeprefix("gamma")),
        snr_mode="gnn3d",
    )
    inputs = single_view_inputs(vectors["latents"])
    draws = single_view_draws(vectors["noise"], vectors["timesteps"])
    result = mv_loss(lambda *args, **options: (vectors["model_pred"],), inputs, draws, alphas_cumprod, settings)
    vectors.check(f"{schedule}.noisy", result.rows.noisy)
    target = f"{schedule}.velocity" if prediction_type == "v_prediction" else "noise"
    vectors.check(target, result.rows.target)
    vectors.check(f"{case}.loss", result.loss)
    for mode in ("gnn3d", "wonder3d"):
        if f"{case}.weights_{mode}" in vectors:
            weights = snr_weights(vectors["timesteps"], alphas_cumprod, replace(settings, snr_mode=mode))
            vectors.check(f"{case}.weights_{mode}", weights)


@golden.by_case(TRAINER, "10_noise_snr_loss*.safetensors", r"noise_with_offset_(.+)")
def test_noise_offset(vectors: Vectors, case: str) -> None:
    inputs = single_view_inputs(vectors["latents"])
    draws = single_view_draws(vectors["noise"], vectors["timesteps"], offset_noise=vectors["offset_randn"])
    alphas_cumprod = alphas_of(SCHEDULE)
    rows = mv_rows(inputs, draws, alphas_cumprod, replace(SINGLE_VIEW, noise_offset=float(case)))
    vectors.check(f"noise_with_offset_{case}", rows.target)


@golden.by_case(TRAINER, "10_noise_snr_loss*.safetensors", r"perturbed_noise_(.+)")
def test_input_perturbation(vectors: Vectors, case: str) -> None:
    inputs = single_view_inputs(vectors["latents"])
    draws = single_view_draws(vectors["noise"], vectors["timesteps"], perturb_noise=vectors["perturb_randn"])
    pure_noise = torch.zeros(int(vectors["timesteps"].max()) + 1)  # alphas_cumprod 0: the UNet's input is the noise
    rows = mv_rows(inputs, draws, pure_noise, replace(SINGLE_VIEW, input_perturbation=float(case)))
    vectors.check(f"perturbed_noise_{case}", rows.noisy)
    vectors.check("noise", rows.target)


# Whole steps.


@cache
def components_of(vectors_path: Path) -> Vectors:
    """The file of tiny weights that another file's header refers to."""
    named = vectors_path.parent / golden.load(vectors_path).config["weights_file"].split()[0]
    return golden.load(named if named.is_file() else golden.files(TRAINER, "00_tiny_models*.safetensors")[0])


def frozen_parts(components: Vectors) -> tuple[Any, Any]:
    vae = diffusers.AutoencoderKL(**components.config["vae"])
    vae.load_state_dict(components.under("vae."))
    clip_config = transformers.CLIPVisionConfig(**components.config["clip"])
    image_encoder = transformers.CLIPVisionModelWithProjection(clip_config)
    image_encoder.load_state_dict(components.under("clip."))
    return vae.eval(), image_encoder.eval()


def build_unet(components: Vectors, case: dict[str, Any]) -> UNetMV2DConditionModel:
    config = {**components.config["unet"], "num_views": case["num_views"], **case["unet_overrides"]}
    unet = UNetMV2DConditionModel.from_config(config)
    weights = components.under("unet.")
    unet.load_state_dict({name: weights[name] for name in unet.state_dict()})
    return unet.train()


def encode_targets(vae: Any, pixels: list[torch.Tensor], eps: torch.Tensor) -> list[torch.Tensor]:
    """Posterior samples of each domain's (B, V, 3, H, W) in [-1, 1] with eps (B, D, V, C, h, w): (B, V, C, h, w)."""
    return [
        encode_images(vae, each.flatten(0, 1), eps[:, place].flatten(0, 1)).unflatten(0, each.shape[:2])
        for place, each in enumerate(pixels)
    ]


@golden.by_case(TRAINER, "11_train_step*.safetensors", r"([^.]+)\.loss")
def test_step_of_the_original(vectors: Vectors, case: str) -> None:
    recorded, config = vectors.under(f"{case}."), vectors.config[case]
    profile = {**switches("gnn3d", "loss"), "condition_drop_rate": config["p_uncond"]}
    names = ("noise_offset", "input_perturbation", "snr_gamma")
    settings = ObjectiveSettings(
        **profile,
        **{name: config[name] for name in names},
        prediction_type=config.get("prediction_type") or "epsilon",
    )
    draws = {
        "noise": recorded.get("base_noise", recorded["noise"]),
        "timesteps": recorded["timesteps"],
        "dropout": (~recorded["mask"]).float() * 0.999,
        "offset_noise": recorded.get("offset_randn"),
        "perturb_noise": recorded.get("perturb_randn"),
        "target_eps": recorded["posterior_eps_target"],
    }
    by_field = {
        name: by_object(value, config["num_views"], settings) for name, value in draws.items() if value is not None
    }
    draws = MVDraws(**by_field, condition_eps=recorded["posterior_eps_cond"])

    components = components_of(vectors.path)
    vae, image_encoder = frozen_parts(components)
    pixels = [recorded["batch.normal_target_vae"], recorded["batch.image_target_vae"]]
    inputs = MVInputs(
        *encode_targets(vae, pixels, draws.target_eps),
        condition_latents=encode_images(vae, recorded["batch.image_cond_vae"], draws.condition_eps),
        image_embeds=embed_images(image_encoder, recorded["batch.image_cond_CLIP"]),
        normal_camera=recorded["batch.camera_embed_normal"],
        colour_camera=recorded["batch.camera_embed_image"],
    )
    check_step(vectors, case, build_unet(components, config), inputs, draws, settings)


@golden.by_case(TRAINER, "12_train_step*.safetensors", r"([^.]+)\.loss")
def test_step_of_the_parent(vectors: Vectors, case: str) -> None:
    recorded, config = vectors.under(f"{case}."), vectors.config[case]
    is_mixed = "batch.task_embeddings" in recorded
    profile = {**switches("wonder3d", "loss"), "condition_drop_rate": config["condition_drop_rate"]}
    settings = ObjectiveSettings(
        **{**profile, "drop_type": config["drop_type"]},
        stage="mixed" if is_mixed else "joint",
        snr_gamma=config["snr_gamma"],
        prediction_type=config.get("prediction_type") or "epsilon",
    )
    colour = recorded["batch.imgs_out"]
    normal = recorded.get("batch.normals_out", colour)
    tasks = [
        recorded["batch.task_embeddings" if is_mixed else f"batch.{domain}_task_embeddings"]
        for domain in ("normal", "color")
    ]
    names = ("noise", "timesteps", "posterior_eps_target")
    noise, timesteps, eps = (by_object(recorded[name], config["num_views"], settings) for name in names)
    draws = MVDraws(
        noise=noise,
        timesteps=timesteps[:, :, 0],
        dropout=uniform_by_object(recorded["random_p"], config["num_views"], settings),
        domain=tasks[0][:, 0].argmax(dim=1) if is_mixed else None,  # a task vector is one-hot in the order of DOMAINS
    )

    components = components_of(vectors.path)
    vae, image_encoder = frozen_parts(components)
    condition = recorded["batch.imgs_in"][:, 0]
    clip = ClipTransform(crop_px=condition.shape[-1], resize="tensor").of_pixels
    cameras = [torch.cat([recorded["batch.camera_embeddings"], task], dim=2) for task in tasks]
    cameras = [torch.cat([camera.sin(), camera.cos()], dim=2) for camera in cameras]
    targets = [2 * each - 1 for each in (normal, colour)]
    inputs = MVInputs(
        *encode_targets(vae, targets, eps.expand(-1, len(DOMAINS), *eps.shape[2:])),
        condition_latents=encode_images(vae, 2 * condition - 1),
        image_embeds=embed_images(
            image_encoder, torch.stack([torch.from_numpy(clip(each)) for each in condition.numpy()])
        ),
        normal_camera=cameras[0],
        colour_camera=cameras[1],
    )
    unet = build_unet(components, config)
    if config["trainable"]:
        unet.requires_grad_(False)
        for name, module in unet.named_modules():
            if name.endswith(tuple(config["trainable"])):
                module.requires_grad_(True)
    check_step(vectors, case, unet, inputs, draws, settings)


def check_step(
    vectors: Vectors,
    case: str,
    unet: UNetMV2DConditionModel,
    inputs: MVInputs,
    draws: MVDraws,
    settings: ObjectiveSettings,
) -> None:
    schedule = vectors.config[case].get("scheduler") or vectors.config.get("scheduler") or SCHEDULE
    result = mv_loss(unet, inputs, draws, alphas_of(schedule), settings)
    result.loss.backward()
    vectors.check(f"{case}.loss", result.loss, label="loss")
    check_rows(vectors, case, result)
    check_gradients(vectors, case, unet)
    check_update(vectors, case, unet)


def check_rows(vectors: Vectors, case: str, result: MVLoss) -> None:
    """Everything that goes into the UNet and the loss, where the file has it."""
    rows = result.rows
    unet_input = torch.cat([rows.noisy, rows.condition], dim=1)
    actual = {
        "latents": rows.clean,
        "class_labels": rows.class_labels,
        "noisy_latents": unet_input,
        "latent_model_input": unet_input,
        "target": rows.target,
        "model_pred": result.pred,
        "mse_loss_weights": result.row_weights,
        "condition_latents": rows.condition,
        "cond_vae_embeddings": rows.condition,
        "image_embeddings": rows.image_embeds,
    }
    found = [name for name in actual if f"{case}.{name}" in vectors]
    assert {"latents", "target", "model_pred"} <= set(found)
    for name in found:
        expected = vectors[f"{case}.{name}"]
        vectors.check(f"{case}.{name}", actual[name].reshape(expected.shape), label="tensors")
    assert torch.equal(result.timesteps, vectors[f"{case}.timesteps"])


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def check_gradients(vectors: Vectors, case: str, unet: torch.nn.Module) -> None:
    parameters = dict(unet.named_parameters())
    names = vectors.config[f"{case}_param_names"]
    norms = torch.stack([gradient(parameters[name]).norm() for name in names])
    vectors.check(f"{case}.grad_norms", norms, label="grad_norms")
    vectors.check(f"{case}.grad_total_norm", norms.norm(), label="grad_norms")
    for name in vectors.under(f"{case}.grad."):
        vectors.check(f"{case}.grad.{name}", gradient(parameters[name]), label="tensors")


def check_update(vectors: Vectors, case: str, unet: torch.nn.Module) -> None:
    """Clip the gradients and take one AdamW step."""
    config = vectors.config[case]
    parameters = {name: each for name, each in unet.named_parameters() if each.requires_grad}
    lr_scale = config.get("class_embedding_lr", config["lr"]) / config["lr"]
    groups = [
        {"params": [each for name, each in parameters.items() if ("class_embedding" in name) == scaled]} | options
        for scaled, options in ((False, {}), (True, {"lr_scale": lr_scale}))
    ]
    beta1, beta2 = config.get("betas", (0.9, 0.999))
    optim = OptimConfig(
        learning_rate=config["lr"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_weight_decay=config["weight_decay"],
        adam_epsilon=config.get("eps", 1e-8),
    )
    optimizer = build_adamw([group for group in groups if group["params"]], optim, torch.device("cpu"))
    Learner(unet, optimizer, lr_schedule(optim, 1, 1), config["max_grad_norm"]).set_learning_rate(0)
    torch.nn.utils.clip_grad_norm_(parameters.values(), config["max_grad_norm"])
    gradients = {name: gradient(each).clone() for name, each in parameters.items()}
    optimizer.step()
    num_compared = 0
    for name, expected in vectors.under(f"{case}.after_step.").items():
        lr = config["lr"] * (lr_scale if "class_embedding" in name else 1)
        vanishing = gradients[name].abs() < ENOUGH_GRADIENT
        num_compared += int((~vanishing).sum())
        compared = torch.where(vanishing, expected, parameters[name])
        vectors.check(f"{case}.after_step.{name}", compared, label="after_step")
        assert (parameters[name] - expected).abs().max() <= 2.5 * lr
    assert num_compared, "every gradient vanishes"


# What common has to reproduce.


@golden.by_file(TRAINER, "14_ema_lr*.safetensors")
def test_moving_average(vectors: Vectors) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(vectors["ema.p0.weight"].clone())
    ema = EMA(module, vectors.config["ema"]["decay"])
    decays = []
    for number in range(1, len(vectors["ema.decays"]) + 1):
        module.weight.data.copy_(vectors[f"ema.param{number}"])
        ema.update()
        decays.append(ema.current_decay())
        vectors.check(f"ema.shadow{number}", ema.average[0])
    vectors.check("ema.decays", torch.tensor(decays, dtype=torch.float64))

    late_decays = []
    for updates in vectors["ema.get_decay_steps"].tolist():
        ema.updates = updates
        late_decays.append(ema.current_decay())
    vectors.check("ema.get_decay", torch.tensor(late_decays, dtype=torch.float64))


@golden.by_case(TRAINER, "14_ema_lr*.safetensors", r"lr\.(.+)")
def test_learning_rate(vectors: Vectors, case: str) -> None:
    config = vectors.config["lr"]
    optim = OptimConfig(learning_rate=config["base_lr"], lr_scheduler=case, lr_warmup_steps=config["warmup"])
    learning_rate = lr_schedule(optim, config["total"], 1)
    curve = [learning_rate(step) for step in range(len(vectors[f"lr.{case}"]))]
    vectors.check(f"lr.{case}", torch.tensor(curve, dtype=torch.float64))
