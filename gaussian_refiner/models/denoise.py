"""Sampling: from a flawed render and a conditioning image to repaired latents, and the VAE on both ends.

The conditioning row never changes during sampling: clean latents at timestep 0. So only the target rows are carried
from step to step; the conditioning rows either run beside them in every call, or once, their keys and values kept
(`CondCache`). Both ways agree up to float rounding.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler

from common.pretrained import parameter_dtype
from gaussian_refiner.models.objective import interleave
from gaussian_refiner.models.self_mutual_attention import CondCache

NullKind = Literal["text", "clip", "render", "cond"]
NULL_KINDS: tuple[NullKind, ...] = ("text", "clip", "render", "cond")
LATENT_PX = 8  # image pixels per latent pixel
WINDOW_STEP_PX = 64  # windows on this grid see the same alignment in all four resolutions of the UNet


@dataclass(frozen=True)
class DenoiseStep:
    """What a callback sees after one UNet call of the sampling loop."""

    index: int
    timestep: int | float
    latents: torch.Tensor  # (B, 4, h, w) float32, target rows after the scheduler's step
    prediction: torch.Tensor  # (B, 4, h, w) float32, target rows after guidance
    cond_prediction: torch.Tensor | None  # (B, 4, h, w) float32, conditioning rows; None with the cache


@dataclass(frozen=True)
class _Rows:
    """Conditions of all rows of one call, in the UNet's dtype; N = halves of guidance x windows x images."""

    render: torch.Tensor  # (N, 4, h, w)
    cond: torch.Tensor  # (N, 4, h, w)
    text: torch.Tensor  # (N, tokens, C)
    cond_labels: torch.Tensor  # (N, 2 D)
    target_labels: torch.Tensor  # (N, 2 D)
    halves: int  # 2 = unconditional rows first, then conditional ones; 1 = conditional rows only


