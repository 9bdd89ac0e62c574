"""The training objective: from latents, embeddings and recorded draws to the repair loss.

Everything here is a pure function. Random numbers come in as arguments (`RefinerDraws`), and the schedules' arithmetic
is done in float32 whatever the precision of the latents: in half precision the earliest timesteps would get no noise.

Rows: a batch of B samples becomes 2B rows that alternate conditioning image (at timestep 0) and target (at its own
timestep), as self-mutual attention expects them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from common.diffusion import add_noise, signal_to_noise, velocity
from common.pretrained import parameter_dtype

PredictionType = Literal["v_prediction", "epsilon"]
SnrMode = Literal["fixed", "pairwise", "upstream"]

# Which conditions survive (1) or are dropped (0) in the k-th interval [k p, (k + 1) p) of a sample's uniform number;
# the last line is the rest of the unit interval. Columns: render latents, class vector, conditioning latents.
KEEP_TABLE = (
    (0, 1, 1),
    (1, 0, 1),
    (1, 1, 0),
    (0, 0, 1),
    (0, 1, 0),
    (1, 0, 0),
    (0, 0, 0),
    (1, 1, 1),
)


@dataclass(frozen=True)
class ConditionMasks:
    """Per sample 1.0 = keep, 0.0 = drop; each (B,) float32."""

    render: torch.Tensor
    clip: torch.Tensor
    cond: torch.Tensor


@dataclass(frozen=True)
class RefinerDraws:
    """Every random number of one step. D is the width of the image embedding, h x w the size of the latents."""

    image_embed_noise: torch.Tensor  # (B, D) normal
    noise: torch.Tensor  # (2B, 4, h, w) normal
    timesteps: torch.Tensor  # (B,) integers in [0, training timesteps)
    random_p: torch.Tensor | None = None  # (B,) float32 uniform in [0, 1); needed with condition dropout
    offset_noise: torch.Tensor | None = None  # (2B, 4, 1, 1) normal; needed with noise_offset
    perturb_noise: torch.Tensor | None = None  # (2B, 4, h, w) normal; needed with input_perturbation


@dataclass(frozen=True)
class RefinerInputs:
    """One batch after the frozen encoders. Latents are already multiplied by the VAE's scaling factor."""

    render_latents: torch.Tensor  # (B, 4, h, w)
    cond_latents: torch.Tensor  # (B, 4, h, w)
    gt_latents: torch.Tensor  # (B, 4, h, w)
    image_embeds: torch.Tensor  # (B, D) CLIP image embeddings of the conditioning images
    text_embeds: torch.Tensor  # (1 or B, tokens, C)
    has_cond: torch.Tensor | None = None  # (B,) bool; False: no conditioning image, as if dropped. None = all have one


@dataclass(frozen=True)
class RefinerConstants:
    """Fixed tensors of the checkpoint."""

    alphas_cumprod: torch.Tensor  # (training timesteps,) of the latents' scheduler
    image_alphas_cumprod: torch.Tensor  # (levels,) of the image embedding's noise scheduler
    embed_mean: torch.Tensor  # (1, D) of the image normalizer
    embed_std: torch.Tensor  # (1, D)


@dataclass(frozen=True)
class ObjectiveSettings:
    """How the loss is formed.

    Attributes:
        condition_dropout_prob: probability of each of the seven ways to drop conditions; None or 0 drops none.
        noise_offset: strength of one extra normal number per row and channel, part of the noise to predict.
        input_perturbation: strength of extra noise on the UNet's input that is no part of the target.
        prediction_type: what the UNet predicts.
        snr_gamma: cap of the min-SNR weights; None weighs all timesteps alike.
        snr_mode: see `snr_weights`.
        cond_loss_weight: weight of the conditioning rows' error against the target rows' error. Both kinds of rows
            are averaged with these weights, so 1 is the plain mean over all rows and 0 the mean over target rows.
    """

    condition_dropout_prob: float | None = 0.05
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    prediction_type: PredictionType = "v_prediction"
    snr_gamma: float | None = None
    snr_mode: SnrMode = "fixed"
    cond_loss_weight: float = 1.0


