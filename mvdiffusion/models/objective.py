"""The training objective: from latents, embeddings and recorded draws to the loss of the multi-view UNet.

Everything here is a pure function. Random numbers come in as arguments (`MVDraws`), and whatever the precision of the
UNet, schedules, noising and loss are computed in float32.

Axes: B objects, D domains (2, or 1 in the mixed stage), V views. Draws and inputs keep them apart and are laid out as
the N = D B V rows of the UNet (see `layout`) only here. Every draw belongs to one object: an object's loss does not
depend on its neighbours in the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from common.diffusion import add_noise, signal_to_noise, velocity
from common.pretrained import parameter_dtype
from mvdiffusion.models.layout import DOMAINS, repeat_for_rows, to_rows

HalfOrder = Literal["normal_first", "image_first"]
Stage = Literal["joint", "mixed"]
ConditionLatents = Literal["mode", "sample"]
TimestepSharing = Literal["row", "domain_object", "object"]
DropType = Literal["drop_as_a_whole", "drop_independent", "drop_joint", "row_both"]
PredictionType = Literal["epsilon", "v_prediction"]
SnrMode = Literal["canonical", "wonder3d", "gnn3d"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """How the loss is formed.

    Attributes:
        half_order: which domain makes the first half of the rows in training. The UNet is symmetric in the halves.
        stage: "joint" trains both domains of every object together, "mixed" one drawn domain per object.
        condition_latents: whether the caller encodes the condition as the posterior's mode or as a sample of it.
        timestep_sharing: which rows share a timestep: none, those of an object's domain, or all of an object.
        drop_type: which rows share the uniform number that decides about dropping conditions, and what is dropped;
            see `drop_masks`.
        condition_drop_rate: probability of each way to drop conditions (three ways, or one with "row_both").
        noise_offset: strength of one extra normal number per row and channel, part of the noise to predict.
        input_perturbation: strength of extra noise on the UNet's input that is no part of the target.
        prediction_type: what the UNet predicts.
        snr_gamma: cap of the min-SNR weights; None weighs all timesteps alike.
        snr_mode: form of the weights for v-prediction, see `snr_weights`.

    Raises:
        ValueError: an unknown choice, or a number out of its range.
    """

    half_order: HalfOrder = "normal_first"
    stage: Stage = "joint"
    condition_latents: ConditionLatents = "mode"
    timestep_sharing: TimestepSharing = "domain_object"
    drop_type: DropType = "drop_as_a_whole"
    condition_drop_rate: float = 0.05
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    prediction_type: PredictionType = "epsilon"
    snr_gamma: float | None = None
    snr_mode: SnrMode = "canonical"

    def __post_init__(self) -> None:
        choices = {
            "half_order": HalfOrder,
            "stage": Stage,
            "condition_latents": ConditionLatents,
            "timestep_sharing": TimestepSharing,
            "drop_type": DropType,
            "prediction_type": PredictionType,
            "snr_mode": SnrMode,
        }
        problems = [
            f'{name} "{getattr(self, name)}" is unknown: use one of {", ".join(get_args(allowed))}'
            for name, allowed in choices.items()
            if getattr(self, name) not in get_args(allowed)
        ]
        if not 0 <= self.condition_drop_rate <= 1:
            problems.append(f"condition_drop_rate={self.condition_drop_rate} is outside [0, 1]")
        problems += [
            f"{name}={getattr(self, name)} must not be negative; 0 is off"
            for name in ("noise_offset", "input_perturbation")
            if getattr(self, name) < 0
        ]
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            problems.append(f"snr_gamma={self.snr_gamma} must be above 0; leave it out to weigh all timesteps alike")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def num_domains(self) -> int:
        """D: how many domains of an object are rows of one step."""
        return len(DOMAINS) if self.stage == "joint" else 1


@dataclass(frozen=True)
class MVInputs:
    """One batch after the frozen encoders. Latents are already multiplied by the VAE's scaling factor.

    In the mixed stage a caller that has encoded only the drawn domain (`pick_domain`) passes it as both targets.
    """

    normal_latents: torch.Tensor  # (B, V, C, h, w)
    colour_latents: torch.Tensor  # (B, V, C, h, w)
    condition_latents: torch.Tensor  # (B, C, h, w)
    image_embeds: torch.Tensor  # (B, E) projected CLIP embeddings of the condition, not normalised
    normal_camera: torch.Tensor  # (B, V, P) camera and domain embeddings, ready for the UNet
    colour_camera: torch.Tensor  # (B, V, P)


@dataclass(frozen=True)
class MVDraws:
    """Every random number of one step; `draw_shapes` tells which ones some settings need.

    Along D domains are in the order of `DOMAINS`, whatever the order of the halves; in the mixed stage D is 1.
    The last two are for the caller, who encodes; the loss does not look at them.
    """

    noise: torch.Tensor  # (B, D, V, C, h, w) normal
    timesteps: torch.Tensor  # integers in [0, training timesteps): (B, D, V), (B, D) or (B,), by timestep_sharing
    dropout: torch.Tensor | None = None  # float32 uniform in [0, 1): (B,), (B, V) or (B, D, V), by drop_type
    domain: torch.Tensor | None = None  # (B,) integers in [0, 2), places in `DOMAINS`; mixed stage
    offset_noise: torch.Tensor | None = None  # (B, D, V, C, 1, 1) normal; noise_offset
    perturb_noise: torch.Tensor | None = None  # (B, D, V, C, h, w) normal; input_perturbation
    target_eps: torch.Tensor | None = None  # (B, D, V, C, h, w) normal; the targets' posterior samples
    condition_eps: torch.Tensor | None = None  # (B, C, h, w) normal; condition_latents "sample"


@dataclass(frozen=True)
class DropMasks:
    """Per row True where a condition is zeroed; each (N,) bool."""

    latent: torch.Tensor  # the condition's latents
    embed: torch.Tensor  # its image embedding


@dataclass(frozen=True)
class MVRows:
    """The N rows that the UNet sees and what it should answer; floats are float32."""

    clean: torch.Tensor  # (N, C, h, w)
    noisy: torch.Tensor  # (N, C, h, w)
    condition: torch.Tensor  # (N, C, h, w), zero where dropped
    image_embeds: torch.Tensor  # (N, 1, E), zero where dropped
    class_labels: torch.Tensor  # (N, P)
    timesteps: torch.Tensor  # (N,) int64
    domains: torch.Tensor  # (N,) int64, places in `DOMAINS`
    target: torch.Tensor  # (N, C, h, w)


@dataclass(frozen=True)
class MVLoss:
    """The loss and what it was made of; floats are float32."""

    loss: torch.Tensor  # scalar
    pred: torch.Tensor  # (N, C, h, w)
    per_row_mse: torch.Tensor  # (N,) before weights
    row_weights: torch.Tensor  # (N,) min-SNR weights, ones without snr_gamma
    domain_mse: dict[str, torch.Tensor]  # scalar per name of `DOMAINS`; NaN for one that a mixed batch does not hold
    timesteps: torch.Tensor  # (N,) int64
    rows: MVRows


def draw_shapes(
    settings: ObjectiveSettings, num_views: int, latent_shape: tuple[int, int, int]
) -> dict[str, tuple[int, ...]]:
    """Which draws a step with these settings needs: field of `MVDraws` to its shape without the batch axis.

    Args:
        latent_shape: (C, h, w).
    """
    num_domains = settings.num_domains
    channels = latent_shape[0]
    rows = (num_domains, num_views)
    latents = (*rows, *latent_shape)
    timesteps = {"row": rows, "domain_object": (num_domains,), "object": ()}
    dropout = {"drop_as_a_whole": (), "drop_joint": (num_views,), "drop_independent": rows, "row_both": rows}
    needed = {
        "noise": (True, latents),
        "timesteps": (True, timesteps[settings.timestep_sharing]),
        "dropout": (settings.condition_drop_rate > 0, dropout[settings.drop_type]),
        "domain": (settings.stage == "mixed", ()),
        "offset_noise": (settings.noise_offset > 0, (*rows, channels, 1, 1)),
        "perturb_noise": (settings.input_perturbation > 0, latents),
        "target_eps": (True, latents),
        "condition_eps": (settings.condition_latents == "sample", latent_shape),
    }
    return {name: shape for name, (is_needed, shape) in needed.items() if is_needed}


def pick_domain(normal: torch.Tensor, colour: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
    """Each object's drawn domain: (B, ...) and (B, ...) by (B,) places in `DOMAINS` to (B, ...)."""
    is_colour = domain.reshape(-1, *[1] * (normal.ndim - 1)) == DOMAINS.index("colour")  # (B, 1, ...)
    return torch.where(is_colour, colour, normal)


