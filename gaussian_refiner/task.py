"""The science: what is drawn for a sample, its loss, validation on held-out items, the exported folder.

The formulas are in `models.objective` and `models.denoise`; here they meet the data and the run.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import BAD_SAMPLE_ERRORS, collate, draw_integers, draw_normal, draw_uniform, on_device
from common.log import RunLog
from common.loop import StepOutput
from common.metrics import Lpips, psnr, ssim
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image, to_uint8
from gaussian_refiner.config import RefinerConfig, RefinerLoss
from gaussian_refiner.data import RefinerDataset
from gaussian_refiner.models.components import Components, embed_images
from gaussian_refiner.models.denoise import decode, encode
from gaussian_refiner.models.objective import (
    ObjectiveSettings,
    PredictionType,
    RefinerDraws,
    RefinerInputs,
    repair_loss,
)
from gaussian_refiner.models.self_mutual_attention import CondCache
from gaussian_refiner.repair import repair_frames, sampling

logger = logging.getLogger(__name__)

SHEET_ROWS = 8


def objective_settings(loss: RefinerLoss, prediction_type: PredictionType) -> ObjectiveSettings:
    """The loss section as the objective takes it."""
    dropout_prob = loss.condition_dropout_prob if loss.use_classifier_free_guidance else None
    if dropout_prob and 7 * dropout_prob > 1:
        logger.warning(
            "condition_dropout_prob %g is above 1/7: the seven ways to drop do not fit into one, so that the last of "
            "them are rarer or missing, and no sample keeps all conditions; the original's value is 0.05",
            dropout_prob,
        )
    return ObjectiveSettings(
        condition_dropout_prob=dropout_prob,
        noise_offset=loss.noise_offset,
        input_perturbation=loss.input_perturbation,
        prediction_type=prediction_type,
        snr_gamma=loss.snr_gamma,
        snr_mode=loss.snr_mode,
        cond_loss_weight=loss.cond_loss_weight,
    )


def draw(
    settings: ObjectiveSettings,
    seed: int,
    sample_numbers: Sequence[int],
    latent_shape: Sequence[int],
    embed_width: int,
    num_timesteps: int,
) -> RefinerDraws:
    """Every random number that the loss needs, each a function of (seed, sample number), on the CPU.

    Args:
        sample_numbers: (B,).
        latent_shape: (4, h, w) of one image.
        embed_width: D, of the image embedding.
    """
    numbers = [int(n) for n in sample_numbers]
    channels = latent_shape[0]

    def pairs(purpose: str, shape: Sequence[int]) -> Tensor:
        return draw_normal(seed, purpose, numbers, (2, *shape)).flatten(0, 1)  # (2B, *shape)

    return RefinerDraws(
        image_embed_noise=draw_normal(seed, "image embedding noise", numbers, (embed_width,)),  # (B, D)
        noise=pairs("noise", latent_shape),  # (2B, 4, h, w)
        timesteps=draw_integers(seed, "timestep", numbers, 0, num_timesteps),  # (B,)
        random_p=draw_uniform(seed, "condition dropout", numbers) if settings.condition_dropout_prob else None,  # (B,)
        offset_noise=pairs("noise offset", (channels, 1, 1)) if settings.noise_offset else None,  # (2B, 4, 1, 1)
        perturb_noise=pairs("input perturbation", latent_shape) if settings.input_perturbation else None,  # as noise
    )


def encode_batch(components: Components, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Latents and image embeddings of a batch of windows; a batch of cached windows holds them already.

    Returns:
        `render_latents`, `cond_latents`, `gt_latents` (B, 4, h, w) and `image_embeds` (B, D), float32.
    """
    names = ("render_latents", "cond_latents", "gt_latents", "image_embeds")
    if names[0] in batch:
        return {name: batch[name].float() for name in names}
    pixels = torch.cat([batch["prompt_img"], batch["render"], batch["gt"]])  # (3B, 3, H, H)
    cond, render, gt = encode(components.vae, pixels).chunk(3)  # (B, 4, h, w) each
    embeds = embed_images(components, batch["cond_u8"])  # (B, D)
    return dict(zip(names, (render, cond, gt, embeds), strict=True))


