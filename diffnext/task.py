"""The science: what is drawn for a sample, its loss, generated samples in validation, the exported folder.

The formulas are in `models.objective` and the network; here they meet the data and the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import draw_integers, draw_normal, draw_uniform, rng_for
from common.log import RunLog
from common.loop import StepOutput
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image
from diffnext.config import NovaConfig
from diffnext.models.embeddings import DEFAULT_FLOW
from diffnext.models.generation import SampleDraws
from diffnext.models.masking import mask_ratio
from diffnext.models.noise import FlowMatchingNoise, NoiseSchedule, noise_schedule
from diffnext.models.objective import NovaDraws, nova_inputs, total_loss
from diffnext.models.text_encoders.phi import text_rows
from diffnext.pipelines import Components, NOVAPipeline

NUM_TIMESTEPS, FPS, STRIP_FRAMES = 1000, 12, 5
MAX_LATENT_LENGTH = 9  # latent frames of a validation clip, 33 frames, as the original's demonstrations have


def draw(
    seed: int,
    step: int,
    sample_numbers: Sequence[int],
    latent_shape: Sequence[int],
    patch: int,
    loss_repeat: int,
    noise: NoiseSchedule,
) -> NovaDraws:
    """Every random number of the loss: each a function of (seed, sample number), the mask ratio of (seed, step).

    Args:
        latent_shape: (C, H, W) or (C, T, H, W) of one sample.
        patch: side of an image token in latent pixels.
    """
    channels, *frames, height, width = latent_shape
    num_frames, num_tokens = (frames or [1])[0], height * width // patch**2
    values = channels * patch**2

    def rows(draws: Tensor) -> Tensor:
        """(B, R, T, ...) -> (R B T, ...)."""
        return draws.transpose(0, 1).flatten(0, 2)

    per_token = (loss_repeat, num_frames, num_tokens)
    if isinstance(noise, FlowMatchingNoise):
        timesteps = draw_normal(seed, "timestep", sample_numbers, per_token)  # (B, R, T, N)
    else:
        timesteps = draw_integers(seed, "timestep", sample_numbers, 0, NUM_TIMESTEPS, per_token)
    return NovaDraws(
        posterior_noise=draw_normal(seed, "posterior", sample_numbers, latent_shape),  # (B, C, [T,] H, W)
        text_dropout=draw_uniform(seed, "text dropout", sample_numbers),  # (B,)
        token_order=draw_uniform(seed, "token order", sample_numbers, (num_frames, num_tokens, 1)).flatten(0, 1),
        mask_ratio=mask_ratio(float(rng_for(seed, "mask ratio", step).random())),
        noise=rows(draw_normal(seed, "noise", sample_numbers, (*per_token, values))),  # (R B T, N, V)
        timesteps=rows(timesteps),  # (R B T, N)
    )


class NovaTask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        transformer: the prepared network.
        components: of the pipeline, on the device; `transformer` is the one inside the prepared network.
        log: where samples go.
        stop: may end a validation between two prompts.
    """

    def __init__(
        self,
        config: NovaConfig,
        processes: Processes,
        transformer: nn.Module,
        components: Components,
        log: RunLog,
        stop: StopSignal,
    ):
        self.config, self.processes, self.transformer, self.components = config, processes, transformer, components
        self.log, self.stop = log, stop
        self.noise = noise_schedule(components.scheduler_config)

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch of cached latents."""
        moments, loss, parts = batch["moments"], self.config.loss, self.components  # (B, 2C, [T,] H, W)
        network, numbers = parts.transformer, batch["sample_number"].tolist()
        latent_shape = (moments.shape[1] // 2, *moments.shape[2:])
        patch = network.config.patch
        draws = draw(self.config.run.seed, step, numbers, latent_shape, patch, loss.loss_repeat, self.noise)
        on_device = {k: v.to(moments.device) if isinstance(v, Tensor) else v for k, v in vars(draws).items()}
        latents = nova_inputs(
            moments, on_device["posterior_noise"], parts.vae_config.scaling_factor, parts.vae_config.shift_factor
        )
        prompts = batch["prompt"] if "prompt" in batch else [np.array(embed.values) for embed in batch["prompt_embed"]]
        flow = batch.get("flow", torch.full((len(moments),), DEFAULT_FLOW)).to(moments.device, torch.float32)  # (B,)
        losses = self.transformer(
            latents,
            NovaDraws(**on_device),
            self.noise,
            text=text_rows(prompts, network.text_embed, parts.text_encoder, parts.tokenizer),
            flow=flow,
            loss_repeat=loss.loss_repeat,
            text_dropout=loss.text_dropout,
        )
        return StepOutput(total_loss(losses, loss.t2i_weight), losses if len(losses) > 1 else {})

    def validate(self, step: int) -> dict[str, float]:
        """Generates the configured prompts, split over the processes: pictures or clips, no metric."""
        prompts = self.config.validation.prompts
        for number in self.stop.share(len(prompts)):
            frames = self._generate(prompts[number], number)  # (T, H, W, 3)
            if len(frames) == 1:
                self.log.image(step, f"{number:03d}", frames[0], track=False)
            else:
                self.log.video(step, f"{number:03d}", frames, FPS)
            self.log.image(step, f"{number:03d}-frames", _strip(frames), track=False)
        self.processes.wait_for_everyone()
        if prompts and self.processes.is_main_process:
            folder = self.log.image_folder(step)
            rows = [[np.asarray(load_image(folder / f"{n:03d}-frames.png"))] for n in range(len(prompts))]
            self.log.image(step, "sheet", contact_sheet(rows, None, [text[:40] for text in prompts]))
        return {}

    def _generate(self, prompt: str, number: int) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        parts, validation = self.components, self.config.validation
        pipeline = NOVAPipeline(parts.transformer, parts.scheduler, parts.vae, parts.text_encoder, parts.tokenizer)
        longest = parts.transformer.config.video_base_size[0]
        with torch.autocast(self.processes.device.type, enabled=False):
            output = pipeline(
                prompt,
                validation.num_inference_steps,
                validation.num_diffusion_steps,
                validation.max_latent_length or min(longest, MAX_LATENT_LENGTH),
                validation.guidance_scale,
                motion_flow=validation.motion_flow,
                disable_progress_bar=True,
                output_type="np",
                draws=SampleDraws([rng_for(self.config.run.seed, "generation", number)]),
            )
        return output.images if output.frames is None else output.frames[0]  # type: ignore[return-value]

    def export(self, directory: Path) -> None:
        """`transformer/`, which takes the place of that folder in a NOVA pipeline."""
        if self.processes.is_main_process:
            self.components.transformer.save_pretrained(directory / "transformer")


def _strip(frames: np.ndarray) -> np.ndarray:
    """Some frames of a clip side by side."""
    chosen = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    return np.concatenate([frames[index] for index in chosen], axis=1)
