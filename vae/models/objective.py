"""The losses of the autoencoder and of its discriminator, with the original's scaling.

Reconstruction terms are sums over the pixels of a frame, averaged over frames; KL and wavelet terms are sums over a
clip, averaged over clips. Everything is computed in float32 under autocast too, or in float64 if the model works in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae.models.posterior import DiagonalGaussian

NORM_EPS, MAX_RATIO = 1e-6, 1e6  # of the adaptive weight
# Where half precision is used, gradients with this sum of magnitudes neither vanish nor overflow in the last layers.
PARTIAL_BACKWARD_LOG2_SUM = 10
PERCEPTUAL_PIXELS = 1 << 21  # of the frames whose features are held at once: 32 frames of 256 x 256 px

Discriminator = Callable[[Tensor], Tensor]
Perceptual = Callable[[Tensor, Tensor], Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a run fixes about its loss.

    Attributes:
        disc_start: first step with the adversarial term.
        disc_weight: factor of the adaptive weight.
        kl_weight, perceptual_weight, wavelet_weight: of these terms; the perceptual loss is not run at weight 0.
        loss_type: pixel loss, |x - x_hat| or its square.
        logvar: of the likelihood: the reconstruction term is divided by exp(logvar).
        disc_loss: of the discriminator; "vanilla" is softplus.
        disc_factor: of both adversarial terms.
    """

    disc_start: int
    disc_weight: float = 0.5
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    loss_type: Literal["l1", "l2"] = "l1"
    logvar: float = 0.0
    wavelet_weight: float = 0.1
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_factor: float = 1.0

    def disc_factor_at(self, step: int) -> float:
        """`disc_factor`, 0 before `disc_start`."""
        return self.disc_factor if step >= self.disc_start else 0.0


class Reconstruction(Protocol):
    """What the loss needs of a model's output: `VaeOutput`."""

    @property
    def sample(self) -> Tensor: ...  # (B, 3, T, H, W)
    @property
    def moments(self) -> Tensor: ...  # (B, 2z, t, h, w)
    @property
    def coefficients(self) -> tuple[Tensor, ...]: ...  # (W2, V2, W3, V3) or ()


def is_discriminator_step(step: int, disc_start: int) -> bool:
    """Odd steps from `disc_start` on train the discriminator, all others the autoencoder."""
    return step % 2 == 1 and step >= disc_start


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, settings: ObjectiveSettings, step: int
) -> tuple[Tensor, Metrics]:
    """Mean of the losses on real and on fake clips; logits of any one shape.

    Returns:
        The loss, and the metrics disc_loss, logits_real, logits_fake (means).
    """
    with torch.autocast(logits_real.device.type, enabled=False):
        real, fake = _precise(logits_real), _precise(logits_fake)
        penalty = F.softplus if settings.disc_loss == "vanilla" else lambda z: F.relu(1 + z)
        loss = settings.disc_factor_at(step) * 0.5 * (penalty(-real).mean() + penalty(fake).mean())
    return loss, {
        "disc_loss": loss.detach(),
        "logits_real": real.detach().mean(),
        "logits_fake": fake.detach().mean(),
    }


def generator_loss(
    x: Tensor,
    output: Reconstruction,
    last_layer: Tensor,
    discriminator: Discriminator,
    perceptual: Perceptual | None,
    settings: ObjectiveSettings,
    step: int,
) -> tuple[Tensor, Metrics]:
    """nll + kl_weight KL + d_weight disc_factor g + wavelet_weight WL, with g = -mean D(x_hat).

    The adaptive weight is that of Esser et al. 2021, "Taming transformers", eq. 6-7. The discriminator and the
    perceptual loss are differentiated once, with respect to x_hat alone: their parameters get no gradient and their
    activations are freed before the backward of the autoencoder. Before `disc_start` the discriminator is not run.

    Args:
        x: target, (B, 3, T, H, W) in [-1, 1].
        output: of the autoencoder for x, with its graph.
        last_layer: weight of the decoder's last layer.
        discriminator: clips -> logits; the plain module, not its DDP wrapper.
        perceptual: (N, 3, H, W) target and x_hat -> (N, 1, 1, 1); needed unless its weight is 0.

    Returns:
        The loss, for one backward, and detached metrics: total_loss, kl_loss, nll_loss, rec_loss, wl_loss, d_weight,
        g_loss, disc_factor, logvar, the mean absolute error rec_per_pixel and, with a perceptual weight, the mean
        lpips. The names depend on the settings alone.

    Raises:
        ValueError: shapes of x and x_hat differ, or there is a perceptual weight and no perceptual loss.
    """
    if x.shape != output.sample.shape:
        raise ValueError(
            f"the model turned clips {tuple(x.shape)} into {tuple(output.sample.shape)} (B, C, T, H, W);"
            " choose a number of frames and a resolution that it keeps (check_size names them)"
        )
    if settings.perceptual_weight > 0 and perceptual is None:
        raise ValueError(f"perceptual_weight is {settings.perceptual_weight}, but no perceptual loss is given")
    batch_size = len(x)
    with torch.autocast(x.device.type, enabled=False):
        x_hat = _precise(output.sample)
        leaf = x_hat.detach().requires_grad_()
        nll, nll_grad, metrics = _nll(x.to(leaf.dtype), leaf, perceptual, settings)

        factor = settings.disc_factor_at(step)
        value, gradient, g, d_weight = nll, nll_grad, torch.zeros_like(nll), torch.zeros_like(nll)
        if step >= settings.disc_start:
            g, g_grad = _adversarial(leaf, discriminator, with_grad=factor != 0)
            d_weight = torch.ones_like(nll)
            if g_grad is not None:
                d_weight = settings.disc_weight * adaptive_weight(x_hat, last_layer, nll_grad, g_grad)
                value, gradient = nll + d_weight * factor * g, nll_grad + d_weight * factor * g_grad

        kl = DiagonalGaussian(_precise(output.moments)).kl().sum() / batch_size
        wl = _wavelet_loss(output.coefficients, nll) / batch_size
        total = _WithGradient.apply(x_hat, value, gradient)
        total = total + settings.kl_weight * kl + settings.wavelet_weight * wl
    metrics |= {
        "total_loss": total.detach(),
        "kl_loss": kl.detach(),
        "nll_loss": nll,
        "rec_loss": nll,  # the original's second name, for a weighting of pixels that its trainer never uses
        "wl_loss": wl.detach(),
        "d_weight": d_weight,
        "g_loss": g,
        "disc_factor": torch.full_like(nll, factor),
        "logvar": torch.full_like(nll, settings.logvar),
    }
    return total, metrics


