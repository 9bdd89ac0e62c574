"""The science: what is drawn for a sample, its loss, validation on held-out items, the exported folder.

The formulas are in `models.objective` and `models.denoise`; here they meet the data and the run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import draw_integers, draw_normal, draw_uniform
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

SHEET_ROWS = 8


def objective_settings(loss: RefinerLoss, prediction_type: PredictionType) -> ObjectiveSettings:
    """The loss section as the objective takes it."""
    return ObjectiveSettings(
        condition_dropout_prob=loss.condition_dropout_prob if loss.use_classifier_free_guidance else None,
        noise_offset=loss.noise_offset,
        input_perturbation=loss.input_perturbation,
        prediction_type=prediction_type,
        snr_gamma=loss.snr_gamma,
        snr_mode=loss.snr_mode,
        cond_loss_weight=loss.cond_loss_weight,
    )


def draw(
    seed: int, sample_numbers: Sequence[int], latent_shape: Sequence[int], embed_width: int, num_timesteps: int
) -> RefinerDraws:
    """Every random number of the loss, each a function of (seed, sample number), on the CPU.

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
        random_p=draw_uniform(seed, "condition dropout", numbers),  # (B,)
        offset_noise=pairs("noise offset", (channels, 1, 1)),  # (2B, 4, 1, 1)
        perturb_noise=pairs("input perturbation", latent_shape),  # (2B, 4, h, w)
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
    embeds = embed_images(components, list(batch["cond_u8"].cpu().numpy()))  # (B, D)
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
        draws = draw(self.config.run.seed, numbers, latents.shape[1:], embeds.shape[1], num_timesteps)
        draws = RefinerDraws(**{name: value.to(latents.device) for name, value in vars(draws).items()})
        inputs = RefinerInputs(**encoded, text_embeds=self.null_text, has_cond=batch["has_cond"])
        result = repair_loss(self.unet, inputs, draws, self.constants, self.settings)
        mse = result.per_row_mse
        return StepOutput(result.loss, {"mse_cond": mse[::2].mean(), "mse_target": mse[1::2].mean()})

    def validate(self, step: int) -> dict[str, float]:
        """Repairs the held-out items, split over the processes: pictures and mean metrics.

        `psnr_render` (the untouched render) and `psnr_vae` (the target through the VAE, the best a repair can reach)
        frame `psnr`.
        """
        processes, count = self.processes, len(self.held_out)
        count = min(count, self.config.validation.max_validation_items or count)
        totals: dict[str, Tensor] = {}
        for index in self.stop.share(count):
            for name, value in self._validate_item(step, index).items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value
        names = ["psnr", "ssim", "psnr_render", "psnr_vae"] + (["lpips", "lpips_render"] if self.lpips else [])
        zero = torch.zeros((), device=processes.device)
        sums = processes.reduce(torch.stack([totals.get(name, zero).float() for name in names]), "sum")
        processes.wait_for_everyone()
        if processes.is_main_process:
            self._write_sheet(step, count)
        return dict(zip(names, (sums / count).tolist(), strict=True))

    def _validate_item(self, step: int, index: int) -> dict[str, Tensor]:
        """Metrics of one held-out item; writes its pictures."""
        batch = _batch_of_one(self.held_out.validation_sample(index), self.processes.device)
        encoded = encode_batch(self.components, batch)
        seed, name = self.config.run.seed, f"{index:03d}"
        one_window = {**encoded, "image_embeds": encoded["image_embeds"][None], "has_cond": batch["has_cond"]}
        repaired = repair_frames(
            self.components, self.cond_cache, self.sampling, one_window, seed=seed, numbers=[index]
        )  # (1, 3, H, H)
        render, gt, cond = (batch[key] / 2 + 0.5 for key in ("render", "gt", "prompt_img"))  # (1, 3, H, H) in [0, 1]
        for kind, image in {"render": render, "repaired": repaired, "gt": gt, "cond": cond}.items():
            self.log.image(step, f"{name}-{kind}", to_uint8(image[0]), track=False)
        metrics = {
            "psnr": psnr(repaired, gt),
            "ssim": ssim(repaired, gt),
            "psnr_render": psnr(render, gt),
            "psnr_vae": psnr(decode(self.components.vae, encoded["gt_latents"]), gt),
        }
        if self.lpips:
            metrics |= {"lpips": self.lpips(repaired, gt), "lpips_render": self.lpips(render, gt)}
        return {metric: value.mean() for metric, value in metrics.items()}

    def _write_sheet(self, step: int, count: int) -> None:
        """One picture of the first items, read back from what every process wrote."""
        kinds, folder = ("render", "repaired", "gt", "cond"), self.log.image_folder(step)
        rows = [
            [np.asarray(load_image(folder / f"{index:03d}-{kind}.png")) for kind in kinds]
            for index in range(min(count, SHEET_ROWS))
        ]
        self.log.image(step, "sheet", contact_sheet(rows, list(kinds)))

    def export(self, directory: Path) -> None:
        """The whole pipeline folder with the trained UNet, all in float32, as a reload of the original gives it."""
        if not self.processes.is_main_process:
            return
        fresh = self.reload_components()
        fresh.unet.load_state_dict({k: v.float() for k, v in self.components.unet.state_dict().items()})
        fresh.prediction_type = self.settings.prediction_type
        fresh.pipeline().save_pretrained(directory)


def _batch_of_one(sample: dict[str, Any], device: torch.device) -> dict[str, Any]:
    tensors = {key: torch.from_numpy(np.array(value))[None] for key, value in sample.items()}  # (1, ...)
    return {key: value if key == "cond_u8" else value.to(device) for key, value in tensors.items()}
