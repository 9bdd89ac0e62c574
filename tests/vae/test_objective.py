"""The losses against their plain form: values, gradients, what is left alone, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models import objective
from vae.models.discriminator import NLayerDiscriminator, NLayerDiscriminator3D, RealAndFake
from vae.models.objective import (
    ObjectiveSettings,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    is_discriminator_step,
)
from vae.models.perceptual import PerceptualLoss, lpips_heads, perceptual_state

KEYS_DIR = Path(__file__).resolve().parents[3] / "shared" / "specs" / "keys"
B, T, H, W = 2, 5, 8, 8


class Output(NamedTuple):
    sample: Tensor
    moments: Tensor
    coefficients: tuple[Tensor, ...]


class ToyVae(nn.Module):
    """A model with every output that the losses read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv3d(3, 8, 3, padding=1)
        self.last = nn.Conv3d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Output:
        h = torch.tanh(self.body(x))
        coefficients = (x.mean(1) * 2, h[:, 0], x.mean(1) * 3, h[:, 1])
        return Output(self.last(h), h, coefficients)


class ToyDiscriminator(nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.conv(x))


class ToyPerceptual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return (self.conv(x) - self.conv(x_hat)).square().mean((1, 2, 3), keepdim=True)


class Toys(NamedTuple):
    vae: ToyVae
    discriminator: ToyDiscriminator
    perceptual: ToyPerceptual
    x: Tensor


def toys(dtype: torch.dtype = torch.float64, seed: int = 0) -> Toys:
    torch.manual_seed(seed)
    x = torch.rand(B, 3, T, H, W, dtype=dtype) * 2 - 1
    return Toys(ToyVae().to(dtype), ToyDiscriminator().to(dtype), ToyPerceptual().to(dtype), x)


def plain_loss(t: Toys, settings: ObjectiveSettings) -> tuple[Tensor, Tensor]:
    """The original's form: two backwards through everything for the weight, then the one for the loss."""
    output = t.vae(t.x)
    x, x_hat = (z.transpose(1, 2).flatten(0, 1) for z in (t.x, output.sample))
    error = (x - x_hat).abs() if settings.loss_type == "l1" else (x - x_hat).square()
    error = error + settings.perceptual_weight * t.perceptual(x, x_hat)
    logvar = torch.tensor(settings.logvar, dtype=x.dtype)
    nll = (error / logvar.exp() + logvar).sum() / len(x)
    g = -t.discriminator(output.sample).mean()
    layer = t.vae.last.weight
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (nll, g)]
    d_weight = (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e6).detach() * settings.disc_weight
    mean, log_variance = output.moments.chunk(2, 1)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / B
    w2, v2, w3, v3 = output.coefficients
    wl = ((w2 - v2).abs().sum() + (w3 - v3).abs().sum()) / B
    loss = nll + settings.kl_weight * kl + d_weight * settings.disc_factor * g + settings.wavelet_weight * wl
    return loss, d_weight


def our_loss(t: Toys, settings: ObjectiveSettings, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    return generator_loss(t.x, t.vae(t.x), t.vae.last.weight, t.discriminator, t.perceptual, settings, step)


SETTINGS = ObjectiveSettings(disc_start=0, kl_weight=0.3, perceptual_weight=0.7, logvar=0.2)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_one_backward_gives_the_gradients_of_the_plain_form(loss_type: str) -> None:
    settings = ObjectiveSettings(0, 0.5, 0.3, 0.7, loss_type, 0.2, 0.1, "hinge", 0.8)
    t = toys()
    expected, d_weight = plain_loss(t, settings)
    gradients = torch.autograd.grad(expected, list(t.vae.parameters()))
    loss, metrics = our_loss(t, settings)
    (loss * 3).backward()  # a loss scale passes through
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["d_weight"], d_weight, rtol=1e-12, atol=0)
    for parameter, gradient in zip(t.vae.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * gradient, rtol=1e-10, atol=1e-12)


def test_other_networks_get_no_gradient() -> None:
    t = toys()
    our_loss(t, SETTINGS)[0].backward()
    assert all(p.grad is None for net in (t.discriminator, t.perceptual) for p in net.parameters())
    assert all(p.grad is not None for p in t.vae.parameters())


def test_before_its_start_the_discriminator_is_not_run() -> None:
    t = toys()
    settings = ObjectiveSettings(disc_start=3)
    _, early = our_loss(t, settings, step=2)
    assert t.discriminator.calls == 0
    assert early["d_weight"] == early["g_loss"] == early["disc_factor"] == 0
    _, late = our_loss(t, settings, step=3)
    assert t.discriminator.calls == 1
    assert late["d_weight"] > 0 and late["disc_factor"] == 1
    assert early.keys() == late.keys()


