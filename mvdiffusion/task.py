"""The science: what is drawn for an object, its loss, validation on held-out objects, the exported pipeline.

The formulas are in `models.objective` and `pipelines`; here they meet the data and the run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from common.data import BAD_SAMPLE_ERRORS, collate, draw_integers, draw_normal, draw_uniform, on_device
from common.log import RunLog
from common.loop import StepOutput
from common.metrics import Lpips, psnr, ssim
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image
from mvdiffusion.config import MVConfig, MVLoss
from mvdiffusion.data.mvds import MultiViewDataset
from mvdiffusion.media import normal_angular_error, object_mask, view_sheet
from mvdiffusion.models.components import embed_images, posterior_moments
from mvdiffusion.models.layout import DOMAINS
from mvdiffusion.models.objective import MVDraws, MVInputs, ObjectiveSettings, draw_shapes, mv_loss, pick_domain
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel
from mvdiffusion.pipelines import MVDiffusionImagePipeline, ViewCondition, ddim_schedule, sample_views

logger = logging.getLogger(__name__)

SHEET_PICTURES, SHEET_CELL_PX = 4, 4096
# What `encode_batch` makes of a batch: posterior moments of the views, in order of `DOMAINS`, and of the condition.
ENCODED = ("target_mean", "target_std", "condition_mean", "condition_std", "image_embeds")


@dataclass
class Frozen:
    """What is not trained."""

    vae: AutoencoderKL
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: CLIPImageProcessor
    scheduler: DDIMScheduler

    def latent_shape(self, resolution_px: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image's latents."""
        side = resolution_px // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side


def objective_settings(loss: MVLoss, prediction_type: str) -> ObjectiveSettings:
    """The loss section, with its profile filled in, as the objective takes it."""
    return ObjectiveSettings(
        half_order=loss.half_order,
        stage="mixed" if loss.pred_type == "mix" else "joint",
        condition_latents=loss.condition_latents,
        timestep_sharing=loss.timestep_sharing,
        drop_type=loss.drop_type,
        condition_drop_rate=loss.condition_drop_rate if loss.use_classifier_free_guidance else 0.0,
        noise_offset=loss.noise_offset,
        input_perturbation=loss.input_perturbation,
        prediction_type=loss.prediction_type or prediction_type,
        snr_gamma=loss.snr_gamma,
        snr_mode=loss.snr_mode,
    )


def draw(
    seed: int,
    sample_numbers: Sequence[int],
    settings: ObjectiveSettings,
    num_views: int,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
) -> MVDraws:
    """Every random number of the loss, each a function of (seed, sample number), on the CPU.

    Args:
        latent_shape: (C, h, w) of one image.
    """
    numbers = [int(n) for n in sample_numbers]
    draws: dict[str, Tensor] = {}
    for name, shape in draw_shapes(settings, num_views, latent_shape).items():
        if name in ("domain", "timesteps"):
            limit = len(DOMAINS) if name == "domain" else num_timesteps
            draws[name] = draw_integers(seed, name, numbers, 0, limit, shape)
        elif name == "dropout":
            draws[name] = draw_uniform(seed, name, numbers, shape)
        else:
            draws[name] = draw_normal(seed, name, numbers, shape)
    return MVDraws(**draws)


def encode_batch(frozen: Frozen, batch: dict[str, Any], domain: Tensor | None = None) -> dict[str, Tensor]:
    """Posterior moments and image embeddings of a batch; a batch of cached objects holds them already.

    Args:
        domain: (B,) places in `DOMAINS`; only that domain of each object is encoded and returned.

    Returns:
        `target_mean`, `target_std` (B, D, V, 4, h, w), `condition_mean`, `condition_std` (B, 4, h, w), scaled, and
        `image_embeds` (B, E); float32. D is 1 where `domain` is given.
    """
    if ENCODED[0] in batch:
        encoded = {name: batch[name].float() for name in ENCODED}
        if domain is not None:
            for name in ENCODED[:2]:
                encoded[name] = pick_domain(*encoded[name].unbind(1), domain)[:, None]
        return encoded
    targets = batch["normal_target_vae"], batch["image_target_vae"]  # (B, V, 3, R, R) each
    pixels = torch.stack(targets, 1) if domain is None else pick_domain(*targets, domain)[:, None]  # (B, D, V, 3, R, R)
    shape = pixels.shape[:3]
    mean, std = posterior_moments(frozen.vae, torch.cat([pixels.flatten(0, 2), batch["image_cond_vae"]]))
    rows = shape.numel()
    return {
        "target_mean": mean[:rows].unflatten(0, shape),
        "target_std": std[:rows].unflatten(0, shape),
        "condition_mean": mean[rows:],
        "condition_std": std[rows:],
        "image_embeds": embed_images(frozen.image_encoder, batch["image_cond_CLIP"]),
    }