def adaptive_weight(x_hat: Tensor, last_layer: Tensor, nll_grad: Tensor, g_grad: Tensor) -> Tensor:
    """|dnll/dL| / (|dg/dL| + 1e-6) for the last layer L, at most 1e6, detached; NaN where a gradient is not finite.

    Args:
        x_hat: reconstruction, with its graph, which is kept.
        nll_grad, g_grad: gradients of both losses at x_hat.
    """
    nll_norm = _last_layer_norm(x_hat, last_layer, nll_grad)
    g_norm = _last_layer_norm(x_hat, last_layer, g_grad)
    ratio = nll_norm / (g_norm + NORM_EPS)
    # An infinite norm would pass as weight 0 or 1e6; as NaN it reaches the loss, where the run sees it.
    return ratio.clamp(0, MAX_RATIO) + 0 * (nll_norm + g_norm)


def _last_layer_norm(x_hat: Tensor, last_layer: Tensor, grad: Tensor) -> Tensor:
    """Norm of the gradient that `grad` at x_hat gives the last layer; on the way it is scaled by a power of two."""
    total = grad.abs().sum()
    _, exponent = torch.frexp(total)
    scale = torch.ldexp(torch.ones_like(total), (PARTIAL_BACKWARD_LOG2_SUM - exponent).clamp(-100, 100))
    (at_layer,) = torch.autograd.grad(x_hat, last_layer, grad * scale, retain_graph=True)
    return torch.linalg.vector_norm(_precise(at_layer)) / scale


def _adversarial(x_hat: Tensor, discriminator: Discriminator, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """g = -mean D(x_hat), and its gradient at x_hat."""
    with torch.set_grad_enabled(with_grad):
        g = -discriminator(x_hat).mean()
    return g.detach(), torch.autograd.grad(g, x_hat)[0] if with_grad else None


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to a tensor is known."""

    @staticmethod
    def forward(ctx: Any, at: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def _nll(
    x: Tensor, leaf: Tensor, perceptual: Perceptual | None, settings: ObjectiveSettings
) -> tuple[Tensor, Tensor, Metrics]:
    """Negative log likelihood of x: sum over a frame's pixels, mean over frames; its gradient at the leaf x_hat.

    Also what is reported per pixel. Frames are taken `PERCEPTUAL_PIXELS` at a time: each is a term of its own.
    """
    frames, frames_hat = (clip.transpose(1, 2).flatten(0, 1) for clip in (x, leaf))  # (B T, 3, H, W)
    num_frames, *_, height, width = frames.shape
    group = max(1, PERCEPTUAL_PIXELS // (height * width))
    sums: Metrics = {}
    for start in range(0, num_frames, group):
        some, some_hat = (each[start : start + group] for each in (frames, frames_hat))  # (<= group, 3, H, W)
        terms = _nll_of_frames(some, some_hat, perceptual, settings)
        (gradient,) = torch.autograd.grad(terms["nll"] / num_frames, leaf)
        for name, term in {**terms, "gradient": gradient}.items():
            sums[name] = sums[name] + term.detach() if start else term.detach()
    nll, gradient, error = sums.pop("nll"), sums.pop("gradient"), sums.pop("error")
    metrics = {"rec_per_pixel": error / x.numel()} | {name: value / num_frames for name, value in sums.items()}
    return nll / num_frames, gradient, metrics


def _nll_of_frames(
    x: Tensor, x_hat: Tensor, perceptual: Perceptual | None, settings: ObjectiveSettings
) -> dict[str, Tensor]:
    """Sums over (N, 3, H, W): "nll", of the absolute "error" and, with a perceptual loss, of "lpips"."""
    error = (x - x_hat).abs()
    sums = {"error": error.sum()}
    error = error if settings.loss_type == "l1" else error.square()
    if settings.perceptual_weight > 0 and perceptual is not None:
        distance = perceptual(x, x_hat)  # (N, 1, 1, 1)
        sums["lpips"] = distance.sum()
        error = error + settings.perceptual_weight * distance  # the original counts it once per pixel and channel
    return sums | {"nll": (error / math.exp(settings.logvar) + settings.logvar).sum()}


def _wavelet_loss(coefficients: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """Sum of |W - V| over both levels of coefficients (W2, V2, W3, V3); 0 without them."""
    loss = torch.zeros_like(like)
    for encoder, decoder in zip(coefficients[::2], coefficients[1::2], strict=True):
        loss = loss + (_precise(encoder) - _precise(decoder)).abs().sum()
    return loss


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