def test_names_of_metrics_follow_from_the_settings() -> None:
    terms = {"total_loss", "kl_loss", "nll_loss", "rec_loss", "wl_loss", "d_weight", "g_loss", "disc_factor", "logvar"}
    t = toys()
    _, metrics = our_loss(t, SETTINGS)
    assert metrics.keys() == terms | {"rec_per_pixel", "lpips"}
    x_hat = t.vae(t.x).sample
    assert float(metrics["rec_per_pixel"]) == pytest.approx(float((t.x - x_hat.detach()).abs().mean()), rel=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    settings = ObjectiveSettings(0, perceptual_weight=0)
    _, metrics = generator_loss(t.x, t.vae(t.x), t.vae.last.weight, t.discriminator, None, settings, 0)
    assert metrics.keys() == terms | {"rec_per_pixel"}


def test_the_wavelet_term_is_told_at_weight_0_and_is_0_without_coefficients() -> None:
    t = toys()
    weighted, unweighted = (our_loss(t, replace(SETTINGS, wavelet_weight=weight)) for weight in (0.5, 0.0))
    wl = weighted[1]["wl_loss"]
    assert wl == unweighted[1]["wl_loss"] > 0
    torch.testing.assert_close(weighted[0] - unweighted[0], 0.5 * wl)
    output = t.vae(t.x)._replace(coefficients=())
    loss, metrics = generator_loss(t.x, output, t.vae.last.weight, t.discriminator, t.perceptual, SETTINGS, 0)
    assert metrics["wl_loss"] == 0 and loss == unweighted[0]


@pytest.mark.parametrize("num_frames", [1, 3])
def test_frames_pass_the_perceptual_loss_in_groups(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    t, seen = toys(), []
    whole, expected = our_loss(t, SETTINGS)
    gradients = torch.autograd.grad(whole, list(t.vae.parameters()))
    monkeypatch.setattr(objective, "PERCEPTUAL_PIXELS", num_frames * H * W)
    t.perceptual.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    loss, metrics = our_loss(t, SETTINGS)
    assert max(seen) == num_frames and sum(seen) == B * T
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics, expected, rtol=1e-12, atol=1e-15)
    found = torch.autograd.grad(loss, list(t.vae.parameters()))
    torch.testing.assert_close(found, gradients, rtol=1e-10, atol=1e-12)


def test_float32_under_autocast() -> None:
    t = toys(torch.float32)
    expected, _ = our_loss(t, SETTINGS)
    output = t.vae(t.x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, metrics = generator_loss(t.x, output, t.vae.last.weight, t.discriminator, t.perceptual, SETTINGS, 0)
        real, fake = RealAndFake(t.discriminator)(t.x, output.sample.bfloat16())
    assert torch.equal(loss, expected)
    assert {value.dtype for value in (loss, real, fake, *metrics.values())} == {torch.float32}


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
def test_weight_of_tiny_and_huge_gradients_through_half_precision(scale: float) -> None:
    torch.manual_seed(0)
    layer = torch.randn(3, 8, 3, 3).half().requires_grad_()
    x_hat = F.conv2d(torch.randn(2, 8, 8, 8).half(), layer, padding=1).float()
    nll_grad, g_grad = torch.randn_like(x_hat), torch.randn_like(x_hat)
    expected = adaptive_weight(x_hat, layer, nll_grad, g_grad)
    weight = adaptive_weight(x_hat, layer, nll_grad * scale, g_grad * scale)
    norm = torch.autograd.grad(x_hat, layer, g_grad, retain_graph=True)[0].float().norm() * scale
    assert float(weight) == pytest.approx(float(expected * norm / (norm + 1e-6)), rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    t = toys(torch.float32)
    with torch.no_grad():
        t.discriminator.conv.bias[0] = value
        t.discriminator.conv.weight[0, 0, 0, 0, 0] = value
    loss, _ = our_loss(t, SETTINGS)
    assert not loss.isfinite()
    layer = torch.ones((), requires_grad=True)
    x_hat = layer * torch.ones(B, 3, T, H, W)
    good = torch.ones_like(x_hat)
    bad = good.clone()
    bad[0, 0, 0, 0, 0] = value
    assert adaptive_weight(x_hat, layer, good, good) == 1
    assert adaptive_weight(x_hat, layer, bad, good).isnan()
    assert adaptive_weight(x_hat, layer, good, bad).isnan()


def test_weight_is_bounded() -> None:
    t = toys()
    x_hat = t.vae(t.x).sample
    assert adaptive_weight(x_hat, t.vae.last.weight, torch.ones_like(x_hat), torch.zeros_like(x_hat)) == 1e6


def test_odd_steps_from_the_start_train_the_discriminator() -> None:
    assert [step for step in range(9) if is_discriminator_step(step, 4)] == [5, 7]
    assert [step for step in range(5) if is_discriminator_step(step, 0)] == [1, 3]


def test_discriminator_loss_has_no_gradient_before_the_start() -> None:
    logits = torch.tensor([0.5, -2.0], requires_grad=True)
    loss, metrics = discriminator_loss(logits, -logits, ObjectiveSettings(disc_start=4), 3)
    loss.backward()
    assert loss == 0 and logits.grad.tolist() == [0, 0]
    assert float(metrics["logits_real"]) == -0.75
    loss, _ = discriminator_loss(logits, -logits, ObjectiveSettings(disc_start=4), 5)
    assert loss.item() == 0.5 * ((0.5 + 3.0) / 2 + (0.5 + 3.0) / 2)


def test_refusals() -> None:
    t = toys()
    output = t.vae(t.x)
    with pytest.raises(ValueError, match=r"turned clips \(2, 3, 4, 8, 8\) into \(2, 3, 5, 8, 8\).*number of frames"):
        generator_loss(t.x[:, :, :4], output, t.vae.last.weight, t.discriminator, t.perceptual, SETTINGS, 0)
    with pytest.raises(ValueError, match=r"perceptual_weight is 0\.7, but no perceptual loss"):
        generator_loss(t.x, output, t.vae.last.weight, t.discriminator, None, SETTINGS, 0)


def test_real_and_fake_are_two_passes() -> None:
    torch.manual_seed(0)
    discriminator = NLayerDiscriminator3D(ndf=4, n_layers=2, dropout=0.0)
    twin = NLayerDiscriminator3D(ndf=4, n_layers=2, dropout=0.0)
    twin.load_state_dict(discriminator.state_dict())
    both = RealAndFake(discriminator)
    assert all(name.startswith("discriminator.main.") for name in both.state_dict())
    real, fake = torch.randn(2, 2, 3, 5, 16, 16)
    logits = both(real, fake)
    assert torch.equal(logits[0], twin(real)) and torch.equal(logits[1], twin(fake))
    assert all(torch.equal(a, b) for a, b in zip(discriminator.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("net", [NLayerDiscriminator3D, NLayerDiscriminator])
def test_discriminator_starts_from_narrow_weights(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    state = net().state_dict()
    assert float(state["main.2.weight"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(state["main.3.weight"].mean()) == pytest.approx(1.0, abs=0.01)
    assert state["main.3.bias"].count_nonzero() == 0


@pytest.mark.skipif(not KEYS_DIR.is_dir(), reason=f"no {KEYS_DIR}")
@pytest.mark.parametrize(
    ("build", "file"),
    [
        (NLayerDiscriminator3D, "discriminator3d_n4_ndf64"),
        (NLayerDiscriminator, "discriminator2d_n3_ndf64"),
        (PerceptualLoss, "lpips_vgg16"),
    ],
)
def test_state_dict_names(build: type[nn.Module], file: str) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    expected = json.loads((KEYS_DIR / f"{file}.json").read_text())
    assert {name: list(value.shape) for name, value in state.items()} == expected


def test_patches_of_both_discriminators() -> None:
    clips, images = torch.randn(1, 3, 17, 64, 64), torch.randn(1, 3, 64, 64)
    assert NLayerDiscriminator3D(ndf=4)(clips).shape == (1, 1, 5, 4, 4)
    assert NLayerDiscriminator(ndf=4)(images).shape == (1, 1, 6, 6)
    frames = NLayerDiscriminator(ndf=4).eval()
    assert torch.equal(frames(clips), frames(clips[0].transpose(0, 1)))


# LPIPS.


def vgg16_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        names = PerceptualLoss().state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        "features." + name.split(".", 2)[2]: torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        for name, value in names.items()
        if name.startswith("net.")
    }


def test_lpips_is_frozen_in_every_respect() -> None:
    state, random_state = vgg16_state(), torch.get_rng_state()
    loss = PerceptualLoss.load(state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(p.requires_grad for p in loss.parameters())
    x, x_hat = torch.rand(2, 2, 3, 32, 32)
    x_hat.requires_grad_()
    values = loss.train()(x, x_hat)
    assert values.shape == (2, 1, 1, 1) and bool((values > 0).all())
    assert torch.equal(values, loss.eval()(x, x_hat))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(values, loss(x, x_hat))
    values.sum().backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().sum() > 0


def test_lpips_names_what_is_wrong_with_weights() -> None:
    heads, state = lpips_heads(), vgg16_state()
    with pytest.raises(ValueError, match=r"torchvision's VGG16, but features\.5\.weight is absent, expected \(128, 64"):
        perceptual_state({k: v for k, v in state.items() if k != "features.5.weight"}, heads)
    with pytest.raises(
        ValueError, match=r"LPIPS' heads for VGG16, but lin0\.model\.1\.weight has shape \(1, 2, 1, 1\)"
    ):
        perceptual_state(state, heads | {"lin0.model.1.weight": torch.zeros(1, 2, 1, 1)})
    with pytest.raises(ValueError, match=r"at least 16 px, got \(8, 32\)"):
        PerceptualLoss.load(state)(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))
