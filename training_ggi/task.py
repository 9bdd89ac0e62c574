"""The science: what is drawn for a clip, its loss, generated clips in validation, the exported weights.

The formulas are in `models.objective` and `models.noise_warp`; here they meet the data and the run.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import BAD_SAMPLE_ERRORS, draw_integers, draw_normal, draw_uniform, on_device, rng_for
from common.log import RunLog
from common.loop import StepOutput
from common.metrics import psnr
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image, to_uint8
from training_ggi.config import GGIConfig
from training_ggi.data import SceneDataset
from training_ggi.front_end import ENCODED, FrontEnd, end_frames, warped_noise
from training_ggi.models.components import video_moments
from training_ggi.models.noise_warp import mix_noise
from training_ggi.models.objective import GGIConstants, GGIDraws, GGIInputs, GGILoss, ggi_loss, noisy_end_images
from training_ggi.models.raft import clip_flow
from training_ggi.sampling import generate_clip

logger = logging.getLogger(__name__)

MEASURED_TIMESTEPS = (125, 375, 625, 875)  # of the validation loss, the middles of four bins
STRIP_FRAMES = 6
VALIDATION_NUMBERS = 2**40  # sample numbers that no training reaches


def draw(
    seed: int,
    sample_numbers: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    image_size: tuple[int, int],
    num_timesteps: int,
) -> GGIDraws:
    """Every random number of the loss but the warp's, each a function of (seed, sample number), on the CPU.

    Args:
        latent_shape: (F', C, h, w) of a clip.
        image_size: (H, W) in pixels.
    """
    numbers, one_frame = [int(n) for n in sample_numbers], (1, *latent_shape[1:])

    def normal(purpose: str, shape: Sequence[int]) -> Tensor:
        return draw_normal(seed, purpose, numbers, shape)

    return GGIDraws(
        timesteps=draw_integers(seed, "timestep", numbers, 0, num_timesteps),
        alpha=draw_uniform(seed, "degradation", numbers),
        fresh_noise=normal("fresh noise", latent_shape),
        sigma_normal=normal("image noise level", ()),
        image_noise=normal("image noise", (2, 3, *image_size)),
        first_eps=normal("posterior of the first image", one_frame),
        last_eps=normal("posterior of the last image", one_frame),
        video_eps=normal("posterior of the clip", latent_shape),
        cond_eps=normal("posterior of the condition", latent_shape),
        image_dropout=draw_uniform(seed, "image dropout", numbers),
        caption_dropout=draw_uniform(seed, "caption dropout", numbers),
    )


def warp_seed(seed: int, number: int) -> int:
    """Of the noise of a sample."""
    return int(rng_for(seed, "noise warp", number).integers(2**62))


def set_seed(seed: int, scene: str, cut: int, place: int) -> int:
    """Of the noise at a place among the fixed ones of a scene's cut, wherever the scene stands in the list."""
    return int(rng_for(seed, f"noise set of {scene}", cut, place).integers(2**62))


@dataclass(frozen=True)
class HeldOut:
    """Validation clips: their data set, and the embeddings of their prompts, (tokens, D) each."""

    dataset: SceneDataset
    prompt_embeds: Sequence[Tensor]

    def read(self, index: int) -> dict[str, Any]:
        """The clip of a scene, from its middle; errors as of `SceneDataset.item`."""
        return self.dataset.item(index, self.dataset.cuts(index, 1)[0])


class GGITask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        front_end: the frozen networks, on the device in the run's precision.
        transformer, bare_transformer: the prepared one, and the one inside it.
        constants: of the objective.
        latent_shape: (F', C, h, w) of a clip.
        empty_prompt_embeds: (1, tokens, D).
        held_out: validation clips, or None.
        scheduler_config: of the base pipeline.
        log: where clips go.
        stop: may end a validation between two clips.
        write_result: writes the trained weights in the layout that others read.
    """

    def __init__(
        self,
        config: GGIConfig,
        processes: Processes,
        front_end: FrontEnd,
        transformer: nn.Module,
        bare_transformer: nn.Module,
        constants: GGIConstants,
        latent_shape: tuple[int, int, int, int],
        empty_prompt_embeds: Tensor,
        held_out: HeldOut | None,
        scheduler_config: dict[str, Any],
        log: RunLog,
        stop: StopSignal,
        write_result: Callable[[Path], None],
    ):
        self.config, self.processes, self.front_end = config, processes, front_end
        self.transformer, self.bare_transformer, self.constants = transformer, bare_transformer, constants
        self.latent_shape, self.empty_prompt_embeds = latent_shape, empty_prompt_embeds
        self.held_out, self.scheduler_config = held_out, scheduler_config
        self.log, self.stop, self.write_result = log, stop, write_result
        self.seed = int(config.run.seed)
        self.image_size = config.data.height, config.data.width

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch."""
        numbers = batch["sample_number"].tolist()
        encoded = self._encoded(batch)
        noise = self._noise(batch, encoded.get("flow"))  # (B, F', 16, h, w)
        return StepOutput(self._loss(self.transformer, encoded, noise, self._draws(numbers)).loss)

    def _encoded(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the frozen networks make of the clips; a batch of prepared ones holds it already."""
        if ENCODED[0] in batch:
            return {name: batch[name] for name in ENCODED if name in batch}
        prompts = batch["prompt"] if self.config.data.use_captions else None
        encoded = self.front_end.encode(batch["frames"], prompts, batch.get("edges"))
        if prompts is None:  # the same for all, and encoded once
            encoded["prompt_embeds"] = self.empty_prompt_embeds.expand(len(batch["frames"]), -1, -1)  # (B, tokens, D)
        return encoded

    def _noise(self, batch: dict[str, Any], flow: Tensor | None) -> Tensor:
        """The samples' warped noise, (B, F', 16, h, w); one of the prepared ones where there are any."""
        numbers, sets = batch["sample_number"].tolist(), self.config.data.noise_sets
        places = draw_integers(self.seed, "noise set", numbers, 0, sets).tolist() if sets else []
        if "noise_sets" in batch:
            return torch.stack([noises[place] for noises, place in zip(batch["noise_sets"], places, strict=True)])
        assert flow is not None, "only clips with prepared noise come without flow"
        if sets:
            cuts = zip(batch["scene"], batch["cut"].tolist(), places, strict=True)
            seeds = [set_seed(self.seed, *cut) for cut in cuts]
        else:
            seeds = [warp_seed(self.seed, number) for number in numbers]
        return warped_noise(flow, seeds, self.latent_shape[0], self.config.loss)

    def _draws(self, numbers: Sequence[int], timestep: int | None = None) -> GGIDraws:
        draws = draw(self.seed, numbers, self.latent_shape, self.image_size, len(self.constants.alphas_cumprod))
        if timestep is not None:
            draws = dataclasses.replace(draws, timesteps=torch.full_like(draws.timesteps, timestep))
        return on_device(draws, self.processes.device)

    def _loss(
        self,
        transformer: nn.Module,
        encoded: dict[str, Tensor],
        noise: Tensor,
        draws: GGIDraws,
        constants: GGIConstants | None = None,
    ) -> GGILoss:
        vae = self.front_end.vae
        images = noisy_end_images(end_frames(encoded["ends"]), draws.sigma_normal, draws.image_noise)  # (B, 2, 3, H, W)
        inputs = GGIInputs(
            first_moments=video_moments(vae, images[:, :1]),
            last_moments=video_moments(vae, images[:, 1:]),
            video_moments=encoded["video_moments"],
            cond_moments=encoded["cond_moments"],
            warped_noise=noise,
            prompt_embeds=encoded["prompt_embeds"],
            empty_prompt_embeds=self.empty_prompt_embeds,
        )
        return ggi_loss(transformer, inputs, draws, constants or self.constants)

    def validate(self, step: int) -> dict[str, float]:
        """Generates the held-out clips, split over the processes: videos, and means of what can be measured.

        Clips that cannot be read are left out, with a warning; without any other there are no metrics.

        `psnr_first`, `psnr_last`: of the two given frames. `flow_error_px`: mean distance between the optical flow of
        the generated and of the true clip, in pixels of half the size. `loss_t125`, ...: the training loss at that
        timestep.
        """
        if self.held_out is None:
            return {}
        count = len(self.held_out.dataset)
        count = min(count, self.config.validation.max_validation_items or count)
        names = ["psnr_first", "psnr_last", "flow_error_px", *(f"loss_t{t}" for t in MEASURED_TIMESTEPS)]
        sums = torch.zeros(len(names) + count, device=self.processes.device)  # of the metrics; 1 for each clip made
        for index in self.stop.share(count):
            try:
                item = self.held_out.read(index)
            except BAD_SAMPLE_ERRORS as error:
                logger.warning("held-out scene %d is not validated: %s", index, error)
                continue
            metrics = self._validate_clip(step, index, item)
            sums[: len(names)] += torch.stack([metrics[name].to(sums) for name in names])
            sums[len(names) + index] = 1
        sums, made = self.processes.reduce(sums, "sum").split([len(names), count])
        self.processes.wait_for_everyone()
        made = made.nonzero().flatten().tolist()
        if not made:
            return {}
        if self.processes.is_main_process:
            folder = self.log.image_folder(step)
            rows = [[np.asarray(load_image(folder / f"{index:03d}-frames.png"))] for index in made]
            self.log.image(step, "sheet", contact_sheet(rows, ["generated above, true below"]))
        return dict(zip(names, (sums / len(made)).tolist(), strict=True)) | {"clips": float(len(made))}

    def _validate_clip(self, step: int, index: int, item: dict[str, Any]) -> dict[str, Tensor]:
        """Metrics of one held-out clip; writes it."""
        assert self.held_out is not None, "only held-out clips are validated"
        number, device = VALIDATION_NUMBERS + index, self.processes.device
        frames = torch.from_numpy(item["frames"])[None].to(device)  # (1, F, H, W, 3)
        edges = torch.from_numpy(item["edges"])[None].to(device) if "edges" in item else None  # (1, F, H, W)
        encoded = self.front_end.encode(frames, edges=edges)
        encoded["prompt_embeds"] = self.held_out.prompt_embeds[index][None].to(device)
        warped = warped_noise(
            encoded["flow"], [warp_seed(self.seed, number)], self.latent_shape[0], self.config.loss
        ).float()
        whole = dataclasses.replace(self.constants, image_dropout_prob=0.0, caption_dropout_prob=0.0)
        losses = {
            f"loss_t{t}": self._loss(self.bare_transformer, encoded, warped, self._draws([number], t), whole).loss
            for t in MEASURED_TIMESTEPS
        }
        generated = self._generate(encoded, warped, number)  # (1, F, 3, H, W) in [0, 1]
        true = frames.movedim(-1, -3) / 255.0  # (1, F, 3, H, W)
        flows = [clip_flow(self.front_end.raft, clip * 2 - 1) for clip in (generated, true)]  # (1, F - 1, 2, h, w) each
        self._write(step, index, generated[0], true[0])
        return losses | {
            "psnr_first": psnr(generated[:, 0], true[:, 0]).mean(),
            "psnr_last": psnr(generated[:, -1], true[:, -1]).mean(),
            "flow_error_px": torch.linalg.vector_norm(flows[0] - flows[1], dim=2).mean(),
        }

    def _generate(self, encoded: dict[str, Tensor], warped: Tensor, number: int) -> Tensor:
        """(1, F, 3, H, W) in [0, 1]."""
        settings = self.config.validation
        fresh = draw_normal(self.seed, "validation noise", [number], self.latent_shape).to(warped)
        return generate_clip(
            self.bare_transformer,
            self.front_end.vae,
            end_frames(encoded["ends"]),
            encoded["cond_moments"],
            encoded["prompt_embeds"],
            self.empty_prompt_embeds,
            mix_noise(warped, fresh, settings.degradation),
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            use_dynamic_cfg=settings.use_dynamic_cfg,
            scheduler_config=self.scheduler_config,
        )

    def _write(self, step: int, index: int, generated: Tensor, true: Tensor) -> None:
        """The clip beside the true one as video, and some frames of both as a picture; (F, 3, H, W) each."""
        both = torch.cat([generated, true], dim=3)  # (F, 3, H, 2 W)
        self.log.video(step, f"{index:03d}", np.stack([to_uint8(frame) for frame in both]), self.config.validation.fps)
        chosen = np.linspace(0, len(true) - 1, min(STRIP_FRAMES, len(true))).round().astype(int)
        rows = [np.concatenate([to_uint8(clip[i]) for i in chosen], axis=1) for clip in (generated, true)]
        self.log.image(step, f"{index:03d}-frames", np.concatenate(rows), track=False)

    def export(self, directory: Path) -> None:
        """The trained weights: the LoRA and the input projection, or with train_mode full the original's folder."""
        if self.processes.is_main_process:
            self.write_result(directory)