def _as_rows(tensor: torch.Tensor, settings: ObjectiveSettings) -> torch.Tensor:
    """(B, D, V, ...) to the UNet's rows, (N, ...)."""
    if settings.stage == "mixed":
        return tensor.flatten(0, 2)  # (B V, ...)
    normal, colour = tensor.unbind(dim=1)  # (B, V, ...) each
    return to_rows(normal, colour) if settings.half_order == "normal_first" else to_rows(colour, normal)


def _spread(tensor: torch.Tensor, axes: str, num_views: int, settings: ObjectiveSettings) -> torch.Tensor:
    """Numbers that rows share, (B, *axes) with axes among "", "D", "V", "DV", to one per row: (N,)."""
    for position, axis in enumerate("DV", start=1):
        if axis not in axes:
            tensor = tensor.unsqueeze(position)
    return _as_rows(tensor.expand(-1, settings.num_domains, num_views), settings)


def drop_masks(uniform: torch.Tensor, num_views: int, settings: ObjectiveSettings) -> DropMasks:
    """Condition dropout for classifier-free guidance, from uniform numbers u and the drop rate r.

    Drop types and who shares a number:
        drop_as_a_whole: all rows of an object, u (B,).
        drop_joint: both domains of a view, u (B, V).
        drop_independent: nobody, u (B, D, V).
        row_both: nobody, u (B, D, V); u < r drops latents and embedding together, as in the original.
    All but the last drop in three ways: only the embedding for u < r, both for u < 2 r, only the latents for u < 3 r.
    Rates above 1/3 leave the later ways what remains of the unit interval. Class labels are never dropped.

    Args:
        uniform: float32 in [0, 1).

    Returns:
        masks of shape (N,).

    Raises:
        ValueError: `uniform` is not float32, as bounds are rounded to float32 before the comparison.
    """
    if uniform.dtype != torch.float32:
        raise ValueError(f"the draws of condition dropout must be float32; got {uniform.dtype}")
    rate = settings.condition_drop_rate
    # Rounded, but no tensor: one from the host would make it wait for the device.
    one, two, three = torch.tensor([rate, 2 * rate, 3 * rate], dtype=torch.float32).tolist()
    if settings.drop_type == "row_both":
        latent = embed = uniform < one
    else:
        latent, embed = (uniform >= one) & (uniform < three), uniform < two
    axes = {"drop_as_a_whole": "", "drop_joint": "V"}.get(settings.drop_type, "DV")
    return DropMasks(_spread(latent, axes, num_views, settings), _spread(embed, axes, num_views, settings))


