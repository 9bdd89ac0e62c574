"""The training objective: from the frozen encoders' answers and recorded draws to the loss.

Everything here is a pure function. Random numbers come in as arguments (`GGIDraws`), and all arithmetic outside the
transformer is float32.

A step goes: `noisy_end_images`, then the VAE's encoder on both of them, on the clip and on the condition, then
`ggi_loss`. Latents are (B, F, C, h, w) with F latent frames; the VAE's own layout is (B, C, F, h, w).
"""

from dataclasses import dataclass

import torch

from common.diffusion import add_noise, velocity
from training_ggi.models.noise_warp import mix_noise
from training_ggi.models.transformer import RotaryTables, model_input, predict_velocity

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -3.0, 0.5  # of the noise on the end images: sigma is 0.05 in the median
LOG_VARIANCE_RANGE = -30.0, 20.0  # as diffusers clamps the VAE's log variance


@dataclass(frozen=True)
class GGIDraws:
    """Every random number of one step, all float32 but the timesteps.

    F, C, h, w are the sizes of the latents, H and W the height and width of the clip in pixels.
    """

    timesteps: torch.Tensor  # (B,) int64, uniform in [0, training timesteps)
    alpha: torch.Tensor  # (B,) uniform in [0, 1): share of fresh noise, 1 leaves nothing of the warped noise
    fresh_noise: torch.Tensor  # (B, F, C, h, w) normal
    sigma_normal: torch.Tensor  # (B,) normal; sigma = exp(-3 + 0.5 sigma_normal)
    image_noise: torch.Tensor  # (B, 2, 3, H, W) normal: first, then last image
    first_eps: torch.Tensor  # (B, 1, C, h, w) normal, of the posterior
    last_eps: torch.Tensor  # (B, 1, C, h, w) normal
    video_eps: torch.Tensor  # (B, F, C, h, w) normal
    cond_eps: torch.Tensor  # (B, F, C, h, w) normal
    image_dropout: torch.Tensor  # (B,) uniform in [0, 1): below image_dropout_prob, the end images are dropped
    caption_dropout: torch.Tensor  # (B,) uniform in [0, 1): below caption_dropout_prob, the caption is dropped


@dataclass(frozen=True)
class GGIInputs:
    """One batch after the frozen encoders.

    Moments are what the VAE's encoder says, mean then log variance: `vae.encode(x).latent_dist.parameters`.
    """

    first_moments: torch.Tensor  # (B, 2C, 1, h, w) of the first noisy image
    last_moments: torch.Tensor  # (B, 2C, 1, h, w) of the last noisy image
    video_moments: torch.Tensor  # (B, 2C, F, h, w)
    cond_moments: torch.Tensor  # (B, 2C, F, h, w)
    warped_noise: torch.Tensor  # (B, F, C, h, w) unit variance, one per latent frame
    prompt_embeds: torch.Tensor  # (B, tokens, D)
    empty_prompt_embeds: torch.Tensor | None = None  # (1, tokens, D) of the empty caption; needed with caption dropout


@dataclass(frozen=True)
class GGIConstants:
    """What is the same in every step."""

    alphas_cumprod: torch.Tensor  # (T,) float64, see `schedule.alphas_cumprod`
    rotary: RotaryTables  # see `transformer.rotary_for`
    vae_scaling_factor: float = 0.7
    image_dropout_prob: float = 0.0
    caption_dropout_prob: float = 0.0


@dataclass(frozen=True)
class GGIBatch:
    """What the transformer sees, and what it should answer; float32 but the timesteps."""

    noisy: torch.Tensor  # (B, F, C, h, w) x_t
    image_latents: torch.Tensor  # (B, F, C, h, w) zero between the ends
    cond_latents: torch.Tensor  # (B, F, C, h, w)
    video_latents: torch.Tensor  # (B, F, C, h, w) x_0
    noise: torch.Tensor  # (B, F, C, h, w)
    target: torch.Tensor  # (B, F, C, h, w) v
    prompt_embeds: torch.Tensor  # (B, tokens, D)
    timesteps: torch.Tensor  # (B,)


@dataclass(frozen=True)
class GGILoss:
    """The loss and what it was made of, all float32."""

    loss: torch.Tensor  # scalar, the mean over samples
    per_sample: torch.Tensor  # (B,) mean squared error of v
    timesteps: torch.Tensor  # (B,) int64
    prediction: torch.Tensor  # (B, F, C, h, w)
    batch: GGIBatch


def noisy_end_images(clip: torch.Tensor, sigma_normal: torch.Tensor, image_noise: torch.Tensor) -> torch.Tensor:
    """First and last frame with noise of one strength per sample, sigma = exp(N(-3, 0.5)).

    Args:
        clip: (B, frames, 3, H, W) in [-1, 1].
        sigma_normal: (B,) normal.
        image_noise: (B, 2, 3, H, W) normal.

    Returns:
        (B, 2, 3, H, W) float32.
    """
    sigma = torch.exp(LOG_SIGMA_MEAN + LOG_SIGMA_STD * sigma_normal.float())[:, None, None, None, None]
    return clip[:, [0, -1]].float() + sigma * image_noise.float()  # (B, 2, 3, H, W)


