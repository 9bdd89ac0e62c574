"""One image of an object -> V views of it, in normals and colours.

Rows are those of `mvdiffusion.models.layout`: domain first (normals, then colours), then object, then view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from common.video import to_uint8
from mvdiffusion.data.poses import fixed_poses, label_rows, relative_angles, sin_cos
from mvdiffusion.data.preparation import ClipTransform
from mvdiffusion.models import components
from mvdiffusion.models.initialise import load_unet
from mvdiffusion.models.layout import DOMAINS, from_rows, repeat_for_rows, to_rows
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel
from mvdiffusion.views import choose_views

CfgOrder = Literal["domain", "upstream"]
Noise = Callable[[int], Tensor]
Picture = Image.Image | Sequence[Image.Image] | Tensor

CFG_AXIS: dict[str, int] = {"domain": 1, "upstream": 0}  # where the two branches go relative to the domains
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CAMERA_EMBEDDING_TYPE = "e_de_da_sincos"
DECODED_AT_ONCE_ROWS = 12  # bounds the memory
RELEASED_NUM_VIEWS = 6  # of checkpoints that do not say it
UNET_MODULE = UNetMV2DConditionModel.__module__


# Sampling, without a pipeline -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewCondition:
    """What the views of B objects are generated from; names as in `mvdiffusion.models.objective.MVInputs`."""

    condition_latents: Tensor  # (B, C, h, w) scaled
    image_embeds: Tensor  # (B, E) projected CLIP embeddings, not normalised
    normal_camera: Tensor  # (B, V, P) class labels, ready for the UNet
    colour_camera: Tensor  # (B, V, P)


def generator_noise(generators: Sequence[torch.Generator], num_views: int, latent_shape: Sequence[int]) -> Noise:
    """Noise for `denoise_views`, each object's from its own generator, so that objects do not depend on each other.

    It must be asked for steps in ascending order. Generators may be on any device; `latent_shape` is (C, h, w).
    """

    def noise(step: int) -> Tensor:
        shape = (len(DOMAINS), num_views, *latent_shape)
        return torch.stack([torch.randn(shape, generator=each, device=each.device) for each in generators])

    return noise


@torch.no_grad()
def denoise_views(
    unet: torch.nn.Module,
    scheduler: Any,
    condition: ViewCondition,
    noise: Noise,
    *,
    num_steps: int = 50,
    guidance_scale: float = 3.0,
    eta: float = 0.0,
    cfg_order: CfgOrder = "domain",
    callback: Callable[[int, int, Tensor], None] | None = None,
) -> Tensor:
    """Latents of all views by DDIM (Song et al. 2021, eq. 12 and 16) with classifier-free guidance.

    The unconditional branch has no image: zero latents and zero embedding, but the same cameras. It is not computed at
    `guidance_scale` 1. Autocast, if wanted, is the caller's; the UNet is in eval mode meanwhile.

    Args:
        unet: called in the type of its weights; latents stay float32.
        scheduler: any diffusers scheduler, for its schedule and prediction type; it is not changed.
        condition: on the UNet's device.
        noise: gives standard normal (B, D, V, C, h, w): of 0 the initial latents, of s + 1 the noise of step s, which
            is asked for where `eta` > 0 only.
        num_steps: network calls.
        guidance_scale: g in `u + g (c - u)`.
        eta: 0 is deterministic DDIM, 1 as much noise as DDPM.
        cfg_order: order of the guided batch. "domain" keeps the domains in its two halves, as the joint attention
            expects. "upstream" is the original's, which pairs unconditional with conditional rows: for comparison only.
        callback: called after each step with its number, its timestep and the latents.

    Returns:
        (2BV, C, h, w) float32.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.
    """
    if cfg_order not in CFG_AXIS:
        raise ValueError(f"cfg_order is {cfg_order!r}, but must be domain or upstream")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be in [0, 1]")
    ddim, timesteps = ddim_schedule(scheduler, num_steps)
    dtype = next(unet.parameters()).dtype
    order = None if guidance_scale == 1 else cfg_order
    cond_latents, embeds, labels = (rows.to(dtype) for rows in _condition_rows(condition, order))
    latents = _noise_rows(noise(0), condition) * ddim.init_noise_sigma  # (2BV, C, h, w)
    was_training = unet.training
    unet.eval()
    try:
        for step, timestep in enumerate(timesteps):
            doubled = latents if order is None else _join(latents, latents, order)  # (2BV or 4BV, C, h, w)
            sample = torch.cat([doubled.to(dtype), cond_latents], dim=1)  # (2BV or 4BV, 2C, h, w)
            pred = unet(sample, timestep, encoder_hidden_states=embeds, class_labels=labels, return_dict=False)[0]
            pred = pred.float()
            if order is not None:
                unconditional, conditional = _split(pred, order)
                pred = unconditional + guidance_scale * (conditional - unconditional)  # (2BV, C, h, w)
            variance_noise = _noise_rows(noise(step + 1), condition) if eta > 0 else None
            latents = ddim.step(pred, timestep, latents, eta=eta, variance_noise=variance_noise, return_dict=False)[
                0
            ]  # (2BV, C, h, w)
            if callback is not None:
                callback(step, timestep, latents)
    finally:
        unet.train(was_training)
    return latents


@torch.no_grad()
def sample_views(
    unet: torch.nn.Module,
    vae: AutoencoderKL,
    scheduler: Any,
    condition: ViewCondition,
    noise: Noise,
    **options: Any,
) -> dict[str, Tensor]:
    """Decoded views {"normal": (B, V, 3, H, W), "colour": ...}, float32 in [0, 1]; `options` as of `denoise_views`."""
    latents = denoise_views(unet, scheduler, condition, noise, **options)
    return from_rows(decode_rows(vae, latents), condition.normal_camera.shape[1])


def decode_rows(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """`components.decode_latents`, a few rows at a time: (R, C, h, w) -> (R, 3, H, W) in [0, 1]."""
    return torch.cat([components.decode_latents(vae, rows) for rows in latents.split(DECODED_AT_ONCE_ROWS)])


def ddim_schedule(scheduler: Any, num_steps: int) -> tuple[DDIMScheduler, list[int]]:
    """DDIM with a scheduler's noise levels, and its timesteps; ValueError for a number of steps it does not have."""
    ddim = DDIMScheduler.from_config({"clip_sample": False} | dict(scheduler.config))
    limit = ddim.config.num_train_timesteps
    if 1 <= num_steps <= limit:
        ddim.set_timesteps(num_steps)
        timesteps = ddim.timesteps.tolist()
        if max(timesteps) < limit:
            return ddim, timesteps
    raise ValueError(f"num_inference_steps is {num_steps}, but must be in 1..{limit - ddim.config.steps_offset}")