@dataclass(frozen=True)
class RefinerRows:
    """The 2B rows that the UNet sees, all float32, and what it should answer."""

    clean: torch.Tensor  # (2B, 4, h, w)
    noisy: torch.Tensor  # (2B, 4, h, w)
    render: torch.Tensor  # (2B, 4, h, w)
    timesteps: torch.Tensor  # (2B,) int64, 0 in conditioning rows
    text_embeds: torch.Tensor  # (2B, tokens, C)
    class_labels: torch.Tensor  # (2B, 2 D)
    target: torch.Tensor  # (2B, 4, h, w)


@dataclass(frozen=True)
class RepairLoss:
    """The loss and what it was made of, all float32."""

    loss: torch.Tensor  # scalar
    pred: torch.Tensor  # (2B, 4, h, w)
    target: torch.Tensor  # (2B, 4, h, w)
    per_row_mse: torch.Tensor  # (2B,) before weights
    row_weights: torch.Tensor  # (2B,) min-SNR weights, ones without snr_gamma
    rows: RefinerRows


def interleave(cond: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Alternate rows: (B, ...) and (B, ...) to (2B, ...), conditioning rows first."""
    if cond.shape != target.shape:
        raise ValueError(f"cannot interleave rows of shape {tuple(cond.shape)} with {tuple(target.shape)}: make equal")
    return torch.stack([cond, target], dim=1).flatten(0, 1)  # (2B, ...)


def condition_keep_masks(random_p: torch.Tensor, prob: float) -> ConditionMasks:
    """Seven-way condition dropout: every non-empty subset of {render, clip, cond} is dropped with probability `prob`.

    Args:
        random_p: (B,) float32 in [0, 1).
        prob: in [0, 1]; above 1/7 the later subsets get what is left of the unit interval.

    Returns:
        masks of shape (B,).

    Raises:
        ValueError: `random_p` is not a float32 vector, or `prob` is outside [0, 1].
    """
    if not 0 <= prob <= 1:
        raise ValueError(f"condition_dropout_prob={prob} is outside [0, 1]")
    if random_p.ndim != 1 or random_p.dtype != torch.float32:
        raise ValueError(f"random_p must be a float32 vector (B,); got {random_p.dtype} {tuple(random_p.shape)}")
    # The bounds are multiplied in double precision and rounded once; intervals are closed on the left.
    bounds = torch.tensor([k * prob for k in range(1, 8)], dtype=torch.float64).to(random_p, non_blocking=True)  # (7,)
    interval = (random_p[:, None] >= bounds).sum(dim=1)  # (B,)
    keep = torch.tensor(KEEP_TABLE, dtype=torch.float32).to(random_p, non_blocking=True)[interval]  # (B, 3)
    return ConditionMasks(*keep.unbind(dim=1))


def class_labels(
    image_embeds: torch.Tensor,
    noise: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    level: int | torch.Tensor = 0,
) -> torch.Tensor:
    """The unCLIP class vector: the image embedding, noised in normalised space, then an embedding of the noise level.

    Level 0 still mixes in a little noise, sqrt(1 - alphas_cumprod[0]).

    Args:
        image_embeds: (B, D).
        noise: (B, D) normal.
        mean: (1, D) or (D,) of the image normalizer.
        std: as `mean`.
        alphas_cumprod: (levels,) of the image noising scheduler.
        level: one noise level, or (B,) integers.

    Returns:
        (B, 2 D) float32.
    """
    if noise.shape != image_embeds.shape:
        raise ValueError(f"noise {tuple(noise.shape)} and image_embeds {tuple(image_embeds.shape)} must be one shape")
    device = image_embeds.device
    levels = torch.zeros(image_embeds.shape[0], dtype=torch.long, device=device) + level  # (B,)
    mean, std = mean.to(device, torch.float32), std.to(device, torch.float32)
    normalised = (image_embeds.float() - mean) / std  # (B, D)
    noised = add_noise(normalised, noise, levels, alphas_cumprod)  # (B, D)
    return torch.cat([noised * std + mean, _level_embedding(levels, image_embeds.shape[1])], dim=1)  # (B, 2 D)


def _level_embedding(levels: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of the level, cosines first, as in Vaswani et al. 2017, section 3.5: (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=levels.device))
    angles = levels[:, None].float() * frequencies  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, 2 half)
    return F.pad(embedding, (0, width - 2 * half))  # (B, width)


def snr_weights(
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    gamma: float,
    prediction_type: PredictionType,
    mode: SnrMode = "fixed",
) -> torch.Tensor:
    """Min-SNR weights of the 2B rows (Hang et al. 2023): min(SNR, gamma) / SNR, over SNR + 1 for v prediction.

    Modes:
        fixed: each row's weight follows from its own timestep, which is 0 in conditioning rows.
        pairwise: both rows of a pair have the weight of the target's timestep.
        upstream: every row has the mean weight of the batch, the effect of a broadcast mistake in the original
            trainer; for comparisons with it.

    Args:
        timesteps: (B,) of the target rows.
        alphas_cumprod: (training timesteps,).
        gamma: cap of the SNR, above 0.

    Returns:
        (2B,) float32.

    Raises:
        ValueError: unknown mode or prediction type, or `gamma` not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"snr_gamma={gamma} must be above 0; leave it out to weigh all timesteps alike")
    if mode not in ("fixed", "pairwise", "upstream"):
        raise ValueError(f'snr_mode "{mode}" is unknown: use fixed, pairwise or upstream')
    _check_prediction_type(prediction_type)
    cond_timesteps = torch.zeros_like(timesteps) if mode == "fixed" else timesteps
    row_timesteps = interleave(cond_timesteps, timesteps)  # (2B,)
    snr = signal_to_noise(row_timesteps, alphas_cumprod)  # (2B,)
    weights = snr.clamp(max=gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)  # (2B,)
    return weights.mean().expand_as(weights) if mode == "upstream" else weights