class RefinerTask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        components: frozen parts on the device in the run's precision; `unet` is the bare one, for validation.
        unet: the prepared UNet.
        cond_cache: that of `unet`'s self-mutual attention.
        null_text, parity_text: embeddings of the empty prompt (1, tokens, C) and of the original's two (2, tokens, C).
        held_out: the validation items.
        log: where pictures go.
        stop: may end a validation between two items.
        reload_components: loads the checkpoint again in float32, for the export.
        lpips: None leaves that metric out.
    """

    def __init__(
        self,
        config: RefinerConfig,
        processes: Processes,
        components: Components,
        unet: nn.Module,
        cond_cache: CondCache,
        null_text: Tensor,
        parity_text: Tensor,
        held_out: RefinerDataset,
        log: RunLog,
        stop: StopSignal,
        reload_components: Callable[[], Components],
        lpips: Lpips | None,
    ):
        self.config, self.processes, self.components, self.unet = config, processes, components, unet
        self.cond_cache, self.held_out, self.log, self.stop = cond_cache, held_out, log, stop
        self.reload_components, self.lpips = reload_components, lpips
        self.constants = components.constants(processes.device)
        self.null_text = null_text
        self.sampling = sampling(config.validation, null_text, parity_text)
        self.settings = objective_settings(config.loss, components.prediction_type)

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The repair loss of one micro-batch."""
        with torch.no_grad():
            encoded = encode_batch(self.components, batch)
        latents, embeds = encoded["gt_latents"], encoded["image_embeds"]
        numbers, num_timesteps = batch["sample_number"].tolist(), len(self.constants.alphas_cumprod)
        draws = draw(self.settings, self.config.run.seed, numbers, latents.shape[1:], embeds.shape[1], num_timesteps)
        draws = on_device(draws, latents.device)
        inputs = RefinerInputs(**encoded, text_embeds=self.null_text, has_cond=batch["has_cond"])
        result = repair_loss(self.unet, inputs, draws, self.constants, self.settings)
        mse = result.per_row_mse
        return StepOutput(result.loss, {"mse_cond": mse[::2].mean(), "mse_target": mse[1::2].mean()})

    def validate(self, step: int) -> dict[str, float]:
        """Repairs the held-out items, split over the processes: pictures and mean metrics.

        `psnr_render` (the untouched render) and `psnr_vae` (the target through the VAE, the best a repair can reach)
        frame `psnr`. Items that cannot be read or whose metrics are not finite are left out, with a warning.
        """
        processes, count = self.processes, len(self.held_out)
        count = min(count, self.config.validation.max_validation_items or count)
        names = ["psnr", "ssim", "psnr_render", "psnr_vae"] + (["lpips", "lpips_render"] if self.lpips else [])
        # Every row is zero on all processes but one, so that their sum is the table; the last column: measured.
        table = torch.zeros(count, len(names) + 1, dtype=torch.float64, device=processes.device)
        for index in self.stop.share(count):
            if metrics := self._validate_item(step, index):
                table[index] = torch.tensor([*(metrics[name] for name in names), 1.0], dtype=table.dtype)
        table = processes.reduce(table, "sum")
        processes.wait_for_everyone()
        measured = table[:, -1].nonzero()[:, 0]  # (measured items,)
        if processes.is_main_process and len(measured):
            self._write_sheet(step, measured[:SHEET_ROWS].tolist())
        return dict(zip(names, table[measured, :-1].mean(dim=0).tolist(), strict=True)) if len(measured) else {}

    def _validate_item(self, step: int, index: int) -> dict[str, float]:
        """Metrics of one held-out item; writes its pictures. Neither if it cannot be measured."""
        item = self.held_out.pairs[index].name
        try:
            sample = self.held_out.validation_sample(index)
        except BAD_SAMPLE_ERRORS as error:
            logger.warning("held-out item %s is left out of the validation after step %d: %s", item, step, error)
            return {}
        batch = {
            key: value.to(self.processes.device) if isinstance(value, Tensor) else value
            for key, value in collate([sample]).items()
        }  # (1, ...)
        encoded = encode_batch(self.components, batch)
        seed = self.config.run.seed
        one_window = {**encoded, "image_embeds": encoded["image_embeds"][None], "has_cond": batch["has_cond"]}
        repaired = repair_frames(
            self.components, self.cond_cache, self.sampling, one_window, seed=seed, numbers=[index]
        )  # (1, 3, H, H)
        render, gt, cond = (batch[key] / 2 + 0.5 for key in ("render", "gt", "prompt_img"))  # (1, 3, H, H) in [0, 1]
        found = {
            "psnr": psnr(repaired, gt),
            "ssim": ssim(repaired, gt),
            "psnr_render": psnr(render, gt),
            "psnr_vae": psnr(decode(self.components.vae, encoded["gt_latents"]), gt),
        }
        if self.lpips:
            found |= {"lpips": self.lpips(repaired, gt), "lpips_render": self.lpips(render, gt)}
        metrics = {name: value.mean().item() for name, value in found.items()}
        if not all(map(math.isfinite, metrics.values())):
            logger.warning("held-out item %s is left out of the validation after step %d: %s", item, step, metrics)
            return {}
        for kind, image in {"render": render, "repaired": repaired, "gt": gt, "cond": cond}.items():
            self.log.image(step, f"{index:03d}-{kind}", to_uint8(image[0]), track=False)
        return metrics

    def _write_sheet(self, step: int, indices: Sequence[int]) -> None:
        """One picture of some items, read back from what every process wrote."""
        kinds, folder = ("render", "repaired", "gt", "cond"), self.log.image_folder(step)
        rows = [[np.asarray(load_image(folder / f"{index:03d}-{kind}.png")) for kind in kinds] for index in indices]
        self.log.image(step, "sheet", contact_sheet(rows, list(kinds)))

    def export(self, directory: Path) -> None:
        """The whole pipeline folder with the trained UNet, all in float32, as a reload of the original gives it."""
        if not self.processes.is_main_process:
            return
        fresh = self.reload_components()
        fresh.unet.load_state_dict({k: v.float() for k, v in self.components.unet.state_dict().items()})
        fresh.prediction_type = self.settings.prediction_type
        fresh.pipeline().save_pretrained(directory)