def _condition_rows(condition: ViewCondition, order: CfgOrder | None) -> list[Tensor]:
    """Condition latents, embeddings and labels of all rows, of both branches where there is guidance."""
    num_views = condition.normal_camera.shape[1]
    images = [condition.condition_latents, condition.image_embeds[:, None]]
    images = [repeat_for_rows(each.float(), num_views) for each in images]  # (2BV, C, h, w), (2BV, 1, E)
    labels = to_rows(condition.normal_camera, condition.colour_camera).float()  # (2BV, P)
    if order is None:
        return [*images, labels]
    return [*(_join(torch.zeros_like(each), each, order) for each in images), _join(labels, labels, order)]


def _noise_rows(noise: Tensor, condition: ViewCondition) -> Tensor:
    """(B, D, V, C, h, w) -> (2BV, C, h, w) on the condition's device."""
    latents = condition.condition_latents
    num_objects, num_views = condition.normal_camera.shape[:2]
    expected = (num_objects, len(DOMAINS), num_views, *latents.shape[1:])
    if noise.shape != expected:
        raise ValueError(f"the noise is {tuple(noise.shape)}, but the condition needs {expected}: (B, D, V, C, h, w)")
    return noise.to(latents.device, torch.float32).transpose(0, 1).flatten(0, 2)