def mean_over_rows(losses: torch.Tensor, cond_loss_weight: float = 1.0) -> torch.Tensor:
    """Weighted mean of (2B,) losses, where a conditioning row counts `cond_loss_weight` target rows: a scalar."""
    shares = torch.ones_like(losses)  # (2B,)
    shares[::2] = cond_loss_weight
    return (shares * losses).sum() / shares.sum()


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in ("v_prediction", "epsilon"):
        raise ValueError(f'prediction_type "{prediction_type}" is unknown: use v_prediction or epsilon')


def refiner_rows(
    inputs: RefinerInputs, draws: RefinerDraws, constants: RefinerConstants, settings: ObjectiveSettings
) -> RefinerRows:
    """Drop conditions, add noise and lay out the 2B rows of one step.

    Raises:
        ValueError: a tensor has the wrong shape, a draw that the settings need is missing, or a setting is unknown.
    """
    _check_shapes(inputs, draws, settings)
    labels = class_labels(
        inputs.image_embeds,
        draws.image_embed_noise,
        constants.embed_mean,
        constants.embed_std,
        constants.image_alphas_cumprod,
    )  # (B, 2 D)
    render, cond = inputs.render_latents.float(), inputs.cond_latents.float()  # (B, 4, h, w) each
    if inputs.has_cond is not None:
        labels = labels * inputs.has_cond[:, None]
        cond = cond * inputs.has_cond[:, None, None, None]
    if settings.condition_dropout_prob:
        keep = condition_keep_masks(draws.random_p, settings.condition_dropout_prob)
        render = render * keep.render[:, None, None, None]
        labels = labels * keep.clip[:, None]
        # Dropped before noising: the conditioning row then holds noise alone, and still counts in the loss.
        cond = cond * keep.cond[:, None, None, None]

    clean = interleave(cond, inputs.gt_latents.float())  # (2B, 4, h, w)
    timesteps = interleave(torch.zeros_like(draws.timesteps), draws.timesteps).long()  # (2B,)
    noise = draws.noise.float()  # (2B, 4, h, w)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * draws.offset_noise.float()
    input_noise = noise
    if settings.input_perturbation:
        input_noise = noise + settings.input_perturbation * draws.perturb_noise.float()
    is_velocity = settings.prediction_type == "v_prediction"
    text = inputs.text_embeds.expand(render.shape[0], -1, -1)  # (B, tokens, C)
    return RefinerRows(
        clean=clean,
        noisy=add_noise(clean, input_noise, timesteps, constants.alphas_cumprod),
        render=interleave(render, render),
        timesteps=timesteps,
        text_embeds=interleave(text, text).float(),
        class_labels=interleave(labels, labels),
        target=velocity(clean, noise, timesteps, constants.alphas_cumprod) if is_velocity else noise,
    )


