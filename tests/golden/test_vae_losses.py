"""The losses, the discriminator, LPIPS and a short training run of the autoencoder against recorded vectors."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vae_cases import Case, by_case

from common.optim import EMA
from vae.models.discriminator import NLayerDiscriminator3D, RealAndFake
from vae.models.load import build_model
from vae.models.objective import (
    ObjectiveSettings,
    discriminator_loss,
    generator_loss,
    is_discriminator_step,
)
from vae.models.perceptual import PerceptualLoss

# Options of the original that change nothing there, or say what it has alone.
WITHOUT_EFFECT = ("pixelloss_weight", "distill_weight", "disc_conditional", "use_actnorm")
ORIGINAL_DEFAULTS = {"kl_weight": 1.0, "disc_weight": 1.0, "wavelet_weight": 0.01}  # those of our trainer are others
OF_DISCRIMINATOR = {"disc_num_layers": "n_layers", "disc_in_channels": "input_nc"}
ALWAYS_ZERO = ("distill_loss",)  # terms of the original that its trainer cannot switch on


class Output(NamedTuple):
    sample: Tensor
    moments: Tensor
    coefficients: tuple[Tensor, ...]


def settings_of(loss_kwargs: dict[str, Any]) -> ObjectiveSettings:
    options = {"logvar" if k == "logvar_init" else k: v for k, v in (ORIGINAL_DEFAULTS | loss_kwargs).items()}
    return ObjectiveSettings(**{k: v for k, v in options.items() if k not in (*WITHOUT_EFFECT, *OF_DISCRIMINATOR)})


def pooled_difference(x: Tensor, x_hat: Tensor) -> Tensor:
    """The vectors' stand-in for LPIPS."""
    return F.avg_pool2d(x - x_hat, 2).square().mean((1, 2, 3), keepdim=True)


def perceptual_of(case: Case) -> Any:
    if case.config["perceptual"] != "vgg":
        return {"none": None, "stub": pooled_difference}[case.config["perceptual"]]
    return case.load_weights(PerceptualLoss(), "")


def discriminator_of(case: Case, **options: Any) -> nn.Module:
    loss_kwargs = case.config.get("loss_kwargs", {})
    options |= {ours: loss_kwargs[theirs] for theirs, ours in OF_DISCRIMINATOR.items() if theirs in loss_kwargs}
    return case.load_weights(NLayerDiscriminator3D(**{"dropout": 0.0, **options}))


def test_options_of_the_original() -> None:
    named = {"disc_start": 2, "disc_num_layers": 3, "disc_in_channels": 1, "use_actnorm": False, "logvar_init": 0.5}
    dead = {"pixelloss_weight": 3.0, "distill_weight": 1.0, "disc_conditional": False}
    settings = settings_of(named | dead | {"disc_weight": 0.5})
    assert settings == ObjectiveSettings(2, disc_weight=0.5, kl_weight=1.0, wavelet_weight=0.01, logvar=0.5)
    case = Case("", "", {"loss_kwargs": named, "weights_seed": 0}, {}, {}, {}, {})
    layers = discriminator_of(case).main
    assert layers[0].in_channels == 1 and len(layers) == len(NLayerDiscriminator3D(n_layers=3).main)


@by_case("d_losses*")
def test_discriminator_losses_on_logits(case: Case) -> None:
    for name in case.expected:
        settings = ObjectiveSettings(disc_start=0, disc_loss=name)
        case.check(name, discriminator_loss(case.inputs["real"], case.inputs["fake"], settings, 0)[0])


@by_case("discriminator3d*")
def test_discriminator_3d(case: Case) -> None:
    discriminator = discriminator_of(case, **case.config["kwargs"]).train(case.config["mode"] == "train")
    case.check("logits", discriminator(case.inputs["x"]))
    for name in case.expected:
        if name.startswith("after/"):
            case.check(name, discriminator.state_dict()[name.removeprefix("after/")])


@by_case("discriminator_loss*")
def test_discriminator_step(case: Case) -> None:
    both = RealAndFake(discriminator_of(case))
    logits = both(case.inputs["inputs"], case.inputs["recon"])
    settings = settings_of(case.config["loss_kwargs"])
    loss, metrics = discriminator_loss(*logits, settings, case.config["global_step"])
    loss.backward()
    parameters, state = dict(both.discriminator.named_parameters()), both.discriminator.state_dict()
    for name in case.expected:
        kind, _, rest = name.partition("/")
        values = {"grad": lambda: parameters[rest].grad, "after": lambda: state[rest], "loss": lambda: loss}  # noqa: B023
        case.check(name, values.get(kind, lambda: metrics[name])())  # noqa: B023