def _join(unconditional: Tensor, conditional: Tensor, order: CfgOrder) -> Tensor:
    """Two branches of (2BV, ...) as one batch (4BV, ...)."""
    branches = [each.unflatten(0, (len(DOMAINS), -1)) for each in (unconditional, conditional)]  # (2, BV, ...)
    return torch.stack(branches, dim=CFG_AXIS[order]).flatten(0, 2)


def _split(rows: Tensor, order: CfgOrder) -> tuple[Tensor, Tensor]:
    """What `_join` joined."""
    unconditional, conditional = rows.unflatten(0, (2, 2, -1)).unbind(CFG_AXIS[order])  # (2, BV, ...)
    return unconditional.flatten(0, 1), conditional.flatten(0, 1)


# Cameras --------------------------------------------------------------------------------------------------------------


def camera_table(views: Sequence[str], poses: np.ndarray, condition: int = 0) -> list[list[Any]]:
    """The `cameras` of a pipeline: [name, elevation, azimuth] of each view, in radians, relative to the condition view.

    Args:
        views: names, in the order of the rows.
        poses: (V, 3, 4), see `mvdiffusion.data.poses`.
        condition: place of the condition view.
    """
    angles = relative_angles(np.asarray(poses, dtype=np.float64), condition).tolist()
    return [[name, *pair] for name, pair in zip(views, angles, strict=True)]


def fixed_cameras(views: Sequence[str], poses: str = "tilted", condition: str = "front") -> list[list[Any]]:
    """The `cameras` of views with "tilted" or "upright" poses; the condition view need not be one of them."""
    table = camera_table([condition, *views], fixed_poses([condition, *views], poses))
    return table[1:]


def released_cameras(views: Sequence[str]) -> list[list[Any]]:
    """As the released pipelines have them: tilted poses relative to the front, in half precision."""
    return [[name, *map(float, np.float16(angles))] for name, *angles in fixed_cameras(views)]


# The pipeline ---------------------------------------------------------------------------------------------------------


@dataclass
class MVDiffusionOutput(BaseOutput):
    """B objects (times `num_images_per_prompt`: those of one image in a row) in V views.

    Attributes:
        images: all rows: 2BV PIL images, or arrays (2BV, ...); all normals first, then all colours.
        normals, colours: the same by object and view: lists of lists, or (B, V, ...).
    """

    images: Any
    normals: Any
    colours: Any