def loss_inputs(encoded: dict[str, Tensor], batch: dict[str, Any], draws: MVDraws) -> MVInputs:
    """Encoded objects as the objective takes them: posteriors are sampled here."""
    targets = encoded["target_mean"] + encoded["target_std"] * draws.target_eps  # (B, D, V, 4, h, w)
    condition = encoded["condition_mean"]
    if draws.condition_eps is not None:
        condition = condition + encoded["condition_std"] * draws.condition_eps
    return MVInputs(
        normal_latents=targets[:, 0],
        colour_latents=targets[:, -1],
        condition_latents=condition,
        image_embeds=encoded["image_embeds"],
        normal_camera=batch["camera_embed_normal"],
        colour_camera=batch["camera_embed_image"],
    )


class MVTask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        frozen: on the device in the run's precision.
        unet, bare_unet: the prepared UNet, and the one inside it.
        cameras: of the views, see `pipelines.camera_table`.
        held_out: validation objects, or None.
        photographs: of `validation_dir`, by name, as the pipeline takes them.
        log: where pictures go.
        stop: may end a validation between two objects.
        reload_frozen: loads the frozen parts again in float32, for the export.
        lpips: None leaves that metric out.
    """

    def __init__(
        self,
        config: MVConfig,
        processes: Processes,
        frozen: Frozen,
        unet: nn.Module,
        bare_unet: UNetMV2DConditionModel,
        cameras: Sequence[Any],
        held_out: MultiViewDataset | None,
        photographs: Mapping[str, Image.Image],
        log: RunLog,
        stop: StopSignal,
        reload_frozen: Callable[[], Frozen],
        lpips: Lpips | None,
    ):
        self.config, self.processes, self.frozen, self.unet = config, processes, frozen, unet
        self.bare_unet, self.cameras, self.held_out = bare_unet, cameras, held_out
        self.photographs, self.log, self.stop = dict(photographs), log, stop
        self.reload_frozen, self.lpips = reload_frozen, lpips
        self.settings = objective_settings(config.loss, frozen.scheduler.config.prediction_type)
        frozen.scheduler.register_to_config(prediction_type=self.settings.prediction_type)  # for sampling
        ddim_schedule(frozen.scheduler, config.validation.num_inference_steps)  # refuses a number that cannot be
        self.alphas_cumprod = frozen.scheduler.alphas_cumprod.to(processes.device, torch.float32)
        self.latent_shape = frozen.latent_shape(config.data.resolution)

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch."""
        numbers, device = batch["sample_number"].tolist(), self.alphas_cumprod.device
        draws = draw(
            self.config.run.seed, numbers, self.settings, len(self.cameras), self.latent_shape, len(self.alphas_cumprod)
        )
        draws = on_device(draws, device)
        with torch.no_grad():
            encoded = encode_batch(self.frozen, batch, draws.domain)
        result = mv_loss(self.unet, loss_inputs(encoded, batch, draws), draws, self.alphas_cumprod, self.settings)
        joint = self.settings.stage == "joint"
        return StepOutput(result.loss, {f"mse_{k}": v for k, v in result.domain_mse.items()} if joint else {})

    def validate(self, step: int) -> dict[str, float]:
        """Samples the held-out objects and the photographs, split over the processes: pictures and mean metrics.

        For each guidance scale `psnr`, `ssim` and `lpips` of the colours, and `normals_deg`, the mean angle between
        sampled and true normals.
        """
        count = len(self.held_out) if self.held_out else 0
        count = min(count, self.config.validation.max_validation_items or count)
        names = ["psnr", "ssim", "normals_deg"] + (["lpips"] if self.lpips else [])
        scales = self.config.validation.validation_guidance_scales
        sums = torch.zeros(len(scales), len(names), device=self.processes.device, dtype=torch.float64)
        measured = torch.zeros((), device=self.processes.device, dtype=torch.float64)
        photographs = sorted(self.photographs)
        for number in self.stop.share(count + len(photographs)):
            if number >= count:
                self._sample_photograph(step, photographs[number - count], number)
                continue
            try:
                item = self.held_out.item(number, self.held_out.variants()[0]) if self.held_out else {}
            except BAD_SAMPLE_ERRORS as error:
                logger.warning("a held-out object is left out of this validation: %s", error)
                continue
            for place, metrics in enumerate(self._validate_object(step, number, item)):
                sums[place] += torch.stack([metrics[name].double() for name in names])
            measured += 1
        sums, measured = (self.processes.reduce(each, "sum") for each in (sums, measured))
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            self._write_sheets(step)
        suffixes = ["" if len(scales) == 1 else f"_cfg{scale:g}" for scale in scales]
        means = (sums / measured).tolist()
        return {
            name + suffix: value
            for suffix, values in zip(suffixes, means, strict=True)
            for name, value in zip(names, values, strict=True)
            if measured
        }

    def _validate_object(self, step: int, number: int, item: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Metrics of one held-out object for each guidance scale; writes its pictures."""
        batch = {key: value.to(self.processes.device) for key, value in collate([item]).items()}
        encoded = encode_batch(self.frozen, batch)
        condition = ViewCondition(
            encoded["condition_mean"],
            encoded["image_embeds"],
            batch["camera_embed_normal"],
            batch["camera_embed_image"],
        )
        targets = {"normal": batch["normal_target_vae"][0] / 2 + 0.5, "colour": batch["image_target_vae"][0] / 2 + 0.5}
        picture = batch["image_cond_vae"][0] / 2 + 0.5  # (3, R, R)
        metrics = []
        for views in self._sample(condition, step, number, f"{number:03d}", picture, targets):
            colours = views["colour"], targets["colour"]
            angles = normal_angular_error(views["normal"], targets["normal"], object_mask(targets["normal"]))  # (V,)
            of_scale = {"psnr": psnr(*colours).mean(), "ssim": ssim(*colours).mean(), "normals_deg": angles.nanmean()}
            metrics.append(of_scale | ({"lpips": self.lpips(*colours).mean()} if self.lpips else {}))
        return metrics

    def _sample_photograph(self, step: int, name: str, number: int) -> None:
        """Writes the pictures of one photograph."""
        photo = self.photographs[name]
        self._sample(self._pipeline(self.frozen).encode([photo]), step, number, f"photo-{name}", np.asarray(photo))

    def _sample(
        self,
        condition: ViewCondition,
        step: int,
        number: int,
        name: str,
        picture: Tensor | np.ndarray,
        targets: Mapping[str, Tensor] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Views of one object at each guidance scale, {"normal": (V, 3, R, R), "colour": ...} in [0, 1]; writes them.

        Their noise follows from `number`, the same in every validation. `picture` and `targets` as of `view_sheet`.
        """
        shape, validation = (len(DOMAINS), len(self.cameras), *self.latent_shape), self.config.validation

        def noise(index: int) -> Tensor:
            return draw_normal(self.config.run.seed, f"validation {index}", [number], shape)  # (1, D, V, C, h, w)

        found = []
        for scale in validation.validation_guidance_scales:
            views = sample_views(
                self.bare_unet,
                self.frozen.vae,
                self.frozen.scheduler,
                condition,
                noise,
                num_steps=validation.num_inference_steps,
                guidance_scale=scale,
                eta=validation.eta,
                cfg_order=validation.cfg_order,
            )
            found.append({domain: images[0] for domain, images in views.items()})
            shown = {domain: images.nan_to_num(0.5) for domain, images in found[-1].items()}
            if not all(images.isfinite().all() for images in found[-1].values()):
                logger.warning("after step %d the views of %s at guidance %g are not finite", step, name, scale)
            sheet = view_sheet(picture, shown, [view for view, *_ in self.cameras], targets)
            self.log.image(step, f"{name}-cfg{scale:g}", sheet, track=False)
        return found

    def _write_sheets(self, step: int) -> None:
        """Pictures of the first objects and of the first photographs, read back from what every process wrote."""
        for name, pattern in (("sheet", "[0-9]*.png"), ("photos", "photo-*.png")):
            paths = sorted(self.log.image_folder(step).glob(pattern))[:SHEET_PICTURES]
            if paths:
                rows, labels = [[np.asarray(load_image(path))] for path in paths], [path.stem for path in paths]
                self.log.image(step, name, contact_sheet(rows, None, labels, cell_height_px=SHEET_CELL_PX))

    def _pipeline(self, frozen: Frozen) -> MVDiffusionImagePipeline:
        return MVDiffusionImagePipeline(
            frozen.vae,
            frozen.image_encoder,
            self.bare_unet,
            frozen.scheduler,
            frozen.feature_extractor,
            cameras=self.cameras,
        )

    def export(self, directory: Path) -> None:
        """The whole pipeline folder with the trained UNet, in float32."""
        if self.processes.is_main_process:
            frozen = self.reload_frozen()
            frozen.scheduler.register_to_config(prediction_type=self.settings.prediction_type)
            self._pipeline(frozen).save_pretrained(directory)