@dataclass(frozen=True)
class _Windows:
    """Overlapping windows of the full width, in latent pixels."""

    offsets: tuple[int, ...]
    width: int

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, W) to (windows * B, C, h, width), window by window."""
        return torch.cat([x[..., offset : offset + self.width] for offset in self.offsets])

    def blend(self, pieces: torch.Tensor, full_width: int) -> torch.Tensor:
        """Weighted mean of overlapping windows, weights falling linearly to the edges: (B, C, h, W)."""
        if len(self.offsets) == 1:
            return pieces
        position = torch.arange(self.width, device=pieces.device)
        ramp = torch.minimum(position + 1, self.width - position).to(pieces.dtype)  # (width,), never 0
        pieces = pieces.unflatten(0, (len(self.offsets), -1))  # (windows, B, C, h, width)
        total = pieces.new_zeros(*pieces.shape[1:-1], full_width)  # (B, C, h, W)
        weight = pieces.new_zeros(full_width)  # (W,)
        for offset, piece in zip(self.offsets, pieces, strict=True):
            total[..., offset : offset + self.width] += ramp * piece
            weight[offset : offset + self.width] += ramp
        return total / weight


def window_offsets(width_px: int, window_px: int, overlap_px: int) -> list[int]:
    """Left edges of windows that cover an image's whole width.

    Neighbours overlap by at least `overlap_px`. Edges lie on multiples of 64 px (of 8 px where the window leaves less
    than 64 px of new columns), but for the last window, which ends flush with the image.

    Args:
        width_px: width of the image, a multiple of 8.
        window_px: width of a window, a multiple of 8; one window if the image is not wider.
        overlap_px: at least 0; at least 8 columns of a window must be new.

    Raises:
        ValueError: a width is not a positive multiple of 8, or the overlap leaves no room.
    """
    for name, value in (("width_px", width_px), ("window_px", window_px)):
        if value <= 0 or value % LATENT_PX:
            raise ValueError(f"{name}={value} must be a positive multiple of {LATENT_PX}")
    if not 0 <= overlap_px <= window_px - LATENT_PX:
        raise ValueError(f"overlap_px={overlap_px} must lie in [0, {window_px - LATENT_PX}] for window_px={window_px}")
    if width_px <= window_px:
        return [0]
    stride_px = window_px - overlap_px
    stride_px -= stride_px % (WINDOW_STEP_PX if stride_px >= WINDOW_STEP_PX else LATENT_PX)
    last_px = width_px - window_px
    return [*range(0, last_px, stride_px), last_px]


@torch.no_grad()
def denoise(
    unet: Callable[..., Any],
    cond_cache: CondCache | None,
    scheduler: Any,
    *,
    cond_latents: torch.Tensor,
    render_latents: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    class_labels: torch.Tensor | Sequence[torch.Tensor],
    init_noise: torch.Tensor,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    strength: float = 1.0,
    use_cond_cache: bool = True,
    null_kinds: Collection[NullKind] = ("text", "clip"),
    window_px: int | None = None,
    window_overlap_px: int = 128,
    callback: Callable[[DenoiseStep], None] | None = None,
) -> torch.Tensor:
    """Repair B renders.

    Classifier-free guidance contrasts the conditions with the same conditions less those named in `null_kinds`:
    "text" = the first of `text`, "clip" = zero class vector, "render" = zero render latents, "cond" = zero
    conditioning latents. All but "text" are what condition dropout trains. At scale 1 that half is not computed.

    A frame wider than `window_px` is cut into overlapping windows that run as batch rows; their predictions are
    blended before each scheduler step, so the state is one full-width frame throughout.

    Args:
        unet: the refiner's UNet, with self-mutual attention installed; called in the dtype of its weights.
        cond_cache: the cache of that UNet; may be None without `use_cond_cache`.
        scheduler: any diffusers scheduler; a copy is used, so its state stays as it is.
        cond_latents: (B, 4, h, w) scaled latents of the conditioning images; zeros where there is none.
        render_latents: (B, 4, h, w) scaled latents of the renders.
        text: unconditional and conditional text embeddings, each (1 or B, tokens, C).
        class_labels: (B, 2 D) shared by both rows of a pair, or (2B, 2 D) interleaved [conditioning, target, ...];
            with windows either one tensor for all, or a list with one tensor per entry of `window_offsets`.
        init_noise: (B, 4, h, w) standard normal.
        num_inference_steps: steps of the full schedule. PNDM without Runge-Kutta steps makes one more call.
        guidance_scale: g in `u + g (c - u)`.
        guidance_rescale: phi of Lin et al. 2024 (arXiv:2305.08891), section 3.4; 0 = off.
        strength: in (0, 1]; 1 starts from pure noise, less starts from the noised render and skips the first steps.
        use_cond_cache: run the conditioning rows once instead of in every call.
        null_kinds: any of "text", "clip", "render", "cond".
        window_px: width of a window in image pixels, a multiple of 8; None = the whole width at once.
        window_overlap_px: least overlap of neighbouring windows.
        callback: called after each step.

    Returns:
        (B, 4, h, w) float32 repaired latents.

    Raises:
        ValueError: shapes, scales or names that do not fit; the message names them.
    """
    _check_arguments(num_inference_steps, guidance_scale, strength, null_kinds, use_cond_cache, cond_cache)
    _check_latents(cond_latents=cond_latents, render_latents=render_latents, init_noise=init_noise)
    device, full_width = init_noise.device, init_noise.shape[-1]
    windows = _plan_windows(full_width, window_px, window_overlap_px)
    nulls = None if guidance_scale == 1 else frozenset(null_kinds)
    rows = _build_rows(cond_latents, render_latents, text, class_labels, nulls, windows, parameter_dtype(unet))

    scheduler = copy.deepcopy(scheduler)
    timesteps = _select_timesteps(scheduler, num_inference_steps, strength, device)
    latents = _initial_latents(scheduler, timesteps, render_latents.float(), init_noise.float(), strength)

    try:
        if use_cond_cache:
            _record_cond_rows(unet, cond_cache, rows)
        for index, timestep in enumerate(timesteps):
            model_input = windows.split(scheduler.scale_model_input(latents, timestep))
            pred, cond_pred = _predict(unet, cond_cache if use_cond_cache else None, rows, model_input, timestep)
            pred = windows.blend(_guide(pred, rows.halves, guidance_scale, guidance_rescale), full_width)
            latents = scheduler.step(pred, timestep, latents, return_dict=False)[0]  # (B, 4, h, w)
            if callback is not None:
                if cond_pred is not None:
                    cond_pred = _guide(cond_pred, rows.halves, guidance_scale, guidance_rescale)
                    cond_pred = windows.blend(cond_pred, full_width)
                callback(DenoiseStep(index, timestep.item(), latents, pred, cond_pred))
    finally:
        if cond_cache is not None:
            cond_cache.clear()
    return latents


def _check_arguments(
    num_inference_steps: int,
    guidance_scale: float,
    strength: float,
    null_kinds: Collection[str],
    use_cond_cache: bool,
    cond_cache: CondCache | None,
) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1")
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is outside (0, 1]: 1 starts from pure noise, less from the render")
    unknown = sorted(set(null_kinds) - set(NULL_KINDS))
    if unknown:
        raise ValueError(f"null_kinds has unknown names {unknown}: use any of {list(NULL_KINDS)}")
    if guidance_scale != 1 and not null_kinds:
        raise ValueError(f"guidance_scale={guidance_scale} with no null_kinds has nothing to contrast: name some")
    if use_cond_cache and cond_cache is None:
        raise ValueError("use_cond_cache needs the cache that install_self_mutual_attention returned; got None")


def _check_latents(**latents: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in latents.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 4 for shape in shapes.values()):
        raise ValueError(f"latents must share one shape (B, 4, h, w); got {shapes}")


def _plan_windows(full_width: int, window_px: int | None, overlap_px: int) -> _Windows:
    if window_px is None:
        return _Windows((0,), full_width)
    offsets_px = window_offsets(full_width * LATENT_PX, window_px, overlap_px)
    return _Windows(tuple(px // LATENT_PX for px in offsets_px), min(full_width, window_px // LATENT_PX))


def _build_rows(
    cond_latents: torch.Tensor,
    render_latents: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    class_labels: torch.Tensor | Sequence[torch.Tensor],
    nulls: frozenset[NullKind] | None,
    windows: _Windows,
    dtype: torch.dtype,
) -> _Rows:
    """Lay out the conditions of every row; `nulls` None means no guidance."""
    images, count = cond_latents.shape[0], len(windows.offsets)
    shared = isinstance(class_labels, torch.Tensor)
    labels = [class_labels] * count if shared else list(class_labels)
    if len(labels) != count:
        raise ValueError(f"class_labels lists {len(labels)} tensors for {count} windows: give one tensor per window")
    pairs = [_split_labels(piece, images) for piece in labels]
    conditions = {
        "render": windows.split(render_latents),  # (windows * B, 4, h, width)
        "cond": windows.split(cond_latents),  # (windows * B, 4, h, width)
        "text": _repeat_text(text[1], images, count),  # (windows * B, tokens, C)
        "cond_labels": torch.cat([cond for cond, _ in pairs]),  # (windows * B, 2 D)
        "target_labels": torch.cat([target for _, target in pairs]),  # (windows * B, 2 D)
    }
    if nulls is not None:
        zeroed = set(nulls) - {"text"} - {"clip"}
        zeroed |= {"cond_labels", "target_labels"} if "clip" in nulls else set()
        null = {name: torch.zeros_like(x) if name in zeroed else x for name, x in conditions.items()}
        if "text" in nulls:
            null["text"] = _repeat_text(text[0], images, count)
        conditions = {name: torch.cat([null[name], x]) for name, x in conditions.items()}  # (2 * windows * B, ...)
    return _Rows(**{name: x.to(dtype) for name, x in conditions.items()}, halves=1 if nulls is None else 2)


def _split_labels(labels: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class vectors of the conditioning and the target rows, each (B, 2 D)."""
    if labels.shape[0] == images:
        return labels, labels
    if labels.shape[0] == 2 * images:
        return labels[::2], labels[1::2]
    raise ValueError(
        f"class_labels has {labels.shape[0]} rows for {images} images: give {images} (shared by both rows of a pair) "
        f"or {2 * images} (conditioning and target rows alternating)"
    )