def _check_shapes(inputs: RefinerInputs, draws: RefinerDraws, settings: ObjectiveSettings) -> None:
    """Compare every tensor with the shape that the ground truth's latents and the image embeddings call for."""
    batch, channels, *size = inputs.gt_latents.shape
    latents, pair = (batch, channels, *size), (2 * batch, channels, *size)
    embeds = (batch, *inputs.image_embeds.shape[1:])
    expected = {
        "inputs.render_latents": (inputs.render_latents, latents),
        "inputs.cond_latents": (inputs.cond_latents, latents),
        "inputs.image_embeds": (inputs.image_embeds, embeds),
        "inputs.has_cond": (inputs.has_cond, (batch,)),
        "draws.image_embed_noise": (draws.image_embed_noise, embeds),
        "draws.noise": (draws.noise, pair),
        "draws.timesteps": (draws.timesteps, (batch,)),
        "draws.random_p": (draws.random_p, (batch,)),
        "draws.offset_noise": (draws.offset_noise, (2 * batch, channels, 1, 1)),
        "draws.perturb_noise": (draws.perturb_noise, pair),
    }
    problems = [
        f"{name} is {tuple(tensor.shape)}, expected {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if inputs.text_embeds.ndim != 3 or inputs.text_embeds.shape[0] not in (1, batch):
        text_shape = tuple(inputs.text_embeds.shape)
        problems.append(f"inputs.text_embeds is {text_shape}, expected (1 or {batch}, tokens, width)")
    needed = {
        "condition_dropout_prob": (settings.condition_dropout_prob, "random_p"),
        "noise_offset": (settings.noise_offset, "offset_noise"),
        "input_perturbation": (settings.input_perturbation, "perturb_noise"),
    }
    problems += [
        f"{setting}={value} needs draws.{name}, which is None"
        for setting, (value, name) in needed.items()
        if value and getattr(draws, name) is None
    ]
    if draws.timesteps.is_floating_point():
        problems.append(f"draws.timesteps must be integers, got {draws.timesteps.dtype}")
    if problems:
        raise ValueError(f"the step's tensors do not fit a batch of {batch}: " + "; ".join(problems))
    _check_prediction_type(settings.prediction_type)
    if settings.cond_loss_weight < 0:
        raise ValueError(f"cond_loss_weight={settings.cond_loss_weight} must not be negative")


def repair_loss(
    unet: Callable[..., Any],
    inputs: RefinerInputs,
    draws: RefinerDraws,
    constants: RefinerConstants,
    settings: ObjectiveSettings,
) -> RepairLoss:
    """The loss of one batch.

    The UNet gets the noisy and the render latents as one 8-channel tensor, in the precision of its own weights.

    Args:
        unet: `UNet2DConditionModel` with 8 input channels and self-mutual attention, wrapped or not, or any callable
            with its signature.

    Returns:
        the loss (a float32 scalar that carries the gradient) and its parts.

    Raises:
        ValueError: as `refiner_rows`, or the UNet's answer has the wrong shape.
    """
    rows = refiner_rows(inputs, draws, constants, settings)
    dtype = parameter_dtype(unet)
    pred = unet(
        torch.cat([rows.noisy, rows.render], dim=1).to(dtype),  # (2B, 8, h, w)
        rows.timesteps,
        encoder_hidden_states=rows.text_embeds.to(dtype),
        class_labels=rows.class_labels.to(dtype),
        return_dict=False,
    )[0].float()  # (2B, 4, h, w)
    if pred.shape != rows.target.shape:
        raise ValueError(f"the UNet answered {tuple(pred.shape)} to a target of {tuple(rows.target.shape)}")
    per_row_mse = (pred - rows.target).square().flatten(1).mean(dim=1)  # (2B,)
    weights = torch.ones_like(per_row_mse)  # (2B,)
    if settings.snr_gamma is not None:
        weights = snr_weights(
            draws.timesteps, constants.alphas_cumprod, settings.snr_gamma, settings.prediction_type, settings.snr_mode
        ).to(per_row_mse)
    loss = mean_over_rows(weights * per_row_mse, settings.cond_loss_weight)
    return RepairLoss(loss, pred, rows.target, per_row_mse, weights, rows)