def sample_posterior(moments: torch.Tensor, eps: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Scaled latents drawn from the VAE's posterior: (mean + std * eps) * scaling_factor.

    Args:
        moments: (B, 2C, F, h, w), mean then log variance.
        eps: (B, F, C, h, w) normal.

    Returns:
        (B, F, C, h, w) float32.

    Raises:
        ValueError: the shapes do not belong together.
    """
    mean, log_variance = moments.float().transpose(1, 2).chunk(2, dim=2)  # (B, F, C, h, w) each
    if mean.shape != eps.shape:
        raise ValueError(f"moments {tuple(moments.shape)} (B, 2C, F, h, w) do not fit a draw of {tuple(eps.shape)}")
    return (mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * eps.float()) * scaling_factor


def end_image_latents(first: torch.Tensor, last: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Latents of the images, each (B, 1, C, h, w), at both ends, zeros between: (B, num_frames, C, h, w).

    Raises:
        ValueError: fewer than two frames.
    """
    if num_frames < 2:
        raise ValueError(f"{num_frames} latent frame has no room for a first and a last image: at least 2 are needed")
    batch, _, *rest = first.shape
    between = first.new_zeros(batch, num_frames - 2, *rest)  # (B, F - 2, C, h, w)
    return torch.cat([first, between, last], dim=1)  # (B, F, C, h, w)


def drop_captions(
    prompt_embeds: torch.Tensor, empty_prompt_embeds: torch.Tensor | None, uniform: torch.Tensor, prob: float
) -> torch.Tensor:
    """The empty caption's embedding where the sample's uniform number is below `prob`: (B, tokens, D).

    Raises:
        ValueError: captions are to be dropped, and there is no embedding of the empty caption.
    """
    if not prob:
        return prompt_embeds
    if empty_prompt_embeds is None:
        raise ValueError(f"caption_dropout_prob={prob} needs the embedding of the empty caption, which is None")
    return torch.where((uniform < prob)[:, None, None], empty_prompt_embeds.to(prompt_embeds.dtype), prompt_embeds)


def assemble(inputs: GGIInputs, draws: GGIDraws, constants: GGIConstants) -> GGIBatch:
    """Draw the latents, degrade the noise, noise the clip.

    Dropped images are zeros in both ends' places. Images, captions and the degradation are dropped or drawn sample by
    sample.

    Raises:
        ValueError: shapes do not belong together, or the empty caption's embedding is missing.
    """
    scale = constants.vae_scaling_factor
    first = sample_posterior(inputs.first_moments, draws.first_eps, scale)  # (B, 1, C, h, w)
    last = sample_posterior(inputs.last_moments, draws.last_eps, scale)  # (B, 1, C, h, w)
    video = sample_posterior(inputs.video_moments, draws.video_eps, scale)  # (B, F, C, h, w)
    cond = sample_posterior(inputs.cond_moments, draws.cond_eps, scale)  # (B, F, C, h, w)
    images = end_image_latents(first, last, video.shape[1])  # (B, F, C, h, w)
    keep = draws.image_dropout >= constants.image_dropout_prob  # (B,)
    noise = mix_noise(inputs.warped_noise.float(), draws.fresh_noise.float(), draws.alpha)  # (B, F, C, h, w)
    if noise.shape != video.shape:
        raise ValueError(f"noise {tuple(noise.shape)} and latents {tuple(video.shape)} must have one shape")
    return GGIBatch(
        noisy=add_noise(video, noise, draws.timesteps, constants.alphas_cumprod),
        image_latents=images * keep[:, None, None, None, None],
        cond_latents=cond,
        video_latents=video,
        noise=noise,
        target=velocity(video, noise, draws.timesteps, constants.alphas_cumprod),
        prompt_embeds=drop_captions(
            inputs.prompt_embeds, inputs.empty_prompt_embeds, draws.caption_dropout, constants.caption_dropout_prob
        ),
        timesteps=draws.timesteps,
    )


def ggi_loss(transformer: torch.nn.Module, inputs: GGIInputs, draws: GGIDraws, constants: GGIConstants) -> GGILoss:
    """The loss of one batch: the mean squared error of v.

    It equals the error of x_0 weighted with 1 / (1 - alphas_cumprod), value and gradient: x_0's error is
    sqrt(1 - alphas_cumprod) times v's.

    Args:
        transformer: the widened model, wrapped or not.

    Raises:
        ValueError: as `assemble`.
    """
    batch = assemble(inputs, draws, constants)
    prediction = predict_velocity(
        transformer,
        model_input(batch.noisy, batch.image_latents, batch.cond_latents),
        batch.prompt_embeds,
        batch.timesteps,
        constants.rotary,
    )  # (B, F, C, h, w)
    per_sample = (prediction - batch.target).square().flatten(1).mean(dim=1)  # (B,)
    return GGILoss(per_sample.mean(), per_sample, batch.timesteps, prediction, batch)
