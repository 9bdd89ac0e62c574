"""Properties of the multi-view objective that hold whatever the weights."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from mvdiffusion.config import PROFILES, switches
from mvdiffusion.models.layout import DOMAINS
from mvdiffusion.models.objective import (
    MVDraws,
    MVInputs,
    MVLoss,
    ObjectiveSettings,
    draw_shapes,
    drop_masks,
    mv_loss,
    mv_rows,
    pick_domain,
    snr_weights,
)
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel
from mvdiffusion.task import draw

NUM_OBJECTS, NUM_VIEWS, LATENT_SHAPE = 3, 2, (4, 4, 4)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0).float()  # Stable Diffusion 1.x

VARIED = {
    "recommended": {},
    "gnn3d": {**switches("gnn3d", "loss"), "noise_offset": 0.1, "input_perturbation": 0.1},
    "wonder3d": {**switches("wonder3d", "loss"), "snr_gamma": 5.0, "prediction_type": "v_prediction"},
    "object": {"timestep_sharing": "object", "drop_type": "drop_joint", "condition_drop_rate": 0.25},
    "mixed": {"stage": "mixed", "snr_gamma": 5.0, "drop_type": "drop_independent", "condition_drop_rate": 0.25},
    "mixed_rows": {"stage": "mixed", "timestep_sharing": "row", "drop_type": "drop_joint", "noise_offset": 0.1},
}
varied = pytest.mark.parametrize("settings", [ObjectiveSettings(**each) for each in VARIED.values()], ids=VARIED)


def inputs_of(num_objects: int = NUM_OBJECTS) -> MVInputs:
    generator = torch.Generator().manual_seed(0)
    latents, cameras = (num_objects, NUM_VIEWS, *LATENT_SHAPE), (num_objects, NUM_VIEWS, 10)
    shapes = (latents, latents, (num_objects, *LATENT_SHAPE), (num_objects, 8), cameras, cameras)
    return MVInputs(*(torch.randn(shape, generator=generator) for shape in shapes))


def draws_of(settings: ObjectiveSettings, num_objects: int = NUM_OBJECTS) -> MVDraws:
    """What `draw_shapes` asks for, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, rest in draw_shapes(settings, NUM_VIEWS, LATENT_SHAPE).items():
        shape = (num_objects, *rest)
        if name in ("timesteps", "domain"):
            values[name] = torch.randint(1000 if name == "timesteps" else 2, shape, generator=generator)
        else:
            values[name] = (torch.rand if name == "dropout" else torch.randn)(shape, generator=generator)
    return MVDraws(**values)


def of_objects(data: Any, objects: list[int]) -> Any:
    """Some objects of inputs or draws, in that order."""
    return replace(data, **{name: value[objects] for name, value in vars(data).items() if value is not None})


def new_unet(stage: str, **config: Any) -> UNetMV2DConditionModel:
    """A small network; joint attention where there are two domains to join."""
    defaults = dict(
        sample_size=4,
        down_block_types=("CrossAttnDownBlockMV2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlockMV2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        num_views=NUM_VIEWS,
        cd_attention_mid=stage == "joint",
    )
    return UNetMV2DConditionModel(**defaults | config)


@cache
def tiny_unet(stage: str) -> UNetMV2DConditionModel:
    """Random weights everywhere."""
    network, generator = new_unet(stage), torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


@torch.no_grad()
def loss_of(inputs: MVInputs, draws: MVDraws, settings: ObjectiveSettings) -> MVLoss:
    return mv_loss(tiny_unet(settings.stage), inputs, draws, ALPHAS_CUMPROD, settings)


def errors_of(result: MVLoss, settings: ObjectiveSettings) -> torch.Tensor:
    """Weighted errors of halves, objects and views."""
    return (result.row_weights * result.per_row_mse).unflatten(0, (settings.num_domains, -1, NUM_VIEWS))  # (D, B, V)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


# Which objects a loss depends on.


@varied
def test_permuted_objects_have_the_same_errors_and_loss(settings: ObjectiveSettings) -> None:
    inputs, draws, order = inputs_of(), draws_of(settings), [2, 0, 1]
    result = loss_of(inputs, draws, settings)
    permuted = loss_of(of_objects(inputs, order), of_objects(draws, order), settings)
    close(permuted.loss, result.loss)
    close(errors_of(permuted, settings), errors_of(result, settings)[:, order])


@varied
def test_an_objects_errors_do_not_depend_on_its_batch(settings: ObjectiveSettings) -> None:
    inputs, draws = inputs_of(), draws_of(settings)
    errors = errors_of(loss_of(inputs, draws, settings), settings)
    for number in range(NUM_OBJECTS):
        alone = loss_of(of_objects(inputs, [number]), of_objects(draws, [number]), settings)
        close(errors_of(alone, settings), errors[:, [number]])
        close(alone.loss, errors[:, number].mean())


@varied
def test_a_duplicate_counts_twice(settings: ObjectiveSettings) -> None:
    inputs, draws = inputs_of(), draws_of(settings)
    once, thrice = (
        loss_of(of_objects(inputs, objects), of_objects(draws, objects), settings) for objects in ([1], [1, 1, 1])
    )
    close(thrice.loss, once.loss)


@pytest.mark.parametrize("sharing", ["row", "domain_object", "object"])
def test_order_of_the_halves_changes_rows_and_not_the_loss(sharing: Any) -> None:
    settings = ObjectiveSettings(**switches("gnn3d", "loss"), noise_offset=0.1, snr_gamma=5.0)
    settings = replace(settings, timestep_sharing=sharing, condition_drop_rate=0.4)
    inputs, draws = inputs_of(), draws_of(settings)
    image_first = loss_of(inputs, draws, settings)
    normal_first = loss_of(inputs, draws, replace(settings, half_order="normal_first"))
    close(errors_of(image_first, settings).flip(0), errors_of(normal_first, settings))
    close(image_first.loss, normal_first.loss)
    for name in DOMAINS:
        close(image_first.domain_mse[name], normal_first.domain_mse[name])
    half = NUM_OBJECTS * NUM_VIEWS
    assert image_first.rows.domains.tolist() == [1] * half + [0] * half
    assert normal_first.rows.domains.tolist() == [0] * half + [1] * half
    assert torch.equal(image_first.rows.clean[:half], inputs.colour_latents.flatten(0, 1))
    assert torch.equal(normal_first.rows.class_labels[:half], inputs.normal_camera.flatten(0, 1))


# The mixed stage.


def test_mixed_stage_has_the_drawn_domain_in_its_rows() -> None:
    settings = ObjectiveSettings(stage="mixed", condition_drop_rate=0)
    inputs = inputs_of()
    draws = replace(draws_of(settings), domain=torch.tensor([1, 0, 1]))
    result = loss_of(inputs, draws, settings)
    expected = [inputs.colour_latents[0], inputs.normal_latents[1], inputs.colour_latents[2]]
    assert torch.equal(result.rows.clean, torch.cat(expected))
    labels = [inputs.colour_camera[0], inputs.normal_camera[1], inputs.colour_camera[2]]
    assert torch.equal(result.rows.class_labels, torch.cat(labels))
    assert result.rows.domains.tolist() == [1, 1, 0, 0, 1, 1]
    errors = errors_of(result, settings)[0]
    close(result.domain_mse["normal"], errors[1].mean())
    close(result.domain_mse["colour"], errors[[0, 2]].mean())
    colour_alone = loss_of(of_objects(inputs, [0]), of_objects(draws, [0]), settings)
    assert math.isnan(colour_alone.domain_mse["normal"])
    assert math.isfinite(colour_alone.domain_mse["colour"])


def test_mixed_stage_needs_only_the_drawn_domains_latents() -> None:
    settings = ObjectiveSettings(stage="mixed")
    inputs, draws = inputs_of(), draws_of(settings)
    picked = pick_domain(inputs.normal_latents, inputs.colour_latents, draws.domain)
    only_picked = replace(inputs, normal_latents=picked, colour_latents=picked)
    assert torch.equal(loss_of(only_picked, draws, settings).loss, loss_of(inputs, draws, settings).loss)


# Who shares what.


@pytest.mark.parametrize(
    ("sharing", "timesteps", "rows"),
    [
        ("row", [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [1, 2, 5, 6, 3, 4, 7, 8]),
        ("domain_object", [[1, 2], [3, 4]], [1, 1, 3, 3, 2, 2, 4, 4]),
        ("object", [1, 2], [1, 1, 2, 2, 1, 1, 2, 2]),
    ],
)
def test_timesteps_of_the_rows(sharing: Any, timesteps: list[Any], rows: list[int]) -> None:
    settings = ObjectiveSettings(timestep_sharing=sharing)
    draws = replace(draws_of(settings, 2), timesteps=torch.tensor(timesteps))
    assert mv_rows(inputs_of(2), draws, ALPHAS_CUMPROD, settings).timesteps.tolist() == rows


@pytest.mark.parametrize(
    ("drop_type", "uniform", "latent", "embed"),
    [
        ("drop_as_a_whole", [0.05, 0.25], [0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]),
        ("drop_joint", [[0.05, 0.15], [0.25, 0.3]], [0, 1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]),
        (
            "drop_independent",
            [[[0.05, 0.15], [0.25, 0.9]], [[0.9, 0.9], [0.05, 0.05]]],
            [0, 1, 0, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 1, 1],
        ),
        (
            "row_both",
            [[[0.05, 0.15], [0.25, 0.9]], [[0.9, 0.09], [0.05, 0.1]]],
            [1, 0, 0, 1, 0, 0, 1, 0],
            [1, 0, 0, 1, 0, 0, 1, 0],
        ),
    ],
)
def test_dropped_rows(drop_type: Any, uniform: list[Any], latent: list[int], embed: list[int]) -> None:
    settings = ObjectiveSettings(drop_type=drop_type, condition_drop_rate=0.1)
    drop = drop_masks(torch.tensor(uniform), NUM_VIEWS, settings)
    assert drop.latent.int().tolist() == latent
    assert drop.embed.int().tolist() == embed

    inputs = inputs_of(2)
    rows = mv_rows(inputs, replace(draws_of(settings, 2), dropout=torch.tensor(uniform)), ALPHAS_CUMPROD, settings)
    condition = inputs.condition_latents.repeat_interleave(NUM_VIEWS, 0).repeat(2, 1, 1, 1)
    embeds = inputs.image_embeds.repeat_interleave(NUM_VIEWS, 0).repeat(2, 1)
    assert torch.equal(rows.condition, condition * ~drop.latent[:, None, None, None])
    assert torch.equal(rows.image_embeds[:, 0], embeds * ~drop.embed[:, None])
    assert torch.equal(rows.class_labels[:4], inputs.normal_camera.flatten(0, 1))


@pytest.mark.parametrize(
    ("drop_type", "rate", "counts"),
    [
        # latents alone, embedding alone, both, neither
        ("drop_as_a_whole", 0.05, (50, 50, 50, 850)),
        ("drop_as_a_whole", 0.4, (200, 400, 400, 0)),
        ("row_both", 0.1, (0, 0, 100, 900)),
        ("drop_as_a_whole", 0.0, (0, 0, 0, 1000)),
    ],
)
def test_how_often_conditions_are_dropped(drop_type: Any, rate: float, counts: tuple[int, ...]) -> None:
    uniform = (torch.arange(1000) + 0.5) / 1000
    settings = ObjectiveSettings(stage="mixed", drop_type=drop_type, condition_drop_rate=rate)
    shape = (1000, 1, 1) if drop_type == "row_both" else (1000,)
    drop = drop_masks(uniform.reshape(shape), 1, settings)
    ways = (drop.latent & ~drop.embed, ~drop.latent & drop.embed, drop.latent & drop.embed, ~drop.latent & ~drop.embed)
    assert tuple(int(way.sum()) for way in ways) == counts


def test_draws_that_settings_need() -> None:
    encoded = {"noise": (2, 6, 4, 8, 8), "target_eps": (2, 6, 4, 8, 8)}
    assert draw_shapes(ObjectiveSettings(), 6, (4, 8, 8)) == encoded | {"timesteps": (2,), "dropout": ()}
    original = ObjectiveSettings(**switches("gnn3d", "loss"), noise_offset=0.1, input_perturbation=0.1)
    assert draw_shapes(original, 6, (4, 8, 8)) == encoded | {
        "timesteps": (2, 6),
        "dropout": (2, 6),
        "offset_noise": (2, 6, 4, 1, 1),
        "perturb_noise": (2, 6, 4, 8, 8),
        "condition_eps": (4, 8, 8),
    }
    mixed = ObjectiveSettings(stage="mixed", timestep_sharing="object", condition_drop_rate=0)
    one_domain = {"noise": (1, 6, 4, 8, 8), "target_eps": (1, 6, 4, 8, 8)}
    assert draw_shapes(mixed, 6, (4, 8, 8)) == one_domain | {"timesteps": (), "domain": ()}


def test_recommended_profile_is_the_default() -> None:
    assert ObjectiveSettings(**switches("recommended", "loss")) == ObjectiveSettings()
    assert all(ObjectiveSettings(**switches(profile, "loss")) for profile in PROFILES)


# Weights.


@pytest.mark.parametrize(
    ("prediction_type", "mode", "expected"),
    [
        ("epsilon", "canonical", lambda snr, gamma: min(snr, gamma) / snr),
        ("epsilon", "wonder3d", lambda snr, gamma: min(snr, gamma) / snr),
        ("epsilon", "gnn3d", lambda snr, gamma: min(snr, gamma) / snr),
        ("v_prediction", "canonical", lambda snr, gamma: min(snr, gamma) / (snr + 1)),
        ("v_prediction", "wonder3d", lambda snr, gamma: min(snr, gamma) / snr),
        ("v_prediction", "gnn3d", lambda snr, gamma: min(snr + 1, gamma) / (snr + 1)),
    ],
)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_snr_weights(prediction_type: Any, mode: Any, expected: Any, gamma: float) -> None:
    settings = ObjectiveSettings(prediction_type=prediction_type, snr_mode=mode, snr_gamma=gamma)
    timesteps = torch.arange(0, 1000, 37)
    ratios = [alpha / (1 - alpha) for alpha in ALPHAS_CUMPROD[timesteps].double().tolist()]
    plain = torch.tensor([expected(snr, gamma) for snr in ratios])
    torch.testing.assert_close(snr_weights(timesteps, ALPHAS_CUMPROD, settings), plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("mode", "expected"), [("canonical", 0.0), ("wonder3d", 1.0), ("gnn3d", 1.0)])
def test_snr_weights_at_a_timestep_without_signal(mode: Any, expected: float) -> None:
    velocity = ObjectiveSettings(prediction_type="v_prediction", snr_mode=mode, snr_gamma=5.0)
    no_signal = torch.tensor([0]), torch.zeros(1)
    assert snr_weights(*no_signal, velocity).item() == expected
    assert snr_weights(*no_signal, replace(velocity, prediction_type="epsilon")).item() == 1


def test_loss_is_the_mean_of_weighted_row_errors() -> None:
    settings = ObjectiveSettings(snr_gamma=5.0)
    inputs, draws = inputs_of(), draws_of(settings)
    result = loss_of(inputs, draws, settings)
    plain = [
        weight * float((pred - target).square().mean())
        for weight, pred, target in zip(result.row_weights.tolist(), result.pred, result.rows.target, strict=True)
    ]
    assert result.loss.item() == pytest.approx(sum(plain) / len(plain), rel=1e-5)
    unweighted = loss_of(inputs, draws, replace(settings, snr_gamma=None))
    assert unweighted.row_weights.tolist() == [1] * 12
    close(unweighted.loss, (result.pred - result.rows.target).square().mean())
    close(sum(unweighted.domain_mse.values()) / 2, unweighted.loss)


# Precision.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_bf16_unet_gets_bf16_and_the_loss_stays_float32(prediction_type: Any) -> None:
    settings = ObjectiveSettings(prediction_type=prediction_type, snr_gamma=5.0)
    inputs, draws = inputs_of(), draws_of(settings)
    expected = loss_of(inputs, draws, settings)
    seen = []

    class HalfUNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
            seen.extend([sample.dtype, options["encoder_hidden_states"].dtype, options["class_labels"].dtype])
            return (self.scale * expected.pred.bfloat16(),)

    result = mv_loss(HalfUNet(), inputs, draws, ALPHAS_CUMPROD, settings)
    assert seen == [torch.bfloat16] * 3
    assert result.loss.dtype == result.per_row_mse.dtype == result.pred.dtype == torch.float32
    rounded = expected.pred.bfloat16().float()
    close(result.loss, (result.row_weights * (rounded - expected.rows.target).square().mean(dim=(1, 2, 3))).mean())
    result.loss.backward()


def test_rows_and_loss_are_float32_under_autocast_and_for_half_latents() -> None:
    settings = ObjectiveSettings(snr_gamma=5.0, prediction_type="v_prediction")
    inputs, draws = inputs_of(), replace(draws_of(settings), timesteps=torch.zeros(NUM_OBJECTS, 2, dtype=torch.int64))
    half = replace(inputs, **{name: value.bfloat16() for name, value in vars(inputs).items()})
    widened = replace(half, **{name: value.float() for name, value in vars(half).items()})
    expected = mv_rows(widened, draws, ALPHAS_CUMPROD, settings)
    with torch.autocast("cpu", torch.bfloat16):
        result = loss_of(half, draws, settings)
    for name in ("noisy", "target", "condition", "image_embeds", "class_labels"):
        assert torch.equal(getattr(result.rows, name), getattr(expected, name)), name
    assert result.loss.dtype == result.per_row_mse.dtype == result.row_weights.dtype == torch.float32
    close(result.loss, (result.row_weights * (result.pred - expected.target).square().mean(dim=(1, 2, 3))).mean())
    added = result.rows.noisy - result.rows.clean  # would be rounded away in part by half precision
    assert added.std() == pytest.approx(math.sqrt(1 - ALPHAS_CUMPROD[0]), rel=0.2)


@varied
def test_gradient_reaches_the_weights(settings: ObjectiveSettings) -> None:
    unet = tiny_unet(settings.stage)
    mv_loss(unet, inputs_of(), draws_of(settings), ALPHAS_CUMPROD, settings).loss.backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
    unet.zero_grad()


def test_one_object_is_learned_by_heart() -> None:
    settings, inputs = ObjectiveSettings(condition_drop_rate=0), of_objects(inputs_of(1), [0] * 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = new_unet("joint", block_out_channels=(16, 32))
    optimizer, losses = torch.optim.AdamW(unet.parameters(), 1e-2), []
    for step in range(200):
        draws = draw(0, range(4 * step, 4 * step + 4), settings, NUM_VIEWS, LATENT_SHAPE, 1000)
        result = mv_loss(unet, inputs, draws, ALPHAS_CUMPROD, settings)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
    assert losses[0] > 0.9 and sum(losses[-50:]) / 50 < 0.1  # to answer 0 would cost 1


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_order": "rgb_first"}, 'half_order "rgb_first" is unknown: use one of normal_first, image_first'),
        ({"stage": "stage2"}, 'stage "stage2" is unknown: use one of joint, mixed'),
        ({"condition_latents": "mean"}, 'condition_latents "mean" is unknown: use one of mode, sample'),
        ({"timestep_sharing": "view"}, 'timestep_sharing "view" is unknown: use one of row, domain_object, object'),
        (
            {"drop_type": "all"},
            'drop_type "all" is unknown: use one of drop_as_a_whole, drop_independent, drop_joint, row_both',
        ),
        ({"prediction_type": "sample"}, 'prediction_type "sample" is unknown: use one of epsilon, v_prediction'),
        ({"snr_mode": "min"}, 'snr_mode "min" is unknown: use one of canonical, wonder3d, gnn3d'),
        ({"condition_drop_rate": 1.5}, "condition_drop_rate=1.5 is outside [0, 1]"),
        ({"noise_offset": -0.1}, "noise_offset=-0.1 must not be negative; 0 is off"),
        ({"snr_gamma": 0.0}, "snr_gamma=0.0 must be above 0; leave it out to weigh all timesteps alike"),
        (
            {"stage": "a", "input_perturbation": -1.0},
            'stage "a" is unknown: use one of joint, mixed; input_perturbation=-1.0 must not be negative; 0 is off',
        ),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ObjectiveSettings(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (
            {},
            {"noise": torch.zeros(3, 1, 2, 4, 4, 4)},
            "draws.noise is (3, 1, 2, 4, 4, 4), expected (3, 2, 2, 4, 4, 4)",
        ),
        ({}, {"timesteps": torch.zeros(3, dtype=torch.int64)}, "draws.timesteps is (3,), expected (3, 2)"),
        ({}, {"timesteps": torch.zeros(3, 2)}, "draws.timesteps must be integers, got torch.float32"),
        ({}, {"dropout": None}, "draws.dropout is None, expected (3,)"),
        ({"drop_type": "drop_joint"}, {"dropout": torch.zeros(3)}, "draws.dropout is (3,), expected (3, 2)"),
        ({"noise_offset": 0.1}, {"offset_noise": None}, "draws.offset_noise is None, expected (3, 2, 2, 4, 1, 1)"),
        ({"stage": "mixed"}, {"domain": None}, "draws.domain is None, expected (3,)"),
    ],
)
def test_draws_that_do_not_fit(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    settings = ObjectiveSettings(**options)
    draws = replace(draws_of(settings), **changes)
    with pytest.raises(ValueError) as error:
        loss_of(inputs_of(), draws, settings)
    assert str(error.value).startswith("the step's tensors do not fit 3 objects, 2 views and ObjectiveSettings(")
    assert str(error.value).endswith(f": {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"normal_latents": torch.zeros(6, 4, 4, 4)},
            "inputs.normal_latents is (6, 4, 4, 4), expected (B, V, C, h, w)",
        ),
        (
            {"colour_latents": torch.zeros(3, 1, 4, 4, 4)},
            "inputs.colour_latents is (3, 1, 4, 4, 4), expected (3, 2, 4, 4, 4)",
        ),
        (
            {"condition_latents": torch.zeros(6, 4, 4, 4)},
            "inputs.condition_latents is (6, 4, 4, 4), expected (3, 4, 4, 4)",
        ),
        ({"image_embeds": torch.zeros(3, 1, 8)}, "inputs.image_embeds is (3, 1, 8), expected (3, 8)"),
        ({"colour_camera": torch.zeros(3, 2, 5)}, "inputs.colour_camera is (3, 2, 5), expected (3, 2, 10)"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError) as error:
        loss_of(replace(inputs_of(), **changes), draws_of(ObjectiveSettings()), ObjectiveSettings())
    assert str(error.value).endswith(message)


def test_dropout_draws_of_another_precision() -> None:
    with pytest.raises(ValueError, match=r"condition dropout must be float32; got torch\.float64"):
        drop_masks(torch.zeros(3, dtype=torch.float64), NUM_VIEWS, ObjectiveSettings())


def test_answer_of_another_shape() -> None:
    settings = ObjectiveSettings()
    with pytest.raises(ValueError, match=r"the UNet answered \(12, 8, 4, 4\) to a target of \(12, 4, 4, 4\)"):
        mv_loss(lambda sample, *args, **options: (sample,), inputs_of(), draws_of(settings), ALPHAS_CUMPROD, settings)