@by_case("generator_loss*")
def test_generator_step(case: Case) -> None:
    inputs = {name: value.clone().requires_grad_(name != "inputs") for name, value in case.inputs.items()}
    feat, weight = inputs["feat"], inputs["W"]
    frames = F.conv2d(feat.transpose(1, 2).flatten(0, 1), weight, padding=1)  # (B T, 3, H, W)
    recon = frames.unflatten(0, (len(feat), -1)).transpose(1, 2)  # (B, 3, T, H, W)
    names = ("enc_l1", "dec_l1", "enc_l2", "dec_l2")
    output = Output(recon, inputs["moments"], tuple(inputs[name] for name in names if name in inputs))
    settings = settings_of(case.config["loss_kwargs"])
    loss, metrics = generator_loss(
        inputs["inputs"],
        output,
        weight,
        discriminator_of(case),
        perceptual_of(case),
        settings,
        case.config["global_step"],
    )
    loss.backward()
    metrics |= {"loss": loss, "recon": recon}
    for name in case.expected:
        if name in ALWAYS_ZERO:
            assert case.expected[name] == 0
        else:
            case.check(name, inputs[name.removeprefix("grad_")].grad if name.startswith("grad_") else metrics[name])


@by_case("lpips_vgg*")
def test_lpips(case: Case) -> None:
    loss = case.load_weights(PerceptualLoss())
    case.check("value", loss(case.inputs["a"], case.inputs["b"]))
    x = loss.scaling_layer(case.inputs["a"])
    for index, block in enumerate(loss.net.values()):
        x = block(x)
        case.check(f"feat{index}_mean_std", torch.stack([x.mean(), x.std()]))


def moved(average: dict[str, Tensor], model: nn.Module, decay: float) -> dict[str, Tensor]:
    """One update of a moving average with a constant decay, in the model's precision."""
    return {name: value.lerp(model.get_parameter(name).detach(), 1 - decay) for name, value in average.items()}


@by_case("train_trajectory*")
def test_alternating_steps(case: Case) -> None:
    config, dtype = case.config, getattr(torch, case.config.get("dtype", "float32"))
    model = case.load_weights(build_model(config["model"], config["config"])).to(dtype)
    both = RealAndFake(discriminator_of(case).to(dtype))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    gen_optimizer = torch.optim.AdamW(parameters.values(), **options)
    disc_optimizer = torch.optim.AdamW(both.parameters(), **options)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    settings, perceptual = settings_of(config["loss_kwargs"]), perceptual_of(case)
    if isinstance(perceptual, nn.Module):
        perceptual.to(dtype)

    trace = []
    for step in range(config["steps"]):
        x, eps = case.inputs[f"x{step}"].to(dtype), case.inputs[f"eps{step}"].to(dtype)
        output = model(x, noise=eps)
        if is_discriminator_step(step, settings.disc_start):
            loss, metrics = discriminator_loss(*both(x, output.sample.detach()), settings, step)
            row = [1, loss, metrics["logits_real"], metrics["logits_fake"], 0, 0, 0]
            optimizer = disc_optimizer
        else:
            if not config["wavelet_loss"]:
                output = output._replace(coefficients=())
            loss, metrics = generator_loss(x, output, model.last_layer, both.discriminator, perceptual, settings, step)
            row = [0, loss, *(metrics[name] for name in ("rec_loss", "kl_loss", "wl_loss", "d_weight", "g_loss"))]
            optimizer = gen_optimizer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if optimizer is gen_optimizer:
            average = moved(average, model, config["ema_decay"])
        trace.append([torch.as_tensor(value).item() for value in row])

    names = ("is_disc", "total", "rec_or_logits_real", "kl_or_logits_fake", "wl", "d_weight", "g_loss")
    for name, column in zip(names, torch.tensor(trace, dtype=torch.float64).T, strict=True):
        case.check(name, column)
    for name in config["track"]:
        case.check(f"param/{name}", parameters[name])
        case.check(f"ema/{name}", average[name])
    case.check("disc/main.0.weight_first8", both.discriminator.main[0].weight[:8])
    case.check("n_ema", len(average))


@by_case("ema*")
def test_moving_average(case: Case) -> None:
    steps = range(1, case.config["steps"] + 1)
    weight = case.inputs["w0"]
    model = nn.Linear(weight.shape[1], weight.shape[0])

    def set_to(step: int) -> None:
        with torch.no_grad():
            model.weight.copy_(case.inputs[f"w{step}"])
            model.bias.copy_(case.inputs[f"b{step}"])

    set_to(0)
    ema = EMA(model, case.config["decay"], warmup=False)
    for step in steps:
        set_to(step)
        ema.update()
    for name, average in zip(("weight", "bias"), ema.average, strict=True):
        case.check(f"shadow/{name}", average)
    with ema.swapped():
        case.check("applied_weight", model.weight)
    case.check("restored_weight", model.weight)
