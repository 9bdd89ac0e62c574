"""The science: what is drawn for a sample, its loss, generated samples in validation, the exported folder.

The formulas are in `models.objective` and the network; here they meet the data and the run.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data import draw_integers, draw_normal, draw_uniform, on_device, rng_for
from common.log import RunLog
from common.loop import StepOutput
from common.runtime import Processes, StopSignal
from common.video import contact_sheet, load_image
from diffnext.config import NovaConfig, NovaValidation
from diffnext.models.embeddings import DEFAULT_FLOW
from diffnext.models.generation import GenerationSettings, SampleDraws
from diffnext.models.guidance import Guidance
from diffnext.models.masking import mask_ratio
from diffnext.models.noise import FlowMatchingNoise, NoiseSchedule, noise_schedule
from diffnext.models.objective import NovaDraws, nova_inputs, total_loss
from diffnext.models.text_encoders.phi import text_rows
from diffnext.pipelines import Components, NonFiniteResult, NOVAPipeline

FPS, STRIP_FRAMES = 12, 5
MAX_LATENT_LENGTH = 9  # latent frames of a validation clip, 33 frames, as the original's demonstrations have
TEXT_PARTS = ("text_encoder", "tokenizer")

logger = logging.getLogger(__name__)


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
        timesteps = draw_integers(seed, "timestep", sample_numbers, 0, len(noise.alphas_cumprod), per_token)
    return NovaDraws(
        posterior_noise=draw_normal(seed, "posterior", sample_numbers, latent_shape),  # (B, C, [T,] H, W)
        text_dropout=draw_uniform(seed, "text dropout", sample_numbers),  # (B,)
        token_order=draw_uniform(seed, "token order", sample_numbers, (num_frames, num_tokens, 1)).flatten(0, 1),
        mask_ratio=mask_ratio(float(rng_for(seed, "mask ratio", step).random())),
        noise=rows(draw_normal(seed, "noise", sample_numbers, (*per_token, values))),  # (R B T, N, V)
        timesteps=rows(timesteps),  # (R B T, N)
    )


def sampling(validation: NovaValidation, parts: Components) -> GenerationSettings:
    """What validation asks the model for; a length that is not given is the longest that network and VAE take."""
    longest = min(parts.transformer.config.video_base_size[0], MAX_LATENT_LENGTH)
    tiling = getattr(parts.vae, "tiling", None)
    return GenerationSettings(
        validation.num_inference_steps,
        validation.num_diffusion_steps,
        validation.max_latent_length or (tiling.whole_latents(longest) if tiling else longest),
        Guidance(validation.guidance_scale),
    )


def check_parts(validation: NovaValidation, parts: Components, has_encoded_text: bool) -> None:
    """ValueError if a part that the run needs is left out, or if validation could not generate what it is to."""
    reasons = {} if has_encoded_text else dict.fromkeys(TEXT_PARTS, "encodes the texts of the data set")
    reasons |= dict.fromkeys(TEXT_PARTS, "encodes validation.prompts") if validation.prompts else {}
    reasons |= {"vae_config": "says how latents are scaled"}
    for name, reason in reasons.items():
        if getattr(parts, name) is None:
            part = name.removesuffix("_config")
            raise ValueError(
                f"pipeline.paths.module_dict.{part} is empty, or model_index.json leaves out the {part}, which "
                f"{reason}: name its folder there"
            )
    if validation.prompts:
        _pipeline(parts).check(sampling(validation, parts))


def _pipeline(parts: Components) -> NOVAPipeline:
    return NOVAPipeline(parts.transformer, parts.scheduler, parts.vae, parts.text_encoder, parts.tokenizer)


class NovaTask:
    """Training step, validation and export of one run.

    Args:
        processes: the Accelerator.
        transformer: the prepared network.
        components: of the pipeline, on the device; `transformer` is the one inside the prepared network.
        log: where samples go.
        stop: may end a validation between two prompts.
        dtype: autocast type of validation; float32 is none.
    """

    def __init__(
        self,
        config: NovaConfig,
        processes: Processes,
        transformer: nn.Module,
        components: Components,
        log: RunLog,
        stop: StopSignal,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.processes, self.transformer, self.components = config, processes, transformer, components
        self.log, self.stop, self.dtype = log, stop, dtype
        self.noise = noise_schedule(components.scheduler_config)

    def training_step(self, batch: dict[str, Any], step: int) -> StepOutput:
        """The loss of one micro-batch of cached latents."""
        moments, loss, parts = batch["moments"], self.config.loss, self.components  # (B, 2C, [T,] H, W)
        network, numbers = parts.transformer, batch["sample_number"].tolist()
        latent_shape = (moments.shape[1] // 2, *moments.shape[2:])
        patch = network.config.patch
        draws = draw(self.config.run.seed, step, numbers, latent_shape, patch, loss.loss_repeat, self.noise)
        draws = on_device(draws, moments.device)
        latents = nova_inputs(
            moments, draws.posterior_noise, parts.vae_config.scaling_factor, parts.vae_config.shift_factor
        )
        prompts = batch["prompt"] if "prompt" in batch else [np.array(embed.values) for embed in batch["prompt_embed"]]
        flow = batch.get("flow", torch.full((len(moments),), DEFAULT_FLOW)).to(moments.device, torch.float32)  # (B,)
        losses = self.transformer(
            latents,
            draws,
            self.noise,
            text=text_rows(prompts, network.text_embed, parts.text_encoder, parts.tokenizer),
            flow=flow,
            loss_repeat=loss.loss_repeat,
            text_dropout=loss.text_dropout,
        )
        return StepOutput(total_loss(losses, loss.t2i_weight), losses if len(losses) > 1 else {})

    def validate(self, step: int) -> dict[str, float]:
        """Generates the configured prompts, split over the processes: pictures or clips, no metric.

        A result that is not finite is named in the log and left out.
        """
        prompts = self.config.validation.prompts
        for number in self.stop.share(len(prompts)):
            try:
                frames = self._generate(prompts[number], number)  # (T, H, W, 3)
            except NonFiniteResult as error:
                logger.warning("validation at step %d leaves out %r: %s", step, prompts[number], error)
                continue
            if len(frames) == 1:
                self.log.image(step, f"{number:03d}", frames[0], track=False)
            else:
                self.log.video(step, f"{number:03d}", frames, FPS)
            self.log.image(step, f"{number:03d}-frames", _strip(frames), track=False)
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            strips = [self.log.image_folder(step) / f"{number:03d}-frames.png" for number in range(len(prompts))]
            made = [(prompts[number][:40], path) for number, path in enumerate(strips) if path.exists()]
            if made:
                rows = [[np.asarray(load_image(path))] for _, path in made]
                self.log.image(step, "sheet", contact_sheet(rows, None, [text for text, _ in made]))
        return {}

    def _generate(self, prompt: str, number: int) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        settings = sampling(self.config.validation, self.components)
        with torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = _pipeline(self.components)(
                prompt,
                settings.num_inference_steps,
                settings.num_diffusion_steps,
                settings.max_latent_length,
                settings.guidance.scale,
                motion_flow=self.config.validation.motion_flow,
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