class MVDiffusionImagePipeline(DiffusionPipeline):
    """Views of objects from single images.

    Args:
        vae, image_encoder, unet, feature_extractor: the parts.
        scheduler: of any kind; its schedule and prediction type are those of DDIM then.
        num_views: V; None is the UNet's.
        camera_embedding_type: "e_de_da_sincos", the only one.
        cameras: [name, elevation, azimuth] of each view, see `camera_table`; None is what the released weights need.
        camera_type: "ortho" or "perspective", for networks whose labels say it (of length 14).
        safety_checker, requires_safety_checker: taken for the sake of old callers; nothing is checked.

    Raises:
        ValueError: settings that contradict each other.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNetMV2DConditionModel,
        scheduler: Any,
        feature_extractor: CLIPImageProcessor,
        num_views: int | None = None,
        camera_embedding_type: str = CAMERA_EMBEDDING_TYPE,
        cameras: Any = None,
        camera_type: str = "ortho",
        safety_checker: None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__()
        num_views = num_views or unet.config.num_views
        cameras = released_cameras(choose_views(num_views)) if cameras is None else [list(each) for each in cameras]
        if num_views != unet.config.num_views or len(cameras) != num_views:
            raise ValueError(
                f"num_views is {num_views}, the UNet's {unet.config.num_views}, and there are {len(cameras)} cameras: "
                "all three must be the same"
            )
        if camera_embedding_type != CAMERA_EMBEDDING_TYPE:
            raise ValueError(f"camera_embedding_type is {camera_embedding_type!r}, but must be {CAMERA_EMBEDDING_TYPE}")
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(
            num_views=num_views,
            camera_embedding_type=camera_embedding_type,
            cameras=cameras,
            camera_type=camera_type,
        )

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """The content of model_index.json, where released pipelines name another module and parts without use."""
        loaded = super().load_config(*args, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in ("safety_checker", "requires_safety_checker"):
            config.pop(name, None)
        if "unet" in config:
            config["unet"] = [UNET_MODULE, UNetMV2DConditionModel.__name__]
        return loaded

    @property
    def views(self) -> list[str]:
        """Names of the views, in the order of the rows."""
        return [name for name, *_ in self.config.cameras]

    @property
    def azimuths(self) -> list[float]:
        """Azimuths of the views in radians, relative to the condition's."""
        return [azimuth for _, _, azimuth in self.config.cameras]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def class_labels(self, num_objects: int, camera_embedding: Any = None) -> dict[str, Tensor]:
        """The UNet's labels, {"normal": (B, V, P), "colour": ...} float32.

        Args:
            camera_embedding: raw rows instead of the pipeline's cameras, before sine and cosine: (2V, P / 2) for all
                objects or (2BV, P / 2); e.g. (0, elevation, azimuth, domain code).
        """
        num_views = self.config.num_views
        if camera_embedding is None:
            angles = np.array([angles for _, *angles in self.config.cameras])  # (V, 2)
            width = self.unet.config.projection_class_embeddings_input_dim
            halves = [label_rows(angles, domain, width, self.config.camera_type) for domain in DOMAINS]
            rows = np.concatenate(halves)  # (2V, P / 2)
        else:
            rows = np.asarray(torch.as_tensor(camera_embedding).detach().cpu(), dtype=np.float64)
        if rows.ndim != 2 or len(rows) not in (2 * num_views, 2 * num_objects * num_views):
            raise ValueError(
                f"camera_embedding is {rows.shape}, but must have 2 V = {2 * num_views} rows, or those for each of "
                f"{num_objects} objects: all normal rows first"
            )
        labels = torch.from_numpy(sin_cos(rows).astype(np.float32))  # (2V or 2BV, P)
        return {domain: each.expand(num_objects, -1, -1) for domain, each in from_rows(labels, num_views).items()}

    def encode(self, images: Sequence[Image.Image], camera_embedding: Any = None) -> ViewCondition:
        """The condition of B RGB images of one size, each encoded once, on the pipeline's device."""
        device = self._execution_device
        clip = ClipTransform.of(self.feature_extractor)
        clip_pixels = torch.from_numpy(np.stack([clip(image) for image in images]))  # (B, 3, 224, 224)
        labels = self.class_labels(len(images), camera_embedding)
        return ViewCondition(
            self.encode_latents(images),
            components.embed_images(self.image_encoder, clip_pixels.to(device)),
            labels["normal"].to(device),
            labels["colour"].to(device),
        )

    def encode_latents(self, images: Sequence[Image.Image]) -> Tensor:
        """Scaled latents of B RGB images of one size, on the pipeline's device: (B, C, h, w)."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return components.encode_images(self.vae, pixels.to(self._execution_device).float() / 127.5 - 1)

    @torch.no_grad()
    def __call__(
        self,
        image: Picture,
        camera_embedding: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        callback: Callable[[int, int, Tensor], None] | None = None,
        cfg_order: CfgOrder = "domain",
        normal_cond: Picture | None = None,
    ) -> MVDiffusionOutput:
        """Views of one or several objects; an object's do not depend on the others.

        Args:
            image: of one object, a list of images of several, or a tensor (B, 3, H, W), float in [0, 1] or uint8.
                Transparency is composited on white. The object should be centred with room around it, as in training.
            camera_embedding: see `class_labels`.
            height, width: in pixels; None is the UNet's sample size. Images must have this size.
            num_inference_steps, guidance_scale, eta, cfg_order, callback: as of `denoise_views`.
            num_images_per_prompt: results per image.
            generator: one per result, or one from which each result's is derived; None is torch's own.
            latents: (2BV, C, h, w) initial noise, in the order of the rows.
            output_type: pil, np (B, V, H, W, 3), pt (B, V, 3, H, W) (both float32 in [0, 1]) or latent.
            normal_cond: images, one per image, whose latents are the condition's instead; its embedding stays.

        Raises:
            ValueError: an argument out of range, images of another size, or results that are not finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(OUTPUT_TYPES)}")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}, but must be at least 1")
        default = self.unet.config.sample_size * self.vae_scale_factor
        height, width = height or default, width or default
        condition = self.encode(_rgb_images(image, height, width), camera_embedding)
        if normal_cond is not None:
            shown, count = _rgb_images(normal_cond, height, width), len(condition.image_embeds)
            if len(shown) != count:
                raise ValueError(f"normal_cond has {len(shown)} images for {count} in image: give one for each")
            condition = replace(condition, condition_latents=self.encode_latents(shown))
        parts = vars(condition).items()
        condition = ViewCondition(
            **{name: part.repeat_interleave(num_images_per_prompt, dim=0) for name, part in parts}
        )
        noise = self._noise(condition, generator, latents)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(step: int, timestep: int, latents: Tensor) -> None:
                bar.update()
                if callback is not None:
                    callback(step, timestep, latents)

            rows = denoise_views(
                self.unet,
                self.scheduler,
                condition,
                noise,
                num_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                cfg_order=cfg_order,
                callback=on_step,
            )  # (2BV, C, h, w)
        if not rows.isfinite().all():
            raise ValueError("the result is not finite: use bf16 or float32 instead of fp16, or other weights")
        rows = rows if output_type == "latent" else decode_rows(self.vae, rows)  # (2BV, 3, H, W)
        self.maybe_free_model_hooks()
        return _output(rows, self.config.num_views, output_type)

    def _noise(self, condition: ViewCondition, generator: Any, latents: Tensor | None) -> Noise:
        (count, num_views), shape = condition.normal_camera.shape[:2], condition.condition_latents.shape[1:]
        if generator is None or isinstance(generator, torch.Generator):
            where = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**62, (count,), generator=generator, device=where).tolist()
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        if len(generator) != count:
            raise ValueError(f"there are {len(generator)} generators for {count} results: give one, or {count}")
        drawn = generator_noise(generator, num_views, shape)
        if latents is None:
            return drawn
        if len(latents) != len(DOMAINS) * count * num_views:
            raise ValueError(
                f"latents has {len(latents)} rows, but {count} results of {num_views} views need twice as "
                f"many as {count * num_views}"
            )
        initial = latents.unflatten(0, (len(DOMAINS), count, num_views)).transpose(0, 1)  # (B, D, V, C, h, w)
        return lambda step: initial if step == 0 else drawn(step)


