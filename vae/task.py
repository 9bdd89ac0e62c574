"""The science: what is drawn for a sample, whose turn it is, validation on held-out clips, the exported folder.

The formulas are in `models.objective`; here they meet the data and the run.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import collate, draw_normal
from common.log import RunLog
from common.loop import StepOutput
from common.metrics import Lpips, flicker, psnr, ssim
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image
from vae.config import VaeConfig, VaeLoss
from vae.data import EvalClips, read_in_threads, to_uint8_frames
from vae.models.discriminator import RealAndFake
from vae.models.objective import ObjectiveSettings, discriminator_loss, generator_loss, is_discriminator_step
from vae.models.perceptual import PerceptualLoss
from vae.models.posterior import DiagonalGaussian

logger = logging.getLogger(__name__)

REPORTED = ("nll_loss", "kl_loss", "wl_loss", "g_loss", "d_weight", "rec_per_pixel", "lpips")
SHEET_FRAMES, SHEET_CLIPS, LOGGED_FPS = 5, 8, 10
METRIC_FRAMES = 8  # that are measured at once: SSIM holds a dozen copies of them in float64


def objective_settings(loss: VaeLoss) -> ObjectiveSettings:
    """The loss section as the objective takes it."""
    return ObjectiveSettings(
        disc_start=loss.disc_start,
        disc_weight=loss.disc_weight,
        kl_weight=loss.kl_weight,
        perceptual_weight=loss.perceptual_weight,
        loss_type=loss.loss_type,
        logvar=loss.logvar_init,
        wavelet_weight=loss.wavelet_weight,
        disc_loss=loss.disc_loss,
    )


class VaeTask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        vae, bare_vae: the prepared autoencoder and the one inside it.
        adversary, bare_adversary: the same of the discriminator.
        perceptual: None where its weight is 0.
        eval_clips: None skips validation.
        log: where clips and pictures go.
        stop: may end a validation between two batches.
        lpips: None leaves that metric out.
    """

    def __init__(
        self,
        config: VaeConfig,
        processes: Processes,
        vae: nn.Module,
        bare_vae: Any,
        adversary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        bare_adversary: RealAndFake,
        perceptual: PerceptualLoss | None,
        eval_clips: EvalClips | None,
        log: RunLog,
        stop: StopSignal,
        lpips: Lpips | None,
    ):
        self.config, self.processes, self.vae, self.bare_vae = config, processes, vae, bare_vae
        self.adversary, self.bare_adversary, self.perceptual = adversary, bare_adversary, perceptual
        self.eval_clips, self.log, self.stop, self.lpips = eval_clips, log, stop, lpips
        self.settings = objective_settings(config.loss)

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch: the discriminator's in its turns, else the autoencoder's."""
        if self.config.model.freeze_encoder:  # the loop sets all to train mode
            for module in self.bare_vae.encoder_modules():
                module.eval()
        video = batch["video"]  # (B, 3, T, R, R)
        shape = self.bare_vae.latent_shape(*video.shape[2:])
        numbers = batch["sample_number"].tolist()
        noise = draw_normal(self.config.run.seed, "posterior", numbers, shape).to(video.device)  # (B, z, t, h, w)
        if is_discriminator_step(step, self.settings.disc_start):
            with torch.no_grad():
                fake = self.bare_vae(video, noise).sample  # (B, 3, T, R, R)
            loss, metrics = discriminator_loss(*self.adversary(video, fake), self.settings, step)
            return StepOutput(loss, metrics, optimizer="discriminator")
        output = self.vae(video, noise)
        if not self.config.loss.wavelet_loss:
            output = output._replace(coefficients=())
        loss, metrics = generator_loss(
            video,
            output,
            self.bare_vae.last_layer,
            self.bare_adversary.discriminator,
            self.perceptual,
            self.settings,
            step,
        )
        reported = {name: metrics[name] for name in REPORTED if name in metrics}
        posterior = DiagonalGaussian(output.moments.detach().float())
        return StepOutput(loss, reported | {"latents_std": posterior.sample(noise).std()})

    def validate(self, step: int) -> dict[str, float]:
        """Reconstructs the validation clips, split over the processes: mean metrics over frames in [0, 1], clips.

        The posterior's mode is decoded. Clips that cannot be read are left out and named in the log.
        """
        if self.eval_clips is None:
            return {}
        count = len(self.eval_clips)
        num_batches = -(-count // self.config.validation.eval_batch_size)
        own = range(self.processes.process_index, num_batches, self.processes.num_processes)  # as `share` deals them
        names = ["psnr", "ssim", "flicker"] + (["lpips"] if self.lpips else [])
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # the last one counts clips
        videos: dict[int, np.ndarray] = {}
        numbers = [number for batch in own for number in self._numbers(batch)]
        with closing(read_in_threads(self.eval_clips.sample, numbers, self.config.data.num_workers)) as reading:
            for batch in self.stop.share(num_batches):
                samples = self._readable(islice(reading, len(self._numbers(batch))))
                if not samples:
                    continue
                real = collate(list(samples.values()))["video"].to(self.processes.device)  # (B, 3, T, R, R)
                fake = self._reconstruct(real)
                for number, one, other in zip(samples, real, fake, strict=True):
                    self._show(step, number, one, other, videos)
                metrics = self._measure(real.clamp(-1, 1) / 2 + 0.5, fake.clamp(-1, 1) / 2 + 0.5)
                sums += torch.tensor([*(metrics[name] for name in names), len(samples)], dtype=torch.float64)
        sums = self.processes.reduce(sums.float().to(self.processes.device), "sum").cpu()
        if not sums[-1]:
            raise ValueError(f"none of the {count} validation clips can be read; the reasons are in the log")
        self._write_videos(step, videos)
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            self._write_sheet(step, count)
        return dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def _numbers(self, batch: int) -> range:
        """The validation clips of a batch."""
        size, count = self.config.validation.eval_batch_size, len(self.eval_clips or ())
        return range(batch * size, min((batch + 1) * size, count))

    def _readable(self, outcomes: Iterable[tuple[int, dict[str, Any] | None, str]]) -> dict[int, dict[str, Any]]:
        """Those clips that can be read, by number."""
        samples = {}
        for number, sample, reason in outcomes:
            if sample is None:
                logger.warning("a validation clip is left out: %s", reason)
            else:
                samples[number] = sample
        return samples

    def _reconstruct(self, real: Tensor) -> Tensor:
        """(B, 3, T, R, R) -> the same of the posterior's mode; in pieces with `enable_tiling`, as never in training."""
        if self.config.model.enable_tiling:
            self.bare_vae.enable_tiling()
        fake = self.bare_vae(real).sample.float()
        self.bare_vae.disable_tiling()
        return fake

    def _measure(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Sums over the clips of a batch of each clip's mean metrics; (B, 3, T, R, R) in [0, 1]."""
        frames = [clips.transpose(1, 2).flatten(0, 1).split(METRIC_FRAMES) for clips in (fake, real)]  # (<= 8, 3, R, R)
        of_frames = {"psnr": psnr, "ssim": ssim} | ({"lpips": self.lpips} if self.lpips else {})
        metrics = {
            name: sum(metric(*some).sum().item() for some in zip(*frames, strict=True)) / real.shape[2]
            for name, metric in of_frames.items()
        }
        return metrics | {
            "flicker": sum(flicker(*pair).item() for pair in zip(fake.split(1), real.split(1), strict=True))
        }

    def _show(self, step: int, number: int, real: Tensor, fake: Tensor, videos: dict[int, np.ndarray]) -> None:
        """The first clips into `videos`, the input on the left; a row of the sheet for some more."""
        num_videos = self.config.validation.eval_num_video_log
        if number >= max(num_videos, SHEET_CLIPS):
            return
        sides = [to_uint8_frames(clip).cpu().numpy() for clip in (real, fake)]  # (T, R, R, 3) each
        pair = np.concatenate(sides, axis=2)  # (T, R, 2 R, 3)
        if number < num_videos:
            videos[number] = pair
        if number < SHEET_CLIPS:
            chosen = np.linspace(0, len(pair) - 1, min(SHEET_FRAMES, len(pair))).round().astype(int)
            row = contact_sheet([[pair[index] for index in chosen]], [f"frame {index}" for index in chosen])
            self.log.image(step, f"{number:03d}", row, track=False)

    def _write_videos(self, step: int, videos: dict[int, np.ndarray]) -> None:
        """The first clips of all processes, by the main one, whose trackers show them; called on all of them."""
        validation, device = self.config.validation, self.processes.device
        side = validation.eval_resolution
        nothing = np.zeros((validation.eval_num_frames, side, 2 * side, 3), np.uint8)  # (T, R, 2 R, 3)
        are_there = torch.tensor([float(number in videos) for number in range(validation.eval_num_video_log)])
        for (number,) in self.processes.reduce(are_there.to(device), "sum").nonzero().tolist():
            frames = torch.from_numpy(videos.get(number, nothing)).to(device)  # (T, R, 2 R, 3)
            frames = self.processes.reduce(frames, "sum").cpu().numpy()  # of all processes one has the clip
            if self.processes.is_main_process:
                self.log.video(step, f"{number:03d}", frames, LOGGED_FPS)

    def _write_sheet(self, step: int, count: int) -> None:
        """One picture of the first clips, from what every process wrote."""
        folder = self.log.image_folder(step)
        rows = [folder / f"{number:03d}.png" for number in range(min(count, SHEET_CLIPS))]
        pictures = [[np.asarray(load_image(path))] for path in rows if path.exists()]
        self.log.image(step, "sheet", contact_sheet(pictures, ["input | reconstruction"], cell_height_px=512))

    def export(self, directory: Path) -> None:
        """The autoencoder as a diffusers-style folder: config.json and safetensors weights."""
        if self.processes.is_main_process:
            self.bare_vae.save_pretrained(directory)
