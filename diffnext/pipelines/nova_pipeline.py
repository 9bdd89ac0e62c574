"""From prompts to images and videos."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffnext.models.autoencoders.base import Autoencoder, VideoAutoencoder
from diffnext.models.embeddings import DEFAULT_FLOW
from diffnext.models.generation import (
    Draws,
    GenerationSettings,
    GeneratorDraws,
    check_length,
    generate,
    num_tokens_per_set,
    sampler_steps,
)
from diffnext.models.guidance import Guidance, to_uint8
from diffnext.models.text_encoders.phi import Prompt, text_rows
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel
from diffnext.pipelines.components import MODEL_INDEX, load_components

Picture = Image.Image | np.ndarray


@dataclass
class NOVAPipelineOutput:
    """Results in the order of the prompts, those of one prompt in a row.

    Attributes:
        images: of a model of images: PIL images, or uint8 (B, H, W, 3).
        frames: of a model of videos, also where it makes one frame: uint8 (B, T, H, W, 3); or latents (B, C, T, h, w).
    """

    images: list[Image.Image] | np.ndarray | Tensor | None = None
    frames: np.ndarray | Tensor | None = None


class NonFiniteResult(ValueError):
    """What was decoded is not finite; the text says what may help."""


class NOVAPipeline:
    """A transformer with what makes its inputs and outputs; without VAE it makes latents, without text encoder it takes
    embeddings.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        transformer: NOVATransformer3DModel,
        scheduler: Any,
        vae: Autoencoder | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.transformer, self.scheduler, self.vae = transformer, scheduler, vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        config = transformer.config
        if transformer.text_embed is None:
            raise ValueError("this transformer is conditioned on class labels; the pipeline takes prompts")
        if vae is not None:
            found = (vae.latent_channels, vae.spatial_factor)
            if found != (config.image_dim, config.image_stride):
                raise ValueError(
                    f"the VAE has {found[0]} latent channels and stride {found[1]}, but the transformer image_dim "
                    f"{config.image_dim} and image_stride {config.image_stride}: they are of different models"
                )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: str | Path,
        torch_dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """The pipeline in a folder, or of a hub id; no code of theirs is run, whatever `trust_remote_code` says.

        Args:
            options: those of `load_components`.
        """
        parts = load_components(pretrained_path, dtype=torch_dtype, text_dtype=torch_dtype, **options)
        return cls(parts.transformer, parts.scheduler, parts.vae, parts.text_encoder, parts.tokenizer)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; None for those that are left out."""
        names = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.transformer.mask_embed.bos_token.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves or casts the networks, as `torch.nn.Module.to`."""
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(*args, **kwargs)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes every part to its sub-folder, and model_index.json."""
        folder = Path(folder)
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
        for name, part in self.components.items():
            index[name] = [None, None]
            if part is not None:
                part.save_pretrained(folder / name)
                library = type(part).__module__
                index[name] = [
                    library if library.startswith("diffnext.") else library.split(".")[0],
                    type(part).__name__,
                ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def check(self, settings: GenerationSettings, needs_vae: bool = True) -> None:
        """Raises ValueError for settings that this model, its scheduler or its VAE cannot follow."""
        num_frames = settings.max_latent_length
        check_length(self.transformer, num_frames)
        sampler_steps(self.scheduler, settings.num_diffusion_steps, settings.flow_shift)
        if self.vae is None:
            if needs_vae:
                raise ValueError(
                    "this pipeline has no VAE: it takes no image and makes latents only (output_type latent)"
                )
        elif isinstance(self.vae, VideoAutoencoder):
            self.vae.tiling.check_latents(num_frames)
        elif num_frames > 1:
            raise ValueError(
                f"max_latent_length is {num_frames}, but this model makes single images: its VAE is "
                f"{type(self.vae).__name__}"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[Prompt] | None = None,
        num_inference_steps: int = 64,
        num_diffusion_steps: int = 25,
        max_latent_length: int = 1,
        guidance_scale: float = 5.0,
        guidance_trunc: float = 0.0,
        guidance_renorm: float = 1.0,
        image_guidance_scale: float = 0.0,
        spatiotemporal_guidance_scale: float = 0.0,
        flow_shift: float | None = None,
        motion_flow: float | Sequence[float] = DEFAULT_FLOW,
        negative_prompt: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        latents: Sequence[Tensor] | None = None,
        prompt_embeds: Sequence[np.ndarray | Tensor] | None = None,
        negative_prompt_embeds: Sequence[np.ndarray | Tensor] | None = None,
        disable_progress_bar: bool = False,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        draws: Draws | None = None,
    ) -> NOVAPipelineOutput:
        """Images or videos of prompts.

        Args:
            prompt: one or several; in a list also embeddings (l, token_dim), which may be given as `prompt_embeds` too.
            num_inference_steps, num_diffusion_steps, max_latent_length, flow_shift: as in `GenerationSettings`.
            guidance_scale, guidance_trunc, guidance_renorm, image_guidance_scale: as in `Guidance`.
            motion_flow: how much a video moves, 1 ... 10; one for all or one per prompt.
            negative_prompt: what results should not be, for all prompts or one for each; none by default.
            image: the first frame of a video, for all prompts or one for each; PIL or uint8 (H, W, 3) of any size: the
                centre of the model's aspect is cut out and resized.
            num_images_per_prompt: results per prompt.
            generator: of all random numbers; None is torch's own.
            latents: of first frames that are known, each (1 or B, C, h, w); excludes `image`.
            output_type: pil (videos: np), np, pt (both uint8, channels last) or latent (float32).
            draws: in place of `generator`.

        Raises:
            ValueError: settings that contradict each other or do not fit the model; `NonFiniteResult`.
        """
        guidance = Guidance(
            guidance_scale, guidance_trunc, guidance_renorm, image_guidance_scale, spatiotemporal_guidance_scale
        )
        settings = GenerationSettings(num_inference_steps, num_diffusion_steps, max_latent_length, guidance, flow_shift)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}, but must be pil, np, pt or latent")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, but must be at least 1")
        if image is not None and latents:
            raise ValueError("image and latents both give the first frame: leave one out")
        num_given = len(latents or ()) + (image is not None)
        if num_given >= max_latent_length:
            raise ValueError(
                f"max_latent_length is {max_latent_length}, so the given frames leave nothing to generate: raise it"
            )
        self.check(settings, needs_vae=output_type != "latent" or image is not None)

        prompts = self._prompts(prompt, prompt_embeds)
        count = len(prompts)
        negative = negative_prompt or "" if negative_prompt_embeds is None else list(negative_prompt_embeds)
        negatives = _one_each(negative, count, "negative prompts")
        flows = _one_each(motion_flow, count, "motion_flow")
        repeated = [each for each in range(count) for _ in range(num_images_per_prompt)]
        text, negative_text = (self._text(rows)[repeated] for rows in (prompts, negatives))  # (B, L, token_dim)
        draws = draws or GeneratorDraws(len(repeated), generator)
        given = list(latents or ())
        if image is not None:
            pictures = _one_each(image, count, "images")
            given = [self._encode([pictures[index] for index in repeated], draws)]  # (B, C, h, w)
        total = (max_latent_length - num_given) * len(num_tokens_per_set(self._num_tokens, num_inference_steps))
        with tqdm(total=total, unit="step", disable=disable_progress_bar) as bar:
            result = generate(
                self.transformer,
                self.scheduler,
                text,
                negative_text,
                draws,
                settings,
                [flows[index] for index in repeated],
                given,
                on_step=bar.update,
            )  # (B, C, T, h, w)
        return self._output(result, output_type)

    @property
    def _num_tokens(self) -> int:
        config = self.transformer.config
        return math.prod(length // (config.image_stride * config.patch) for length in config.image_size)

    def _prompts(self, prompt: str | Sequence[str] | None, embeds: Sequence[Any] | None) -> list[Prompt]:
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt if embeds is None else embeds)  # type: ignore[arg-type]
        if not prompts:
            raise ValueError("there are no prompts")
        return prompts

    def _text(self, prompts: Sequence[Prompt]) -> Tensor:
        return text_rows(prompts, self.transformer.text_embed, self.text_encoder, self.tokenizer)

    def _encode(self, pictures: Sequence[Picture], draws: Draws) -> Tensor:
        """First frames as the transformer sees them, (B, C, h, w)."""
        assert self.vae is not None, "checked before"
        weight = next(self.vae.parameters())
        height, width = self.transformer.config.image_size
        posteriors = []
        for picture in pictures:
            pixels = torch.from_numpy(fit_image(picture, (height, width))).permute(2, 0, 1)[None]  # (1, 3, H, W)
            pixels = (pixels.to(weight.device).float() / 127.5 - 1).to(weight.dtype)
            posteriors.append(self.vae.encode(pixels).latent_dist)
        noise = draws.normal(posteriors[0].mean.shape[1:])  # (B, C, h, w)
        latents = [each.sample(noise=noise[n : n + 1]).float() for n, each in enumerate(posteriors)]
        return self.vae.scale_(torch.cat(latents))

    def _output(self, latents: Tensor, output_type: str) -> NOVAPipelineOutput:
        """Latents (B, C, T, h, w) to what is asked for; one at a time, which bounds the memory."""
        if output_type == "latent":
            return NOVAPipelineOutput(frames=latents)
        assert self.vae is not None, "checked before"
        weight, decoded = next(self.vae.parameters()), []
        for one in latents.split(1):
            with torch.autocast(weight.device.type, enabled=False):  # some overflow in half precision
                pixels = self.vae.decode(self.vae.unscale_(one.clone()).to(weight.dtype)).sample  # (1, 3, [T,] H, W)
            if not pixels.isfinite().all():
                raise NonFiniteResult("the result is not finite: use bf16 or float32 instead of fp16, or other weights")
            decoded.append(to_uint8(pixels).cpu())
        pixels = torch.cat(decoded)  # (B, [T,] H, W, 3)
        result = pixels if output_type == "pt" else pixels.numpy()
        if pixels.ndim == 5:
            return NOVAPipelineOutput(frames=result)
        return NOVAPipelineOutput([Image.fromarray(each) for each in result] if output_type == "pil" else result)


def _one_each(values: Any, count: int, what: str) -> list[Any]:
    """One value for each prompt: the same for all, or a list with as many."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    listed = list(values) if is_list else [values]
    if len(listed) not in (1, count):
        raise ValueError(f"there are {len(listed)} {what} for {count} prompts: give 1 or {count}")
    return listed * (count // len(listed))


def fit_image(picture: Picture, size_px: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) of size_px = (H, W): the centre of that aspect, resized (bilinear).

    Raises:
        ValueError: not an image.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an image must be PIL or uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture)
    height, width = size_px
    scale = min(picture.width / width, picture.height / height)
    cut_width, cut_height = width * scale, height * scale
    left, top = (picture.width - cut_width) / 2, (picture.height - cut_height) / 2
    box = (left, top, left + cut_width, top + cut_height)
    return np.array(picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR, box=box))