def snr_weights(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor, settings: ObjectiveSettings) -> torch.Tensor:
    """Min-SNR weights (Hang et al. 2023); with epsilon prediction min(SNR, gamma) / SNR in every mode.

    Modes, for v-prediction:
        canonical: min(SNR, gamma) / (SNR + 1).
        wonder3d: min(SNR, gamma) / SNR, as in the original's parent.
        gnn3d: min(SNR + 1, gamma) / (SNR + 1), as in the original.

    Args:
        timesteps: (N,).
        alphas_cumprod: (training timesteps,).

    Returns:
        (N,) float32, ones where `snr_gamma` is None.
    """
    snr = signal_to_noise(timesteps, alphas_cumprod)  # (N,)
    if settings.snr_gamma is None:
        return torch.ones_like(snr)
    is_velocity = settings.prediction_type == "v_prediction"
    if is_velocity and settings.snr_mode == "gnn3d":
        snr = snr + 1
    # min(SNR, gamma) / SNR, written so that it is 1 at a timestep without signal.
    weights = (settings.snr_gamma / snr).clamp(max=1)  # (N,)
    if is_velocity and settings.snr_mode == "canonical":
        weights = snr.clamp(max=settings.snr_gamma) / (snr + 1)
    return weights


def mv_rows(inputs: MVInputs, draws: MVDraws, alphas_cumprod: torch.Tensor, settings: ObjectiveSettings) -> MVRows:
    """Add noise, drop conditions and lay out the N rows of one step; arguments as `mv_loss`."""
    _check_tensors(inputs, draws, settings)
    num_views = inputs.normal_latents.shape[1]
    pairs = (inputs.normal_latents, inputs.colour_latents), (inputs.normal_camera, inputs.colour_camera)
    if settings.stage == "mixed":
        latents, cameras = (pick_domain(*pair, draws.domain)[:, None] for pair in pairs)  # (B, 1, V, ...)
        domains = draws.domain[:, None].long()  # (B, 1)
    else:
        latents, cameras = (torch.stack(pair, dim=1) for pair in pairs)  # (B, 2, V, ...)
        places = torch.arange(len(DOMAINS), device=latents.device)
        domains = places.expand(latents.shape[0], -1)  # (B, 2)

    clean = _as_rows(latents, settings).float()  # (N, C, h, w)
    noise = _as_rows(draws.noise, settings).float()  # (N, C, h, w)
    if settings.noise_offset:
        noise = noise + settings.noise_offset * _as_rows(draws.offset_noise, settings).float()
    input_noise = noise
    if settings.input_perturbation:
        input_noise = noise + settings.input_perturbation * _as_rows(draws.perturb_noise, settings).float()
    shared_axes = {"row": "DV", "domain_object": "D", "object": ""}[settings.timestep_sharing]
    timesteps = _spread(draws.timesteps, shared_axes, num_views, settings).long()  # (N,)

    condition = repeat_for_rows(inputs.condition_latents, num_views, settings.num_domains).float()  # (N, C, h, w)
    embeds = repeat_for_rows(inputs.image_embeds, num_views, settings.num_domains).float()  # (N, E)
    if settings.condition_drop_rate:
        drop = drop_masks(draws.dropout, num_views, settings)
        condition = condition.masked_fill(drop.latent[:, None, None, None], 0)
        embeds = embeds.masked_fill(drop.embed[:, None], 0)
    is_velocity = settings.prediction_type == "v_prediction"
    return MVRows(
        clean=clean,
        noisy=add_noise(clean, input_noise, timesteps, alphas_cumprod),
        condition=condition,
        image_embeds=embeds[:, None],  # (N, 1, E)
        class_labels=_as_rows(cameras, settings).float(),
        timesteps=timesteps,
        domains=_spread(domains, "D", num_views, settings),
        target=velocity(clean, noise, timesteps, alphas_cumprod) if is_velocity else noise,
    )