def _repeat_text(embeds: torch.Tensor, images: int, windows: int) -> torch.Tensor:
    if embeds.ndim != 3 or embeds.shape[0] not in (1, images):
        raise ValueError(f"text embeddings are {tuple(embeds.shape)}: expected (1 or {images}, tokens, width)")
    return embeds.expand(images, -1, -1).repeat(windows, 1, 1)  # (windows * B, tokens, C)


def _select_timesteps(scheduler: Any, num_inference_steps: int, strength: float, device: torch.device) -> torch.Tensor:
    """Set up the scheduler and return the timesteps of the calls to make, the skipped part cut off."""
    scheduler.set_timesteps(num_inference_steps, device=device)
    skipped = num_inference_steps - max(1, round(num_inference_steps * strength))
    if skipped == 0:
        return scheduler.timesteps
    if not isinstance(scheduler, PNDMScheduler):
        begin = skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return scheduler.timesteps[begin:]
    if not scheduler.config.skip_prk_steps:
        raise ValueError(f"strength={strength} needs a PNDM scheduler with skip_prk_steps, or another scheduler")
    # PLMS starts by visiting its second timestep twice, wherever it starts; the schedule holds that repetition at the
    # full schedule's start only.
    plain = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])[skipped:]
    return torch.cat([plain[:2], plain[1:]])