def _rgb_images(image: Picture, height: int, width: int) -> list[Image.Image]:
    """The images as RGB; ValueError for none, and for another size."""
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image is a tensor {tuple(image.shape)}, but must be (B, 3, H, W)")
        if image.dtype == torch.uint8:
            image = image.float() / 255
        images = [Image.fromarray(to_uint8(each)) for each in image]
    else:
        images = [image] if isinstance(image, Image.Image) else list(image)
    if not images:
        raise ValueError("there is no image")
    sizes = sorted({each.size for each in images} - {(width, height)})
    if sizes:
        raise ValueError(
            f"an image is {sizes[0][0]} x {sizes[0][1]} px where {width} x {height} are generated (width x height): "
            "resize it, or give its height and width"
        )
    return [_on_white(each) for each in images]


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _output(rows: Tensor, num_views: int, output_type: str) -> MVDiffusionOutput:
    halves = from_rows(rows, num_views)  # (B, V, ...) each
    if output_type == "pil":
        images = [Image.fromarray(to_uint8(row)) for row in rows]
        grouped = [images[start : start + num_views] for start in range(0, len(images), num_views)]
        count = len(grouped) // len(DOMAINS)
        return MVDiffusionOutput(images=images, normals=grouped[:count], colours=grouped[count:])
    arrays: Sequence[Any] = (rows, halves["normal"], halves["colour"])
    if output_type == "np":
        arrays = [each.movedim(-3, -1).cpu().numpy() for each in arrays]
    return MVDiffusionOutput(images=arrays[0], normals=arrays[1], colours=arrays[2])