def _check_tensors(inputs: MVInputs, draws: MVDraws, settings: ObjectiveSettings) -> None:
    """Compare every tensor with the shape that the normal latents and cameras call for."""
    if inputs.normal_latents.ndim != 5:
        raise ValueError(f"inputs.normal_latents is {tuple(inputs.normal_latents.shape)}, expected (B, V, C, h, w)")
    batch, num_views, *latent_shape = inputs.normal_latents.shape
    cameras = (batch, num_views, inputs.normal_camera.shape[-1])
    expected = {
        "inputs.colour_latents": (inputs.colour_latents, (batch, num_views, *latent_shape)),
        "inputs.condition_latents": (inputs.condition_latents, (batch, *latent_shape)),
        "inputs.image_embeds": (inputs.image_embeds, (batch, inputs.image_embeds.shape[-1])),
        "inputs.normal_camera": (inputs.normal_camera, cameras),
        "inputs.colour_camera": (inputs.colour_camera, cameras),
    }
    for name, shape in draw_shapes(settings, num_views, tuple(latent_shape)).items():
        if name not in ("target_eps", "condition_eps"):
            expected[f"draws.{name}"] = (getattr(draws, name), (batch, *shape))
    problems = [
        f"{name} is {None if tensor is None else tuple(tensor.shape)}, expected {shape}"
        for name, (tensor, shape) in expected.items()
        if tensor is None or tuple(tensor.shape) != shape
    ]
    if draws.timesteps.is_floating_point():
        problems.append(f"draws.timesteps must be integers, got {draws.timesteps.dtype}")
    if problems:
        size = f"{batch} objects, {num_views} views and {settings}"
        raise ValueError(f"the step's tensors do not fit {size}: " + "; ".join(problems))


def mv_loss(
    unet: Callable[..., Any],
    inputs: MVInputs,
    draws: MVDraws,
    alphas_cumprod: torch.Tensor,
    settings: ObjectiveSettings,
) -> MVLoss:
    """The loss of one batch: the mean over rows of min-SNR weight times mean squared error.

    Args:
        unet: `UNetMV2DConditionModel`, wrapped or not, or any callable with its signature. It gets noisy target and
            condition latents as one tensor of 2 C channels, in the precision of its own weights.
        inputs, draws: on the UNet's device.
        alphas_cumprod: (training timesteps,) of the noise schedule.

    Returns:
        the loss (a float32 scalar that carries the gradient) and its parts.

    Raises:
        ValueError: a tensor has the wrong shape, a draw that the settings need is missing, or the UNet's answer has
            the wrong shape.
    """
    rows = mv_rows(inputs, draws, alphas_cumprod, settings)
    dtype = parameter_dtype(unet)
    pred = unet(
        torch.cat([rows.noisy, rows.condition], dim=1).to(dtype),  # (N, 2 C, h, w)
        rows.timesteps,
        encoder_hidden_states=rows.image_embeds.to(dtype),
        class_labels=rows.class_labels.to(dtype),
        return_dict=False,
    )[0].float()  # (N, C, h, w)
    if pred.shape != rows.target.shape:
        raise ValueError(f"the UNet answered {tuple(pred.shape)} to a target of {tuple(rows.target.shape)}")
    per_row_mse = (pred - rows.target).square().flatten(1).mean(dim=1)  # (N,)
    weights = snr_weights(rows.timesteps, alphas_cumprod, settings)  # (N,)
    return MVLoss(
        loss=(weights * per_row_mse).mean(),
        pred=pred,
        per_row_mse=per_row_mse,
        row_weights=weights,
        domain_mse=_domain_mse(per_row_mse.detach(), rows.domains),
        timesteps=rows.timesteps,
        rows=rows,
    )


def _domain_mse(per_row_mse: torch.Tensor, domains: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean of (N,) errors by the rows' domain."""
    members = {name: domains == place for place, name in enumerate(DOMAINS)}  # (N,) each
    return {name: per_row_mse.masked_fill(~is_member, 0).sum() / is_member.sum() for name, is_member in members.items()}