def _initial_latents(
    scheduler: Any, timesteps: torch.Tensor, render: torch.Tensor, noise: torch.Tensor, strength: float
) -> torch.Tensor:
    """The state at the first timestep: (B, 4, h, w) float32."""
    if strength == 1:
        return noise * scheduler.init_noise_sigma
    return scheduler.add_noise(render, noise, timesteps[:1].expand(render.shape[0]))


def _call_unet(
    unet: Callable[..., Any],
    latents: torch.Tensor,
    render: torch.Tensor,
    timesteps: torch.Tensor,
    text: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """One UNet call; latents are cast to the conditions' dtype, the answer is (N, 4, h, w) float32."""
    sample = torch.cat([latents.to(render.dtype), render], dim=1)  # (N, 8, h, w)
    return unet(sample, timesteps, encoder_hidden_states=text, class_labels=labels, return_dict=False)[0].float()


def _record_cond_rows(unet: Callable[..., Any], cache: CondCache, rows: _Rows) -> None:
    timesteps = torch.zeros(rows.cond.shape[0], dtype=torch.long, device=rows.cond.device)
    with cache.record():
        _call_unet(unet, rows.cond, rows.render, timesteps, rows.text, rows.cond_labels)


def _predict(
    unet: Callable[..., Any],
    cache: CondCache | None,
    rows: _Rows,
    latents: torch.Tensor,
    timestep: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The UNet's answer for target and conditioning rows (None with a cache), each (halves * n, 4, h, width)."""
    target = latents.repeat(rows.halves, 1, 1, 1)  # (N, 4, h, width)
    timesteps = timestep.expand(target.shape[0])  # (N,)
    if cache is not None:
        with cache.cached():
            return _call_unet(unet, target, rows.render, timesteps, rows.text, rows.target_labels), None
    pred = _call_unet(
        unet,
        interleave(rows.cond, target.to(rows.cond.dtype)),
        interleave(rows.render, rows.render),
        interleave(torch.zeros_like(timesteps), timesteps),
        interleave(rows.text, rows.text),
        interleave(rows.cond_labels, rows.target_labels),
    )  # (2N, 4, h, width)
    return pred[1::2], pred[::2]


def _guide(pred: torch.Tensor, halves: int, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance over the two halves of the rows: (n, 4, h, w)."""
    if halves == 1:
        return pred
    unconditional, conditional = pred.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if rescale == 0:
        return guided
    dims = tuple(range(1, pred.ndim))
    matched = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images of scaled latents, whatever the VAE's precision.

    Args:
        latents: (B, 4, h, w).

    Returns:
        (B, 3, 8 h, 8 w) float32 in [0, 1].
    """
    unscaled = (latents.float() / vae.config.scaling_factor).to(vae.dtype)
    image = vae.decode(unscaled, return_dict=False)[0]  # (B, 3, 8 h, 8 w)
    return (image.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents of images: the posterior's mode, no sampling.

    Args:
        pixels: (B, 3, H, W) in [-1, 1], sides multiples of 8.

    Returns:
        (B, 4, H / 8, W / 8) float32.
    """
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor
