"""Properties of the refiner's networks, objective and sampler that need no recorded vectors."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file

from gaussian_refiner.config import RefinerLoss
from gaussian_refiner.models.components import load_components
from gaussian_refiner.models.denoise import decode, denoise, encode, window_offsets
from gaussian_refiner.models.objective import (
    ObjectiveSettings,
    RefinerConstants,
    RefinerDraws,
    RefinerInputs,
    condition_keep_masks,
    interleave,
    mean_over_rows,
    refiner_rows,
    repair_loss,
    snr_weights,
)
from gaussian_refiner.models.self_mutual_attention import (
    CondCache,
    SelfMutualAttnProcessor,
    install_self_mutual_attention,
)
from gaussian_refiner.models.unet import load_unet, widen_conv_in
from gaussian_refiner.task import draw, objective_settings

KEYS_DIR = Path(__file__).resolve().parents[3] / "shared" / "specs" / "keys"
EMBED = 12  # width of the tiny image embedding
TEXT = 16  # width of the tiny text embedding
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PNDM = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, prediction_type="v_prediction")


def tiny_unet(seed: int = 0, in_channels: int = 4) -> UNet2DConditionModel:
    """The full UNet's structure with few channels."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 12, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        attention_head_dim=(1, 2, 2, 2),
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * EMBED,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8, 12, 12),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


@pytest.fixture
def refiner() -> tuple[UNet2DConditionModel, CondCache]:
    unet = tiny_unet(in_channels=8)
    return unet, install_self_mutual_attention(unet)


def call(unet: Callable[..., Any], sample: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """One call with conditions that are shared by both rows of a pair."""
    generator = torch.Generator().manual_seed(seed)
    rows = sample.shape[0]
    text = torch.randn(1, 5, TEXT, generator=generator).expand(rows, -1, -1)
    labels = torch.randn(1, 2 * EMBED, generator=generator).expand(rows, -1)
    timesteps = torch.zeros(rows, dtype=torch.long)
    return unet(sample, timesteps, encoder_hidden_states=text, class_labels=labels, return_dict=False)[0]


def sampling_inputs(images: int = 1, height: int = 8, width: int = 8, seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "cond_latents": normal(images, 4, height, width),
        "render_latents": normal(images, 4, height, width),
        "text": (normal(1, 5, TEXT), normal(1, 5, TEXT)),
        "class_labels": normal(images, 2 * EMBED),
        "init_noise": normal(images, 4, height, width),
    }


def training_batch(batch: int = 3, size: int = 8) -> tuple[RefinerInputs, RefinerDraws]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    latents = (batch, 4, size, size)
    inputs = RefinerInputs(
        normal(*latents), normal(*latents), normal(*latents), normal(batch, EMBED), normal(1, 5, TEXT)
    )
    draws = RefinerDraws(
        image_embed_noise=normal(batch, EMBED),
        noise=normal(2 * batch, *latents[1:]),
        timesteps=torch.randint(0, 1000, (batch,), generator=generator),
        random_p=torch.rand(batch, generator=generator),
        offset_noise=normal(2 * batch, 4, 1, 1),
        perturb_noise=normal(2 * batch, *latents[1:]),
    )
    return inputs, draws


CONSTANTS = RefinerConstants(PNDM.alphas_cumprod, PNDM.alphas_cumprod, torch.zeros(1, EMBED), torch.ones(1, EMBED))


# Self-mutual attention.


def test_processors_are_installed_on_every_layer(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    processors = unet.attn_processors
    own = [name for name, processor in processors.items() if isinstance(processor, SelfMutualAttnProcessor)]
    assert len(own) == 16 and all(name.endswith("attn1.processor") for name in own)
    assert sum(isinstance(processor, AttnProcessor2_0) for processor in processors.values()) == 16
    assert all(processors[name].cache is cache for name in own)
    assert "forward" not in vars(unet)


def test_install_refuses_a_unet_without_self_attention() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=1,
    )
    with pytest.raises(ValueError, match=r"UNet2DConditionModel has no self-attention \(attn1\) layer"):
        install_self_mutual_attention(unet)


@torch.no_grad()
def test_information_flows_from_cond_to_target_only(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, _ = refiner
    sample = torch.randn(4, 8, 8, 8)
    before = call(unet, sample)
    other_target, other_cond = sample.clone(), sample.clone()
    other_target[1::2] += 1
    other_cond[::2] += 1
    assert torch.equal(call(unet, other_target)[::2], before[::2])
    assert not torch.allclose(call(unet, other_target)[1::2], before[1::2])
    assert not torch.allclose(call(unet, other_cond)[1::2], before[1::2])


@torch.no_grad()
def test_recorded_cond_rows_give_the_pair_run(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    sample = torch.randn(6, 8, 8, 8)
    pairs = call(unet, sample)
    with cache.record():
        cond = call(unet, sample[::2])
    with cache.cached():
        target = call(unet, sample[1::2])
    assert cache.mode == "pair"
    torch.testing.assert_close(cond, pairs[::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target, pairs[1::2], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_keeps_the_gradients(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, _ = refiner
    unet.train()
    inputs, draws = training_batch()
    gradients = []
    for enable in (False, True):
        if enable:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        repair_loss(unet, inputs, draws, CONSTANTS, ObjectiveSettings()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    assert unet.is_gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)


def test_a_copied_unet_has_its_own_cache(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    twin = copy.deepcopy(unet)
    caches = {id(p.cache) for p in twin.attn_processors.values() if isinstance(p, SelfMutualAttnProcessor)}
    assert len(caches) == 1 and id(cache) not in caches


@torch.no_grad()
def test_attention_errors_say_what_to_change(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    with pytest.raises(ValueError, match="got a batch of 3 rows: it needs an even number"):
        call(unet, torch.randn(3, 8, 8, 8))
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with pytest.raises(ValueError, match=r"takes no attention_mask \(got one of shape \(2, 4\)\)"):
        layer(torch.randn(2, 4, 16), attention_mask=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="the conditioning cache is empty"), cache.cached():
        pass
    with cache.record():
        call(unet, torch.randn(2, 8, 8, 8))
        with pytest.raises(ValueError, match='already in mode "record"'), cache.cached():
            pass
    with pytest.raises(ValueError, match="3 target rows against 2 stored conditioning rows"), cache.cached():
        call(unet, torch.randn(3, 8, 8, 8))
    assert cache.mode == "pair"
    with torch.enable_grad(), pytest.raises(ValueError, match="is for inference"), cache.record():
        pass
    cache.clear()
    with pytest.raises(ValueError, match="layer mid stored no conditioning tokens"):
        cache.tokens("mid", rows=1)


# The UNet's first convolution and its files.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widened_unet_starts_as_the_stock_one(dtype: torch.dtype) -> None:
    unet = tiny_unet().to(dtype)
    weight, bias = unet.conv_in.weight.clone(), unet.conv_in.bias.clone()
    sample, render = torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 4, 8, 8, dtype=dtype)
    before = unet.conv_in(sample)
    random_state = torch.get_rng_state()
    assert widen_conv_in(unet) is unet
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(unet.conv_in.weight[:, :4], weight) and not unet.conv_in.weight[:, 4:].any()
    assert torch.equal(unet.conv_in.bias, bias) and unet.conv_in.weight.dtype == dtype
    assert unet.config.in_channels == 8 and unet.conv_in.weight.requires_grad
    torch.testing.assert_close(unet.conv_in(torch.cat([sample, render], dim=1)), before)

    unet.conv_in.weight.data.normal_()
    trained = unet.conv_in.weight.clone()
    assert torch.equal(widen_conv_in(unet).conv_in.weight, trained)


def test_widening_refuses_other_channel_counts() -> None:
    with pytest.raises(ValueError, match=r"conv_in takes 9 channels: expected 4 .* or 8"):
        widen_conv_in(tiny_unet(in_channels=9))


def trained_unet() -> UNet2DConditionModel:
    unet = widen_conv_in(tiny_unet())
    torch.nn.init.normal_(unet.conv_in.weight)
    return unet


def assert_same_weights(unet: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    assert unet.state_dict().keys() == expected.keys()
    for name, value in unet.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_saved_unet_reloads_in_stock_diffusers(tmp_path: Path) -> None:
    unet = trained_unet()
    install_self_mutual_attention(unet)
    unet.save_pretrained(tmp_path / "unet")
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert stock.config.in_channels == 8
    assert_same_weights(stock, unet)
    for folder in (tmp_path, tmp_path / "unet"):
        ours = load_unet(folder)
        assert_same_weights(ours, unet)
        assert not ours.training and all(p.requires_grad and not p.is_meta for p in ours.parameters())
        assert ours.config.in_channels == 8
    # A loaded UNet can be saved again: its weights are no aliases of the file.
    load_unet(tmp_path).save_pretrained(tmp_path / "again")
    assert_same_weights(load_unet(tmp_path / "again", subfolder=None), unet)
    assert load_unet(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_stock_folder_is_widened(tmp_path: Path) -> None:
    stock = tiny_unet()
    stock.save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = load_unet(tmp_path, variant="fp16")
    assert_same_weights(loaded, widen_conv_in(stock))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_folder_whose_config_says_4_but_weights_have_8(tmp_path: Path, suffix: str) -> None:
    unet = trained_unet()
    unet.register_to_config(in_channels=4)
    unet.save_pretrained(tmp_path / "unet", safe_serialization=suffix == "safetensors")
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["in_channels"] == 4
    loaded = load_unet(tmp_path)
    assert loaded.config.in_channels == 8
    assert_same_weights(loaded, unet)


def test_sharded_folder_and_lone_file(tmp_path: Path) -> None:
    unet = trained_unet()
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    shards = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert_same_weights(load_unet(tmp_path), unet)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=rf"unet lacks {shards[0].name}, which .*index.json names"):
        load_unet(tmp_path)

    file = tmp_path / "weights.bin"
    torch.save(unet.state_dict(), file)
    assert_same_weights(load_unet(file, base_config=tiny_unet().config), unet)
    with pytest.raises(FileNotFoundError, match="no config at .*config.json: .* or pass base_config"):
        load_unet(file)


def test_loading_errors_name_keys_shapes_and_places(tmp_path: Path) -> None:
    config, state = tiny_unet().config, tiny_unet().state_dict()
    file = tmp_path / "weights.safetensors"

    def load_with(**changes: torch.Tensor | None) -> None:
        changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
        save_file({name: value.contiguous() for name, value in changed.items()}, file)
        load_unet(file, base_config=config)

    with pytest.raises(ValueError, match="1 missing: conv_out.bias; 1 unexpected: extra"):
        load_with(**{"conv_out.bias": None, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 of another shape: conv_out.bias \(5,\) instead of \(4,\)"):
        load_with(**{"conv_out.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="holds no UNet: it has no conv_in.weight"):
        load_with(**{"conv_in.weight": None})
    with pytest.raises(ValueError, match="conv_in takes 9 channels"):
        load_with(**{"conv_in.weight": torch.zeros(8, 9, 3, 3)})
    with pytest.raises(FileNotFoundError, match="no weights in .*unet or .*; tried: .*diffusion_pytorch_model.bin"):
        load_unet(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder: /no/such/place"):
        load_unet("/no/such/place")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="describes a AutoencoderKL; expected a UNet2DConditionModel"):
        load_unet(file)


def test_unknown_model_id_names_the_withdrawn_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", offline)
    with pytest.raises(
        FileNotFoundError, match=r"neither a local folder nor a model id .*\(offline\).* id of a mirror"
    ):
        load_unet("stabilityai/stable-diffusion-2-1-unclip")


@pytest.mark.skipif(not KEYS_DIR.is_dir(), reason=f"no lists of released keys at {KEYS_DIR}")
def test_full_size_unet_has_the_released_keys() -> None:
    config = json.loads((KEYS_DIR / "sd21_unclip_configs.json").read_text())["full"]["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    expected = json.loads((KEYS_DIR / "sd21_unclip_unet8.json").read_text())
    actual = {name: list(value.shape) for name, value in widen_conv_in(unet).state_dict().items()}
    assert actual == expected
    assert unet.conv_in.weight.is_meta
    install_self_mutual_attention(unet)
    assert {name: list(value.shape) for name, value in unet.state_dict().items()} == expected


# The objective.


def test_dropout_probabilities() -> None:
    p = 0.05
    masks = condition_keep_masks((torch.arange(10_000) + 0.5) / 10_000, p)
    kept = torch.stack([masks.render, masks.clip, masks.cond])
    assert (kept == 0).float().mean(dim=1).tolist() == pytest.approx([4 * p] * 3, abs=1e-6)
    assert kept.all(dim=0).float().mean().item() == pytest.approx(1 - 7 * p, abs=1e-6)
    with pytest.raises(ValueError, match=r"condition_dropout_prob=1.5 is outside \[0, 1\]"):
        condition_keep_masks(torch.rand(2), 1.5)
    with pytest.raises(ValueError, match=r"random_p must be a float32 vector \(B,\); got torch.float64 \(2,\)"):
        condition_keep_masks(torch.rand(2, dtype=torch.float64), 0.1)


def test_cond_loss_weight_averages_rows() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert mean_over_rows(losses).item() == 3.0
    assert mean_over_rows(losses, 0.0).item() == 4.0
    assert mean_over_rows(losses, 0.5).item() == pytest.approx((0.5 * 1 + 2 + 0.5 * 3 + 6) / 3)


def test_snr_weights_refuse_unknown_settings() -> None:
    timesteps = torch.tensor([3])
    with pytest.raises(ValueError, match="snr_gamma=0 must be above 0"):
        snr_weights(timesteps, PNDM.alphas_cumprod, 0, "epsilon")
    with pytest.raises(ValueError, match='snr_mode "paired" is unknown: use fixed, pairwise or upstream'):
        snr_weights(timesteps, PNDM.alphas_cumprod, 5, "epsilon", "paired")
    with pytest.raises(ValueError, match='prediction_type "sample" is unknown'):
        snr_weights(timesteps, PNDM.alphas_cumprod, 5, "sample")


def test_repair_loss_parts_add_up(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, _ = refiner
    inputs, draws = training_batch()
    settings = ObjectiveSettings(snr_gamma=5.0, cond_loss_weight=0.25)
    result = repair_loss(unet, inputs, draws, CONSTANTS, settings)
    mse = (result.pred - result.target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.per_row_mse, mse)
    shares = torch.tensor([0.25, 1.0]).repeat(3)
    torch.testing.assert_close(result.loss, (shares * result.row_weights * mse).sum() / shares.sum())
    assert result.loss.requires_grad and result.loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_get_a_full_precision_schedule(dtype: torch.dtype) -> None:
    inputs, draws = training_batch()
    tensors = {name: tensor for name, tensor in vars(inputs).items() if tensor is not None}
    half = RefinerInputs(**{name: tensor.to(dtype) for name, tensor in tensors.items()})
    rounded = RefinerInputs(**{name: tensor.to(dtype).float() for name, tensor in tensors.items()})
    off = ObjectiveSettings(condition_dropout_prob=None)
    rows, expected = (refiner_rows(x, draws, CONSTANTS, off) for x in (half, rounded))
    assert torch.equal(rows.noisy, expected.noisy) and torch.equal(rows.target, expected.target)
    assert rows.noisy.dtype == rows.target.dtype == torch.float32

    unet = tiny_unet(in_channels=8).to(torch.bfloat16)
    install_self_mutual_attention(unet)
    result = repair_loss(unet, half, draws, CONSTANTS, off)
    result.loss.backward()
    assert result.loss.dtype == torch.float32 and unet.conv_in.weight.grad.isfinite().all()


def test_a_sample_without_conditioning_image_equals_a_dropped_one() -> None:
    inputs, draws = training_batch()
    absent = replace(inputs, has_cond=torch.tensor([True, False, True]))
    p = 0.1
    settings = ObjectiveSettings(condition_dropout_prob=p)
    # The numbers drop nothing, clip and conditioning latents (the interval from 5 p), and nothing.
    dropped = refiner_rows(inputs, replace(draws, random_p=torch.tensor([0.9, 5.5 * p, 0.9])), CONSTANTS, settings)
    rows = refiner_rows(absent, replace(draws, random_p=torch.full((3,), 0.9)), CONSTANTS, settings)
    for name in ("noisy", "render", "class_labels", "target"):
        assert torch.equal(getattr(rows, name), getattr(dropped, name)), name
    assert not rows.class_labels[2:4].any() and not rows.clean[2].any()
    with pytest.raises(ValueError, match=r"inputs.has_cond is \(2,\), expected \(3,\)"):
        refiner_rows(replace(inputs, has_cond=torch.ones(2, dtype=torch.bool)), draws, CONSTANTS, settings)


def test_any_callable_with_the_unets_signature_is_trained() -> None:
    inputs, draws = training_batch()
    settings = ObjectiveSettings(condition_dropout_prob=0)
    draws = replace(draws, random_p=None, offset_noise=None, perturb_noise=None)
    target = refiner_rows(inputs, draws, CONSTANTS, settings).target

    def oracle(sample: torch.Tensor, timesteps: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        assert sample.shape[1] == 8 and timesteps[::2].eq(0).all() and conditions["return_dict"] is False
        return (target,)

    assert repair_loss(oracle, inputs, draws, CONSTANTS, settings).loss.item() == 0
    with pytest.raises(ValueError, match=r"the UNet answered \(6, 8, 8, 8\) to a target of \(6, 4, 8, 8\)"):
        repair_loss(lambda sample, *args, **kwargs: (sample,), inputs, draws, CONSTANTS, settings)


@pytest.mark.parametrize(
    ("draw_changes", "settings", "message"),
    [
        ({"noise": torch.zeros(3, 4, 8, 8)}, {}, r"draws.noise is \(3, 4, 8, 8\), expected \(6, 4, 8, 8\)"),
        ({"random_p": None}, {}, "condition_dropout_prob=0.05 needs draws.random_p, which is None"),
        ({"offset_noise": None}, {"noise_offset": 0.1}, "noise_offset=0.1 needs draws.offset_noise"),
        ({"perturb_noise": None}, {"input_perturbation": 0.1}, "input_perturbation=0.1 needs draws.perturb_noise"),
        ({"timesteps": torch.zeros(3)}, {}, "draws.timesteps must be integers, got torch.float32"),
        ({}, {"prediction_type": "sample"}, 'prediction_type "sample" is unknown: use v_prediction or epsilon'),
        ({}, {"cond_loss_weight": -1.0}, "cond_loss_weight=-1.0 must not be negative"),
    ],
)
def test_draws_are_checked(draw_changes: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    inputs, draws = training_batch()
    with pytest.raises(ValueError, match=message):
        refiner_rows(inputs, replace(draws, **draw_changes), CONSTANTS, ObjectiveSettings(**settings))


def test_inputs_are_checked() -> None:
    inputs, draws = training_batch()
    broken = replace(inputs, cond_latents=inputs.cond_latents[:2], text_embeds=inputs.text_embeds.expand(2, -1, -1))
    expected = r"inputs.cond_latents is \(2, 4, 8, 8\), expected \(3, 4, 8, 8\); inputs.text_embeds is \(2, 5, 16\)"
    with pytest.raises(ValueError, match=f"do not fit a batch of 3: {expected}"):
        refiner_rows(broken, draws, CONSTANTS, ObjectiveSettings())
    with pytest.raises(ValueError, match=r"cannot interleave rows of shape \(1,\) with \(2,\)"):
        interleave(torch.zeros(1), torch.zeros(2))


# Sampling.


def count_rows(unet: UNet2DConditionModel) -> list[int]:
    rows: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


@pytest.mark.parametrize(("scale", "pair_rows", "cached_rows"), [(3.0, 84, 44), (1.0, 42, 22)])
def test_cache_halves_the_rows_and_keeps_the_result(
    refiner: tuple[UNet2DConditionModel, CondCache], scale: float, pair_rows: int, cached_rows: int
) -> None:
    unet, cache = refiner
    rows = count_rows(unet)
    options = {**sampling_inputs(), "num_inference_steps": 20, "guidance_scale": scale}
    pairs = denoise(unet, None, PNDM, **options, use_cond_cache=False)
    assert sum(rows) == pair_rows
    rows.clear()
    cached = denoise(unet, cache, PNDM, **options)
    assert sum(rows) == cached_rows
    torch.testing.assert_close(cached, pairs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kinds", [("text", "clip"), ("render",), ("cond",), ("text", "clip", "render", "cond")])
def test_cache_agrees_for_every_kind_of_null(
    refiner: tuple[UNet2DConditionModel, CondCache], kinds: tuple[str, ...]
) -> None:
    unet, cache = refiner
    options = {**sampling_inputs(images=2), "num_inference_steps": 3, "guidance_scale": 2.5, "null_kinds": kinds}
    options["class_labels"] = torch.randn(4, 2 * EMBED, generator=torch.Generator().manual_seed(0))
    pairs = denoise(unet, None, PNDM, **options, use_cond_cache=False)
    cached = denoise(unet, cache, PNDM, **options)
    torch.testing.assert_close(cached, pairs, atol=1e-4, rtol=1e-4)
    one = {name: value[1:] for name, value in options.items() if name.endswith("latents") or name == "init_noise"}
    alone = denoise(unet, cache, PNDM, **{**options, **one, "class_labels": options["class_labels"][2:]})
    torch.testing.assert_close(alone, cached[1:], atol=1e-4, rtol=1e-4)


class Spy:
    """A UNet that notes what it is called with and answers zero."""

    def __init__(self) -> None:
        self.calls: list[dict[str, torch.Tensor]] = []

    def __call__(self, sample: torch.Tensor, timesteps: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        self.calls.append({"sample": sample, "timesteps": timesteps, **conditions})
        return (torch.zeros_like(sample[:, :4]),)


@pytest.mark.parametrize("nulls", [("text",), ("clip",), ("render",), ("cond",), ("clip", "cond")])
def test_nulls_empty_the_unconditional_half_only(nulls: tuple[str, ...]) -> None:
    spy, inputs = Spy(), sampling_inputs()
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "null_kinds": nulls, "use_cond_cache": False}
    denoise(spy, None, PNDM, **inputs, **options)
    first = spy.calls[0]
    null, kept = (
        {name: value[rows] for name, value in first.items() if name != "return_dict"}
        for rows in (slice(2), slice(2, 4))
    )
    cond, render = inputs["cond_latents"][0], inputs["render_latents"][0]
    assert first["timesteps"].tolist() == [0, 501, 0, 501]
    assert torch.equal(kept["sample"][0, :4], cond) and torch.equal(kept["sample"][1, :4], inputs["init_noise"][0])
    assert torch.equal(null["sample"][0, :4], torch.zeros_like(cond) if "cond" in nulls else cond)
    assert torch.equal(null["sample"][1, :4], inputs["init_noise"][0])
    for row in (0, 1):
        assert torch.equal(kept["sample"][row, 4:], render)
        assert torch.equal(null["sample"][row, 4:], torch.zeros_like(render) if "render" in nulls else render)
        assert torch.equal(kept["encoder_hidden_states"][row], inputs["text"][1][0])
        assert torch.equal(null["encoder_hidden_states"][row], inputs["text"]["text" not in nulls][0])
        assert torch.equal(kept["class_labels"][row], inputs["class_labels"][0])
        assert null["class_labels"][row].any() == ("clip" not in nulls)


def test_guidance_rescale_restores_the_conditional_spread() -> None:
    inputs, steps = sampling_inputs(), []

    def unet(sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, **rest: Any) -> Any:
        strength = class_labels.abs().mean(dim=1)[:, None, None, None]
        return ((1 + strength) * sample[:, 4:],)

    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "use_cond_cache": False, "callback": steps.append}
    denoise(unet, None, PNDM, **inputs, **options, guidance_rescale=1.0)
    conditional = (1 + inputs["class_labels"].abs().mean()) * inputs["render_latents"]
    torch.testing.assert_close(steps[0].prediction, conditional)
    steps.clear()
    denoise(unet, None, PNDM, **inputs, **options, guidance_rescale=0.5)
    guided = inputs["render_latents"] + 5 * (conditional - inputs["render_latents"])
    torch.testing.assert_close(steps[0].prediction, (guided + conditional) / 2)


def oracle_for(clean: torch.Tensor, alphas_cumprod: torch.Tensor) -> Callable[..., Any]:
    """A UNet without weights that knows the answer: it predicts the noise between its input and `clean`."""

    def unet(sample: torch.Tensor, timesteps: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
        alphas = alphas_cumprod[timesteps.round().long()][:, None, None, None]
        answers = interleave(torch.zeros_like(clean), clean)
        return ((sample[:, :4] - alphas.sqrt() * answers) / (1 - alphas).sqrt(),)

    return unet


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.5, 0.1])
@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_perfect_prediction_recovers_the_image(scheduler_class: type, strength: float) -> None:
    scheduler = scheduler_class.from_config(
        {
            **SCHEDULE,
            "skip_prk_steps": True,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "prediction_type": "epsilon",
        }
    )
    inputs = sampling_inputs(images=2)
    clean = inputs["render_latents"]  # a noised-render start then lies on the oracle's path
    oracle = oracle_for(clean, PNDM.alphas_cumprod)
    steps = []
    options = {"num_inference_steps": 10, "strength": strength, "use_cond_cache": False, "callback": steps.append}
    result = denoise(oracle, None, scheduler, **inputs, **options)
    kept = round(10 * strength)
    assert len(steps) == kept + (scheduler_class is PNDMScheduler and kept > 1)
    # The last timestep's noise is left by PNDM and DDIM (alphas_cumprod[0] is their end), and none by Euler. A pure
    # noise start holds no image yet, so its noise is not `init_noise`.
    tail = 1 - PNDM.alphas_cumprod[0]
    if strength == 1:
        assert (result - clean).abs().max() < 0.3
    elif scheduler_class is EulerDiscreteScheduler:
        torch.testing.assert_close(result, clean, atol=2e-3, rtol=0)
    else:
        torch.testing.assert_close(
            result, PNDM.alphas_cumprod[0].sqrt() * clean + tail.sqrt() * inputs["init_noise"], atol=2e-4, rtol=0
        )


def test_strength_needs_multistep_pndm() -> None:
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=False)
    with pytest.raises(ValueError, match="strength=0.5 needs a PNDM scheduler with skip_prk_steps"):
        denoise(Spy(), None, scheduler, **sampling_inputs(), strength=0.5, use_cond_cache=False)


def test_sampling_leaves_the_scheduler_alone(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    scheduler = PNDMScheduler.from_config(PNDM.config)
    before = copy.deepcopy(vars(scheduler))
    options = {**sampling_inputs(), "num_inference_steps": 3, "guidance_scale": 2.0}
    first = denoise(unet, cache, scheduler, **options)
    assert scheduler.timesteps is before["timesteps"] is None and scheduler.ets == [] and scheduler.counter == 0
    assert torch.equal(denoise(unet, cache, scheduler, **options), first)
    with pytest.raises(ValueError, match="the conditioning cache is empty"), torch.no_grad(), cache.cached():
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_cond_cache", [True, False])
def test_half_precision_networks_sample_and_decode(dtype: torch.dtype, use_cond_cache: bool) -> None:
    unet = tiny_unet(in_channels=8).to(dtype)
    cache, vae = install_self_mutual_attention(unet), tiny_vae().to(dtype)
    inputs = sampling_inputs()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs["cond_latents"] = encode(vae, pixels)
    assert inputs["cond_latents"].shape == (1, 4, 8, 8) and inputs["cond_latents"].dtype == torch.float32
    options = {**inputs, "num_inference_steps": 3, "guidance_scale": 2.0, "use_cond_cache": use_cond_cache}
    latents = denoise(unet, cache, PNDM, **options)
    image = decode(vae, latents)
    assert latents.dtype == image.dtype == torch.float32
    assert image.shape == (1, 3, 64, 64) and image.min() >= 0 and image.max() <= 1
    full = tiny_unet(in_channels=8)
    expected = denoise(full, install_self_mutual_attention(full), PNDM, **options)
    torch.testing.assert_close(latents, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("width", "window", "overlap", "expected"),
    [
        (1920, 512, 128, [0, 384, 768, 1152, 1408]),
        (512, 512, 128, [0]),
        (320, 512, 128, [0]),
        (1920, 512, 0, [0, 512, 1024, 1408]),
        (1024, 512, 500, None),
        (640, 480, 100, [0, 160]),
        (1912, 512, 64, [0, 448, 896, 1344, 1400]),
    ],
)
def test_windows_cover_the_width(width: int, window: int, overlap: int, expected: list[int] | None) -> None:
    offsets = window_offsets(width, window, overlap)
    if expected is not None:
        assert offsets == expected
    assert all(offset % 8 == 0 for offset in offsets) and offsets == sorted(set(offsets))
    assert offsets[0] == 0 and offsets[-1] + window >= width
    assert all(b - a <= window - overlap for a, b in zip(offsets, offsets[1:], strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1917, 512, 64), "width_px=1917 must be a positive multiple of 8"),
        ((1920, 500, 64), "window_px=500 must be a positive multiple of 8"),
        ((1920, 512, 512), r"overlap_px=512 must lie in \[0, 504\] for window_px=512"),
    ],
)
def test_window_errors(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_offsets(*arguments)


def pointwise_unet(sample: torch.Tensor, timesteps: torch.Tensor, **conditions: Any) -> tuple[torch.Tensor]:
    """Every pixel's answer depends on that pixel alone, so overlapping windows agree."""
    return (0.5 * sample[:, :4] + sample[:, 4:].tanh(),)


def test_windows_that_agree_blend_to_the_whole_frame(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    options = {**sampling_inputs(images=2, width=30), "num_inference_steps": 4, "use_cond_cache": False}
    whole = denoise(pointwise_unet, None, PNDM, **options)
    windowed = denoise(pointwise_unet, None, PNDM, **options, window_px=96, window_overlap_px=40)
    torch.testing.assert_close(windowed, whole, atol=1e-5, rtol=1e-5)

    unet, cache = refiner
    options = {**sampling_inputs(width=16), "num_inference_steps": 2, "guidance_scale": 2.0}
    one_window = denoise(unet, cache, PNDM, **options, window_px=256)
    assert torch.equal(one_window, denoise(unet, cache, PNDM, **options))


def test_windows_work_with_the_cache(refiner: tuple[UNet2DConditionModel, CondCache]) -> None:
    unet, cache = refiner
    rows = count_rows(unet)
    options = {**sampling_inputs(images=2, width=20), "num_inference_steps": 2, "guidance_scale": 2.0}
    options |= {"window_px": 64, "window_overlap_px": 16}
    count = len(window_offsets(160, 64, 16))
    options["class_labels"] = [
        torch.randn(2, 2 * EMBED, generator=torch.Generator().manual_seed(i)) for i in range(count)
    ]
    cached = denoise(unet, cache, PNDM, **options)
    assert rows == [2 * 2 * count] * 4  # one recording, three calls
    torch.testing.assert_close(
        cached, denoise(unet, cache, PNDM, **options, use_cond_cache=False), atol=1e-4, rtol=1e-4
    )


def test_each_window_has_its_own_class_vector() -> None:
    spy, inputs = Spy(), sampling_inputs(images=2, width=16)
    labels = [torch.full((2, 2 * EMBED), 1.0), torch.full((2, 2 * EMBED), 2.0)]
    options = {"window_px": 64, "window_overlap_px": 0, "num_inference_steps": 1, "use_cond_cache": False}
    denoise(spy, None, PNDM, **{**inputs, "class_labels": labels}, **options)
    sample, seen = spy.calls[0]["sample"], spy.calls[0]["class_labels"][:, 0]
    assert seen.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(sample[::2, :4], torch.cat(inputs["cond_latents"].split(8, dim=-1)))
    with pytest.raises(ValueError, match="class_labels lists 3 tensors for 2 windows"):
        denoise(spy, None, PNDM, **{**inputs, "class_labels": [*labels, labels[0]]}, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"strength": 0.0}, r"strength=0.0 is outside \(0, 1\]"),
        ({"null_kinds": ["image"]}, r"null_kinds has unknown names \['image'\]: use any of \['text', 'clip', "),
        ({"guidance_scale": 2.0, "null_kinds": ()}, "guidance_scale=2.0 with no null_kinds has nothing to contrast"),
        ({"use_cond_cache": True}, "use_cond_cache needs the cache that install_self_mutual_attention returned"),
        ({"init_noise": torch.zeros(1, 4, 8, 9)}, r"latents must share one shape .*'init_noise': \(1, 4, 8, 9\)"),
        ({"class_labels": torch.zeros(3, 24)}, "class_labels has 3 rows for 1 images: give 1 .* or 2"),
        (
            {"text": (torch.zeros(2, 5, 16),) * 2},
            r"text embeddings are \(2, 5, 16\): expected \(1 or 1, tokens, width\)",
        ),
    ],
)
def test_sampling_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    options = {**sampling_inputs(), "use_cond_cache": False, **changes}
    with pytest.raises(ValueError, match=message):
        denoise(Spy(), None, PNDM, **options)


def test_cached_sampling_names_a_unet_that_was_not_prepared() -> None:
    with pytest.raises(ValueError, match="the conditioning cache is empty: .* install_self_mutual_attention"):
        denoise(tiny_unet(in_channels=8), CondCache(), PNDM, **sampling_inputs())


# What a run draws and is told.


def test_unused_numbers_are_not_drawn_and_change_no_others() -> None:
    sizes = (7, [3, 5], (4, 8, 8), EMBED, 1000)
    every = draw(ObjectiveSettings(noise_offset=0.1, input_perturbation=0.1), *sizes)
    few = draw(ObjectiveSettings(condition_dropout_prob=None), *sizes)
    optional = ("random_p", "offset_noise", "perturb_noise")
    assert [getattr(few, name) for name in optional] == [None] * 3
    assert [tuple(getattr(every, name).shape) for name in optional] == [(2,), (4, 4, 1, 1), (4, 4, 8, 8)]
    for name in ("image_embed_noise", "noise", "timesteps"):
        assert torch.equal(getattr(few, name), getattr(every, name)), name


def test_dropout_that_does_not_fit_is_named(caplog: pytest.LogCaptureFixture) -> None:
    objective_settings(RefinerLoss(condition_dropout_prob=1 / 7), "epsilon")
    objective_settings(RefinerLoss(condition_dropout_prob=0.2, use_classifier_free_guidance=False), "epsilon")
    assert caplog.messages == []
    settings = objective_settings(RefinerLoss(condition_dropout_prob=0.2), "epsilon")
    assert settings.condition_dropout_prob == 0.2
    (message,) = caplog.messages
    assert message.startswith("condition_dropout_prob 0.2 is above 1/7: the seven ways to drop do not fit into one")


# The checkpoint's components.


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own to change."""
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_components_of_half_precision_files_are_in_float32(copied: Path) -> None:
    for name in ("image_encoder", "image_normalizer", "text_encoder", "unet", "vae"):
        path = weights_of(copied / name)
        save_file({key: value.half() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
        config = json.loads((copied / name / "config.json").read_text())
        config.pop("dtype", None)
        (copied / name / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    components = load_components(str(copied))
    for name in ("image_encoder", "image_normalizer", "text_encoder", "unet", "vae"):
        assert {p.dtype for p in getattr(components, name).parameters()} == {torch.float32}, name


def test_a_variant_reaches_all_that_have_it(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("image_encoder", "image_normalizer", "unet", "vae"):
        path = weights_of(copied / name)
        path.rename(path.with_suffix(".fp16.safetensors"))
    load_components(str(copied), variant="fp16")
    warned = [message for message in caplog.messages if "variant" in message]
    assert warned == [f"{copied} has no text encoder of variant fp16: the one without is taken"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image_encoder", None, "the image encoder cannot be loaded from {} (Error no file named model.safetensors"),
        ("image_encoder", b"torn", "the weights of the image encoder in {} are damaged, or of another network ("),
        ("text_encoder", b"torn", "the weights of the text encoder in {} are damaged, or of another network ("),
        ("vae", None, "the vae cannot be loaded from {} (Error no file named diffusion_pytorch_model.bin"),
        ("vae", b"torn", "the vae cannot be loaded from {} (Unable to load weights from checkpoint file"),
        ("unet", b"torn", "{}/diffusion_pytorch_model.safetensors was refused: it is damaged"),
    ],
)
def test_incomplete_and_torn_components_are_named(copied: Path, name: str, content: bytes | None, message: str) -> None:
    path = weights_of(copied / name)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        load_components(str(copied))
    assert str(error.value).startswith(message.format(copied / name))
