"""NOVA's network and objective: names, properties that hold for any weights, errors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffnext.models.embeddings import TextEmbed
from diffnext.models.masking import mask_ratio, split_tokens
from diffnext.models.noise import noise_schedule
from diffnext.models.objective import NovaDraws, nova_inputs, total_loss
from diffnext.models.parameters import frozen_parameters, parameter_groups
from diffnext.models.transformers.transformer_nova import NovaConfig, NOVATransformer3DModel, arch_definition

KEYS_DIR = Path(__file__).resolve().parents[3] / "shared" / "specs" / "keys"
VIT = {"depth": 2, "embed_dim": 32, "num_heads": 1}
# Latents of 8 x 8: 4 x 4 image tokens, 2 x 2 video tokens.
TINY: dict[str, Any] = {
    "image_size": [64, 64],
    "text_token_dim": 10,
    "text_token_len": 4,
    "image_base_size": [4, 4],
    "video_base_size": [4, 2, 2],
    "arch": [VIT, VIT | {"depth": 3}, {"depth": 2, "embed_dim": 24}],
}
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
FLOW_MATCHING = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
REPEAT = 2
VARIANTS = [{}, {"video_mixer_rank": 3}, {"rotary_pos_embed": True}]


def tiny(**changes: Any) -> NOVATransformer3DModel:
    torch.manual_seed(0)
    return NOVATransformer3DModel.from_config({**TINY, **changes})


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_draws(batch: int, num_frames: int, **changes: Any) -> NovaDraws:
    generator = torch.Generator().manual_seed(2)
    rows = batch * num_frames
    draws = NovaDraws(
        posterior_noise=normal(batch, 4, num_frames, 8, 8),
        text_dropout=torch.full((batch,), 0.5),
        token_order=torch.rand(rows, 16, 1, generator=generator),
        mask_ratio=0.75,
        noise=torch.randn(REPEAT * rows, 16, 16, generator=generator),
        timesteps=torch.randint(1000, (REPEAT * rows, 16), generator=generator),
    )
    return dataclasses.replace(draws, **changes)


def some_losses(
    model: NOVATransformer3DModel, batch: int, num_frames: int, draws: NovaDraws | None = None, **options: Any
) -> dict[str, Tensor]:
    inputs = {"text": normal(batch, 4, 10), "flow": torch.arange(1.0, batch + 1), "loss_repeat": REPEAT, **options}
    draws = draws or some_draws(batch, num_frames)
    return model(normal(batch, 4, num_frames, 8, 8), draws, noise_schedule(DDPM), **inputs)


def gradients(model: NOVATransformer3DModel, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters that got one, by name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Names and sizes.


@pytest.mark.parametrize("path", sorted(KEYS_DIR.glob("nova_*.json")) or [None], ids=lambda path: path and path.stem)
def test_released_state_dict(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"no lists of keys in {KEYS_DIR}")
    meta = json.loads((KEYS_DIR / "diffnext_keys_meta.json").read_text())[path.stem]
    with torch.device("meta"):
        model = NOVATransformer3DModel.from_config(meta["config"])
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == json.loads(path.read_text())
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"]
    assert [name for name, _ in model.named_buffers()] == meta["buffers"]


@pytest.mark.parametrize("changes", [*VARIANTS, {"text_token_dim": None}])
def test_saved_and_loaded(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**changes)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    defaults = {"image_dim": 4, "image_stride": 8, "video_mixer_rank": None, "rotary_pos_embed": False}
    assert written == {"_class_name": "NOVATransformer3DModel", **defaults, **TINY, **changes}
    loaded = NOVATransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_mixer_is_not_dropped_in_silence(tmp_path: Path) -> None:
    tiny(video_mixer_rank=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "video_mixer_rank": None}))
    with pytest.raises(ValueError, match=r"3 unexpected: video_encoder\.mixer\.lora\.weight"):
        NOVATransformer3DModel.from_pretrained(tmp_path)


def test_full_rank_mixer() -> None:
    mixer = tiny(video_mixer_rank=-1).video_encoder.mixer
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    assert shapes == {"proj.weight": (64, 32), "proj.bias": (64,)}


def test_null_text_of_a_new_model() -> None:
    weight = TextEmbed(200, 8, 4).weight
    assert weight.shape == (512, 200)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)


# Properties.


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("ratio", [0.7, 0.85, 1.0])
def test_head_on_masked_tokens_equals_head_on_all(num_frames: int, ratio: float) -> None:
    model, draws = tiny(), some_draws(2, num_frames, mask_ratio=ratio)
    masked, full = (some_losses(model, 2, num_frames, draws, masked_only=option) for option in (True, False))
    torch.testing.assert_close(masked, full, rtol=1e-6, atol=0)
    actual, expected = (gradients(model, total_loss(losses)) for losses in (masked, full))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_checkpointing_changes_no_number(num_frames: int) -> None:
    model = tiny(video_mixer_rank=3)
    losses = some_losses(model, 2, num_frames)
    expected = gradients(model, total_loss(losses))
    for level in (1, 2, 3):
        model.enable_gradient_checkpointing(level)
        assert sum(block.recompute_mlp for block in (*model.video_encoder.blocks, *model.image_encoder.blocks)) == (
            2 if level == 1 else 5
        )
        again = some_losses(model, 2, num_frames)
        torch.testing.assert_close(again, losses, rtol=0, atol=0)
        torch.testing.assert_close(gradients(model, total_loss(again)), expected, rtol=0, atol=0)
    assert all(block.recompute for block in model.image_decoder.blocks)


@pytest.mark.parametrize("changes", VARIANTS)
def test_any_number_of_frames_at_any_time(changes: dict[str, Any]) -> None:
    """Nothing is remembered from one batch to the next, and every parameter has a gradient, as DDP demands."""
    model = tiny(**changes)
    names = {name for name, _ in model.named_parameters()}
    first = {num_frames: some_losses(model, 1, num_frames) for num_frames in (1, 3, 2)}
    for num_frames in (3, 1, 2):
        again = some_losses(model, 1, num_frames)
        torch.testing.assert_close(again, first[num_frames], rtol=0, atol=0)
        assert set(again) == ({"loss"} if num_frames == 1 else {"loss_t2i", "loss_i2i"})
        assert set(gradients(model, total_loss(again))) == names
    without_motion = some_losses(model, 1, 2, flow=None)
    assert not torch.equal(without_motion["loss_t2i"], first[2]["loss_t2i"])


@pytest.mark.parametrize("num_frames", [1, 3])
def test_loss_of_a_batch_is_the_mean_over_its_samples(num_frames: int) -> None:
    model, latents, draws = tiny(video_mixer_rank=3), normal(3, 4, num_frames, 8, 8), some_draws(3, num_frames)
    text, flow, schedule = normal(3, 4, 10), torch.tensor([1.0, 5.0, 9.0]), noise_schedule(DDPM)
    whole = model(latents, draws, schedule, text, flow=flow, loss_repeat=REPEAT)
    singles = []
    for i in range(3):
        rows = (REPEAT, 3, num_frames)
        own = NovaDraws(
            posterior_noise=draws.posterior_noise[i : i + 1],
            text_dropout=draws.text_dropout[i : i + 1],
            token_order=draws.token_order.unflatten(0, rows[1:])[i],
            mask_ratio=draws.mask_ratio,
            noise=draws.noise.unflatten(0, rows)[:, i].flatten(0, 1),
            timesteps=draws.timesteps.unflatten(0, rows)[:, i].flatten(0, 1),
        )
        at = slice(i, i + 1)
        singles.append(model(latents[at], own, schedule, text[at], flow=flow[at], loss_repeat=REPEAT))
    for name, value in whole.items():
        mean = torch.stack([single[name] for single in singles]).mean()
        torch.testing.assert_close(value, mean, rtol=2e-6, atol=0)


def test_image_to_video_only_drops_the_loss_of_first_frames() -> None:
    losses = {"loss_t2i": torch.tensor(2.0), "loss_i2i": torch.tensor(3.0)}
    assert total_loss(losses).item() == 5
    assert total_loss(losses, t2i_weight=0.0).item() == 3
    assert total_loss({"loss": torch.tensor(4.0)}, t2i_weight=0.0).item() == 4


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_frames_one_by_one_equal_all_at_once(changes: dict[str, Any]) -> None:
    model, latents = tiny(**changes), normal(2, 4, 4, 8, 8)
    prefix = model.prefix(normal(2, 4, 10), flow=torch.tensor([2.0, 6.0]))
    expected = model.conditions(latents, prefix).unflatten(0, (2, 4))  # (B, T, Nv, D)
    size, caches, first = model.frame_size(8, 8), model.new_caches(), None
    for t in range(4):
        tokens = model.embed_frames(latents[:, :, t - 1 : t].transpose(1, 2)) if t else model.bos_frames(2, 4)
        features = model.encode_frames(tokens, None if t else prefix, size, num_frames=4, first_frame=t, caches=caches)
        first = features if first is None else first
        mixed = model.mix(first, features) if t else features
        torch.testing.assert_close(mixed[:, 0], expected[:, t], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_frame_sees_no_later_one() -> None:
    model, latents = tiny(), normal(1, 4, 4, 8, 8)
    prefix = model.prefix(normal(1, 4, 10), flow=torch.tensor([2.0]))
    before = model.conditions(latents, prefix)
    latents[:, :, 1] += 1
    after = model.conditions(latents, prefix)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
    latents[:, :, 3] += 1  # the last frame conditions nothing
    assert torch.equal(model.conditions(latents, prefix), after)


@torch.no_grad()
def test_rotary_positions_take_other_sizes() -> None:
    model = tiny(rotary_pos_embed=True)
    prefix = model.prefix(normal(1, 4, 10))
    assert model.conditions(normal(1, 4, 2, 12, 8), prefix).shape == (2, 6, 32)
    assert model.image_features(normal(2, 4, 12, 8), normal(2, 6, 32), torch.zeros(2, 1).long()).shape == (2, 24, 32)


def test_dropped_text_has_no_effect() -> None:
    model, draws = tiny(), some_draws(2, 1, text_dropout=torch.tensor([0.05, 0.5]))
    text = normal(2, 4, 10)
    base = some_losses(model, 2, 1, draws, text=text)["loss"]
    text[0] += 1
    assert torch.equal(some_losses(model, 2, 1, draws, text=text)["loss"], base)
    assert not torch.equal(some_losses(model, 2, 1, draws, text=text, text_dropout=0.0)["loss"], base)
    text[1] += 1
    assert not torch.equal(some_losses(model, 2, 1, draws, text=text)["loss"], base)


def test_labels_instead_of_text() -> None:
    model = tiny(text_token_dim=None, video_base_size=[1, 2, 2])
    losses = some_losses(model, 2, 1, text=None, labels=torch.tensor([3, 999]), flow=None)
    assert set(gradients(model, total_loss(losses))) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("scheduler", [DDPM, FLOW_MATCHING], ids=lambda each: each["_class_name"])
def test_half_precision_keeps_noise_and_time_exact(scheduler: dict[str, Any]) -> None:
    """Also with half-precision weights the head gets float32 timesteps, and noise that no rounding removed."""
    model, seen = tiny().bfloat16(), {}
    model.image_decoder.register_forward_pre_hook(lambda module, args: seen.update(noisy=args[0], timestep=args[1]))
    draws = some_draws(2, 1, timesteps=some_draws(2, 1).timesteps // 50)  # also a normal number for flow matching
    loss = model(normal(2, 4, 8, 8), draws, noise_schedule(scheduler), normal(2, 4, 10), loss_repeat=REPEAT)["loss"]
    exact = tiny()(normal(2, 4, 8, 8), draws, noise_schedule(scheduler), normal(2, 4, 10), loss_repeat=REPEAT)["loss"]
    assert (seen["noisy"].dtype, seen["timestep"].dtype, loss.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny()(normal(2, 4, 8, 8), draws, noise_schedule(scheduler), normal(2, 4, 10), loss_repeat=REPEAT)
    torch.testing.assert_close(mixed["loss"], exact, rtol=2e-2, atol=0)


def test_every_timestep_has_its_own_noise() -> None:
    alphas = noise_schedule(DDPM).alphas_cumprod
    assert alphas.dtype == torch.float32
    assert len(alphas.unique()) == 1000 and alphas.max() < 1
    assert len(noise_schedule(FLOW_MATCHING).sigmas.unique()) == 1000


def test_latents_are_scaled_in_float32() -> None:
    moments = torch.cat([torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 2.0).log() * 2], dim=1).half()
    latents = nova_inputs(moments, torch.full((1, 1, 1, 1), 0.5), scaling_factor=0.13025, shift_factor=0.1)
    assert latents.dtype == torch.float32
    assert latents.item() == pytest.approx((2 + 2 * 0.5 - 0.1) * 0.13025, rel=1e-3)


def test_mask_ratio_is_a_truncated_normal() -> None:
    assert mask_ratio(0.0) == pytest.approx(0.7, abs=1e-12)
    assert mask_ratio(1.0) == pytest.approx(1.0, abs=1e-12)
    mean = sum(mask_ratio((i + 0.5) / 1000) for i in range(1000)) / 1000
    assert mean == pytest.approx(0.867, abs=5e-4)


@pytest.mark.parametrize(("ratio", "num_visible"), [(0.75, 4), (1.0, 0), (0.84375, 2), (0.90625, 2)])
def test_ties_of_the_visible_count_go_to_even(ratio: float, num_visible: int) -> None:
    visible, masked = split_tokens(torch.rand(3, 16, 1), ratio)
    assert visible.shape == (3, num_visible)
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1)[0], torch.arange(16).expand(3, -1))


# What is trained.


@pytest.mark.parametrize("pipeline", ["t2i", "t2v"])
def test_frozen_parameters(pipeline: Any) -> None:
    frozen = frozen_parameters(tiny(), pipeline)
    modules = {name.rsplit(".", 1)[0].removesuffix(".proj") for name in frozen}
    motion = {f"motion_embed.{kind}_proj.{i}" for kind in ("flow", "fps") for i in (0, 2)}
    image_only = {"video_pos_embed.norm", "video_pos_embed.time_proj.0", "video_pos_embed.time_proj.2"}
    image_only |= {"video_encoder.patch_embed"}
    assert modules == {"text_embed.norm"} | motion | (image_only if pipeline == "t2i" else set())


def test_parameter_groups_by_decay_and_scale() -> None:
    model = tiny()
    model.mask_embed.bos_token.no_weight_decay = True
    model.image_decoder.head.bias.lr_scale = 0.5
    groups = parameter_groups(model)
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {},
        {"weight_decay": 0.0},
        {"lr_scale": 0.5},
    ]
    assert groups[2]["params"] == [model.image_decoder.head.bias]
    assert any(p is model.mask_embed.bos_token for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [64, 60]}, r"image_size \(64, 60\) must be two multiples of 32 px"),
        ({"arch": [VIT]}, "arch has 1 entries, but must have 3: video encoder, image encoder, decoder"),
        ({"image_base_size": [8, 8]}, r"image_base_size has \(8, 8\) tokens per frame, but images of"),
        ({"video_base_size": [4, 4, 4]}, r"video_base_size has \(4, 4\) tokens .* have \(2, 2\): absolute positions"),
        ({"arch": [VIT, VIT | {"embed_dim": 64}, "mlp_d1w24"]}, "video encoder is 32 wide, but the image encoder 64"),
        ({"text_token_len": 600}, "text_token_len=600 is above 512"),
        ({"rotary_pos_embed": True, "arch": [VIT | {"num_heads": 2}, VIT, "mlp_d1w24"]}, "1/8 and 7/16 are even, got"),
        ({"video_mixer_rank": "24"}, "video_mixer_rank is '24', but must be a whole number or None"),
        ({"video_mixer": 3}, "unknown key 'video_mixer', did you mean 'video_mixer_rank'?"),
    ],
)
def test_configurations_that_make_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_arch_names() -> None:
    assert arch_definition("vit_d32w1536", "image encoder") == {"depth": 32, "embed_dim": 1536, "num_heads": 16}
    assert arch_definition("mlp_d3w1280", "decoder") == {"depth": 3, "embed_dim": 1280}
    with pytest.raises(ValueError, match="arch 'vit_d2w64' of the video encoder is unknown: .* of width 768, 1024, 15"):
        arch_definition("vit_d2w64", "video encoder")
    with pytest.raises(ValueError, match=r"'vit_d3w1024' of the decoder is unknown: use mlp_d<depth>w<width>, or a"):
        arch_definition("vit_d3w1024", "decoder")
    with pytest.raises(ValueError, match=r"arch of the decoder has keys \['dim'\], but must have \['depth', 'embed_"):
        arch_definition({"dim": 3}, "decoder")


def test_image_size_as_one_number() -> None:
    assert tiny(image_size=64).config == tiny().config
    assert NovaConfig().image_size == (1024, 1024)


def test_inputs_that_do_not_fit() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="latents of 12 x 8 do not fit this model's 8 x 8"):
        model.conditions(normal(1, 4, 2, 12, 8), model.prefix(normal(1, 4, 10)))
    with pytest.raises(ValueError, match="latents of 8 x 6 are not whole patches of 4 x 4"):
        tiny(rotary_pos_embed=True).frame_size(8, 6)
    with pytest.raises(ValueError, match="this model needs text, which is None"):
        model.prefix(labels=torch.tensor([1]))
    with pytest.raises(
        ValueError, match=r"text is \(1, 3, 10\), expected \(B, 4, 10\), as `text_embed\.pad` makes them"
    ):
        model.prefix(normal(1, 3, 10))
    with pytest.raises(ValueError, match=r"posterior_noise is \(1, 2, 8, 8\), expected \(1, 4, 8, 8\) for moments"):
        nova_inputs(normal(1, 8, 8, 8), normal(1, 2, 8, 8), 1.0)
    with pytest.raises(ValueError, match=r"draws\.noise is \(4, 16, 16\), expected \(6, 16, 16\)"):
        some_losses(model, 1, 2, loss_repeat=3)
    with pytest.raises(ValueError, match=r"prompt 1 .* \(5, 10\); this model takes at most \(4, 10\)"):
        model.text_embed.pad([torch.zeros(4, 10), torch.zeros(5, 10)])
    with pytest.raises(ValueError, match="gradient_checkpointing=4 must be 0, 1, 2 or 3"):
        model.enable_gradient_checkpointing(4)


def test_schedulers_that_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="has _class_name 'DDIMScheduler'; training takes FlowMatchEuler"):
        noise_schedule({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match='prediction_type "score" is unknown: use epsilon, v_prediction or sample'):
        noise_schedule({**DDPM, "prediction_type": "score"})