# Loading --------------------------------------------------------------------------------------------------------------


def load_pipeline(
    path_or_id: str,
    *,
    unet: str | None = None,
    unet_subfolder: str | None = "unet",
    revision: str | None = None,
    cache_dir: str | None = None,
    **settings: Any,
) -> MVDiffusionImagePipeline:
    """A pipeline in float32 on the CPU from a folder or hub id: an export, or a released pipeline of any version.

    Unlike `MVDiffusionImagePipeline.from_pretrained` it translates older names of weights.

    Args:
        unet: another folder or hub id for the UNet; `unet_subfolder` is where it lies in that.
        revision: of `path_or_id`.
        settings: `cameras`, ... over those in model_index.json.

    Raises:
        FileNotFoundError: a part is not there.
        ValueError: weights that do not fit, or that are not trained for this.
    """
    hub = {"revision": revision, "cache_dir": cache_dir}
    vae = components.load_vae(path_or_id, **hub)
    index = pipeline_index(path_or_id, hub)
    unet_source, unet_hub = (unet, {"cache_dir": cache_dir}) if unet else (path_or_id, hub)
    return MVDiffusionImagePipeline(
        vae=vae,
        image_encoder=components.load_image_encoder(path_or_id, **hub),
        unet=_load_trained_unet(unet_source, unet_subfolder, index.get("num_views"), unet_hub),
        scheduler=components.load_scheduler(path_or_id, **hub),
        feature_extractor=components.load_feature_extractor(path_or_id, **hub),
        **({name: index[name] for name in ("cameras", "camera_type") if name in index} | settings),
    )


def pipeline_index(path_or_id: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """What model_index.json says; nothing where a folder has none. `hub` are options of a hub id's download."""
    root = Path(path_or_id)
    if root.is_dir() and not (root / MVDiffusionImagePipeline.config_name).is_file():
        return {}
    return dict(MVDiffusionImagePipeline.load_config(path_or_id, **({} if root.is_dir() else hub)))


def _load_trained_unet(
    source: str, subfolder: str | None, num_views: int | None, hub: Mapping[str, Any]
) -> UNetMV2DConditionModel:
    root = Path(source)
    inside = subfolder if subfolder and (not root.is_dir() or (root / subfolder).is_dir()) else None
    if not root.is_dir() or (root / (inside or "") / "config.json").is_file():
        try:
            config = UNetMV2DConditionModel.load_config(source, subfolder=inside, **({} if root.is_dir() else hub))
        except OSError as error:
            raise FileNotFoundError(
                f"the UNet is looked for in {source}, no folder and no hub id within reach"
            ) from error
        num_views = config.get("num_views", num_views)
    network, report = load_unet(source, inside, num_views=num_views or RELEASED_NUM_VIEWS, **hub)
    if report.new:
        raise ValueError(
            f"the UNet of {source} is one that training starts from: {len(report.new)} tensors are not in it "
            f"({', '.join(report.new[:3])}, ...). Give the folder of a trained one"
        )
    if report.left_out:
        flags = sorted({f"cd_attention_{key.partition('_joint_')[2].partition('.')[0]}" for key in report.left_out})
        raise ValueError(
            f"the UNet of {source} holds {len(report.left_out)} tensors of joint attention ({report.left_out[0]}, ...) "
            f"that its config.json turns off: set {' and '.join(flags)} to true there"
        )
    return network
