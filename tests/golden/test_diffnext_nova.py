"""NOVA's modules, schedules and training steps against recorded vectors."""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import vectors as golden
from torch import Tensor, nn
from vectors import Vectors

from common.optim import EMA
from diffnext.models.attention import KVCache, frame_causal_attention, rotary_angles, rotate
from diffnext.models.blocks import Block, VisionTransformer
from diffnext.models.diffusion_mlp import AdaLayerNorm, DiffusionMLP, TimeCondEmbed, timestep_waves
from diffnext.models.embeddings import (
    DEFAULT_FLOW,
    LabelEmbed,
    MotionEmbed,
    PatchEmbed,
    TextEmbed,
    VideoPosEmbed,
    grid_positions,
    patchify,
    position_embedding,
    unpatchify,
)
from diffnext.models.masking import MaskEmbed, gather_tokens, mask_ratio, split_tokens
from diffnext.models.noise import Corrupted, DDPMNoise, NoiseSchedule, noise_schedule
from diffnext.models.objective import NovaDraws, nova_inputs, total_loss
from diffnext.models.parameters import frozen_parameters, parameter_groups
from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

TRAINER = "diffnext"
FLOW_MATCHING = "FlowMatchEulerDiscreteScheduler"


def frame_lengths(mask: Tensor) -> list[int]:
    """Tokens per frame of a recorded additive mask (n, n): tokens of one frame see equally many."""
    return (mask == 0).sum(dim=1).unique_consecutive(return_counts=True)[1].tolist()


# Embeddings.


@golden.by_file(TRAINER, "embeddings*.safetensors", having="pos2d")
def test_position_embeddings(vectors: Vectors) -> None:
    config = vectors.config["VideoPosEmbed"]
    embed = golden.filled(VideoPosEmbed(config["dim"], config["base_size"]), config)
    vectors.check("pos2d", position_embedding(config["base_size"][1:], config["dim"]))
    vectors.check("video_pos.out", embed(vectors["video_pos.in"]))
    for num_frames in vectors.under("time_embed."):
        vectors.check(f"time_embed.{num_frames}", embed.time(int(num_frames)))


@golden.by_file(TRAINER, "embeddings*.safetensors", having="rope.q")
def test_rotary_positions(vectors: Vectors) -> None:
    config = vectors.config["rope"]
    positions = grid_positions(config["t"], config["hw"])
    torch.testing.assert_close(positions.expand(len(vectors["rope.pos"]), -1, -1).float(), vectors["rope.pos"])
    angles = rotary_angles(positions, config["dim"], config["theta"])[None]
    pad = (0, 0, config["pad"], 0)
    vectors.check("rope.out", rotate(vectors["rope.q"], nn.functional.pad(angles, pad)))
    ids = vectors["rope.ids"][..., 0]
    some = gather_tokens(angles.expand(len(ids), -1, -1), ids)
    vectors.check("rope.out_ids", rotate(vectors["rope.q_ids"], nn.functional.pad(some, pad)))


@golden.by_file(TRAINER, "embeddings*.safetensors", having="motion.out")
def test_motion_embedding(vectors: Vectors) -> None:
    config = vectors.config["MotionEmbed"]
    embed = golden.filled(MotionEmbed(config["dim"]), config)
    flow, fps = vectors["motion.flow"], vectors["motion.fps"]
    vectors.check("motion.out", embed(flow, fps))
    vectors.check("motion.out_flow_only", embed(flow))
    vectors.check("motion.out_default", embed(torch.full_like(flow, config["base_flow"])))


@golden.by_file(TRAINER, "embeddings*.safetensors", having="patch.x")
def test_patches(vectors: Vectors) -> None:
    config = vectors.config["PatchEmbed"]
    patch, x = config["patch_size"], vectors["patch.x"]
    embed = golden.filled(PatchEmbed(config["image_dim"], config["embed_dim"], patch), config)
    vectors.check("patch.out", embed(x))
    vectors.check("patch.out5", embed(vectors["patch.x5"].transpose(1, 2)))
    vectors.check("patch.patchify", patchify(x, patch))
    vectors.check("patch.unpatchify", unpatchify(patchify(x, patch), patch, x.shape[-2:]))


@golden.by_file(TRAINER, "embeddings*.safetensors", having="text.out")
def test_text_embedding(vectors: Vectors) -> None:
    config = vectors.config["TextEmbed"]
    embed = golden.filled(TextEmbed(config["token_dim"], config["embed_dim"], config["num_tokens"]), config)
    prompts = [vectors[f"text.prompt.{i}"] for i in range(len(vectors["text.encoded"]))]
    rows = embed.pad(prompts)
    vectors.check("text.encoded", rows)
    vectors.check("text.out", embed(rows))
    draws = vectors["text.train_draws"]
    repeated = embed.pad([prompts[i % len(prompts)] for i in range(len(draws))])
    dropped = draws < config["dropout"]
    expected = embed.norm(embed.proj(vectors["text.train_encoded"]))
    vectors.check("text.train_encoded", embed(repeated, dropped), expected=expected)
    vectors.check("text.train_encoded", repeated[~dropped], expected=vectors["text.train_encoded"][~dropped])


@golden.by_file(TRAINER, "embeddings*.safetensors", having="label.out")
def test_label_embedding(vectors: Vectors) -> None:
    config = vectors.config["LabelEmbed"]
    out = vectors["label.out"]
    embed = golden.filled(LabelEmbed(out.shape[-1], config["num_classes"]), config)
    every = embed(torch.arange(config["num_classes"] + 1))[:, 0]  # the file holds no labels: find them
    labels = torch.cdist(out[:, 0], every).argmin(dim=1)
    vectors.check("label.out", embed(labels))
    assert torch.equal(embed(labels, torch.ones(len(labels), dtype=torch.bool))[:, 0], every[-1:].expand(len(out), -1))


@golden.by_file(TRAINER, "embeddings*.safetensors", having="time.out")
def test_time_and_condition_embedding(vectors: Vectors) -> None:
    config = vectors.config["TimeCondEmbed"]
    embed = golden.filled(TimeCondEmbed(config["cond_dim"], config["embed_dim"]), config)
    vectors.check("time.freq", timestep_waves(vectors["time.t"]))
    vectors.check("time.out", embed(vectors["time.t"], vectors["time.z"]))
    vectors.check("time.out1d", embed(vectors["time.t1d"], vectors["time.z"]))


# Blocks.


@golden.by_file(TRAINER, "blocks*.safetensors", having="block.x")
def test_block(vectors: Vectors) -> None:
    config = vectors.config["block"]
    block = golden.filled(Block(config["dim"], config["heads"]), config)
    vectors.check("block.out", block(vectors["block.x"]))
    lengths = frame_lengths(vectors["block.attn_mask"])
    vectors.check("block.out_masked", block(vectors["block.x"], frame_lengths=lengths))


def vision_transformer(vectors: Vectors) -> VisionTransformer:
    config = vectors.config["vit"]
    sizes = (config["depth"], config["dim"], config["heads"], config["patch"], config["image_dim"])
    return golden.filled(VisionTransformer(*sizes), config)


@golden.by_file(TRAINER, "blocks*.safetensors", having="vit.tok")
def test_vision_transformer(vectors: Vectors) -> None:
    vit, size = vision_transformer(vectors), vectors.config["vit"]["pos_embed_base"]
    tokens, prefix, ids = vectors["vit.tok"], vectors["vit.c"], vectors["vit.prev_ids"][..., 0]
    positions = position_embedding(size, vit.embed_dim)
    x = tokens + positions
    vectors.check("vit.out_full", vit(x, prefix))
    vectors.check("vit.out_nocond", vit(x))
    vectors.check("vit.out_split", vit(x, prefix, ids))
    vectors.check("vit.out_split_empty", vit(x, prefix, ids[:, :0]))
    vectors.check("vit.out_img", vit(vit.patch_embed(vectors["vit.img"]) + positions, prefix))
    angles = rotary_angles(grid_positions(1, size), vit.head_dim)[None]
    vectors.check("vit_rope.out_full", vit(tokens, prefix, angles=angles))
    vectors.check("vit_rope.out_split", vit(tokens, prefix, ids, angles))


@golden.by_file(TRAINER, "blocks*.safetensors", having="kv.frames")
def test_cached_frames_and_one_pass_agree(vectors: Vectors) -> None:
    vit, frames, prefix = vision_transformer(vectors), vectors["kv.frames"], vectors["vit.c"]
    caches = [KVCache() for _ in vit.blocks]
    for t, expected in sorted(vectors.under("kv.out.").items(), key=lambda item: int(item[0])):
        out = vit(frames[:, int(t)], None if int(t) else prefix, caches=caches)
        vectors.check(f"kv.out.{t}", out, expected=expected)
    lengths = [frames.shape[2]] * frames.shape[1]
    lengths[0] += prefix.shape[1]
    vectors.check("kv.masked_full", vit(frames.flatten(1, 2), prefix, frame_lengths=lengths))


@golden.by_file(TRAINER, "blocks*.safetensors", having="ada.x")
def test_adaptive_norms(vectors: Vectors) -> None:
    config = vectors.config["AdaLayerNormZero"]
    modulated, gate = golden.filled(AdaLayerNorm(config["dim"], config["num_stats"]), config)(
        vectors["ada.x"], vectors["ada.z"]
    )
    vectors.check("ada.h", modulated)
    vectors.check("ada.gate", gate)
    config = vectors.config["AdaLayerNorm_mixer"]
    mixer = golden.filled(AdaLayerNorm(config["dim"], rank=config["rank"], normalize=False), config)
    vectors.check("mixer.out", mixer(vectors["ada.x"][:, :1], vectors["ada.z"])[0])


@golden.by_file(TRAINER, "blocks*.safetensors", having="mlp.x")
def test_diffusion_head(vectors: Vectors) -> None:
    config = vectors.config["DiffusionMLP"]
    patch = config["patch_size"]
    sizes = (config["depth"], config["embed_dim"], config["cond_dim"], patch, config["image_dim"])
    head = golden.filled(DiffusionMLP(*sizes), config)
    tokens, z = patchify(vectors["mlp.x"], patch), vectors["mlp.z"]
    vectors.check("mlp.out", head(tokens, vectors["mlp.t"], z))
    ids = vectors["mlp.pred_ids"][..., 0]
    some = head(gather_tokens(tokens, ids), vectors["mlp.t1d"], gather_tokens(z, ids))
    vectors.check("mlp.out_ids", tokens.scatter(1, ids[..., None].expand_as(some), some))
    vectors.check("mlp.block_out", head.blocks[0](vectors["mlp.block_x"], vectors["mlp.block_z"]))


# Masks.


@golden.by_case(TRAINER, "masking*.safetensors", r"(attn_mask\.\d+)")
def test_frame_causal_attention(vectors: Vectors, case: str) -> None:
    mask = vectors[case]
    seen = torch.eye(len(mask))[None, None]  # with equal scores, a token's output tells which values it sees
    lengths = vectors.config[case]["attn_lens"]
    out = frame_causal_attention(torch.zeros_like(seen), torch.zeros_like(seen), seen, lengths)[0, 0]
    assert torch.equal(out > 0, mask == 0)
    config = vectors.config[case]
    frames = [config["tokens_per_frame"]] * config["frames"]
    assert lengths == [config["text_len"] + frames[0], *frames[1:]]


@golden.by_case(TRAINER, "masking*.safetensors", r"(train\.\d+)\.u")
def test_training_mask(vectors: Vectors, case: str) -> None:
    tensors, config = vectors.under(f"{case}."), vectors.config["train"]
    embed = golden.filled(MaskEmbed(tensors["x"].shape[-1]), config)
    visible, masked = split_tokens(tensors["u"], tensors["ratio"].item())
    assert torch.equal(visible, tensors["prev_ids"][..., 0])
    mask = torch.zeros_like(tensors["mask"]).scatter(1, masked[..., None], 1.0)
    assert torch.equal(mask, tensors["mask"])
    vectors.check(f"{case}.out", embed(tensors["x"], visible))


@golden.by_file(TRAINER, "masking*.safetensors", having="train.0.u")
def test_mask_ratio(vectors: Vectors) -> None:
    config = vectors.config["train"]
    ratios = [mask_ratio(uniform) for uniform in config["uniform_from_same_numpy_state"]]
    np.testing.assert_allclose(ratios, config["ratios"], rtol=0, atol=1e-14)


# Schedules.


def schedule_config(case: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": FLOW_MATCHING if case.startswith("fm") else "DDPMScheduler", **config}


@golden.by_case(TRAINER, "schedulers*.safetensors", r"(.+)\.train_sigmas")
def test_flow_matching_noise(vectors: Vectors, case: str) -> None:
    tensors = vectors.under(f"{case}.")
    noise = noise_schedule(schedule_config(case, vectors.config[case]))
    vectors.check(f"{case}.train_sigmas", noise.sigmas)
    vectors.check(f"{case}.train_timesteps", noise.sigmas * len(noise.sigmas))
    assert torch.equal(noise.index(tensors["normal"]), tensors["index"])
    corrupted = noise.corrupt(tensors["x"], tensors["noise"], tensors["normal"])
    vectors.check(f"{case}.x_t", corrupted.noisy)
    vectors.check(f"{case}.timestep", corrupted.timestep)
    vectors.check(f"{case}.target", corrupted.target)


@golden.by_case(TRAINER, "schedulers*.safetensors", r"(.+)\.alphas_cumprod")
def test_ddpm_noise(vectors: Vectors, case: str) -> None:
    tensors, config = vectors.under(f"{case}."), schedule_config(case, vectors.config[case])
    targets = {"epsilon": tensors["noise"], "v_prediction": tensors["velocity"], "sample": tensors["x"]}
    for prediction_type, target in targets.items():
        noise = noise_schedule({**config, "prediction_type": prediction_type})
        vectors.check(f"{case}.alphas_cumprod", noise.alphas_cumprod)
        corrupted = noise.corrupt(tensors["x"], tensors["noise"], tensors["index"])
        vectors.check(f"{case}.x_t", corrupted.noisy)
        vectors.check(f"{case}.velocity", corrupted.target, expected=target)
        assert torch.equal(corrupted.timestep, tensors["index"].float())


def steps_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and model outputs of the recorded sampler steps, in order."""
    count = sum(name.startswith("step.") and name.endswith(".model_output") for name in tensors)
    return ((f"step.{i}", tensors[f"step.{i}.model_output"]) for i in range(count))


@golden.by_case(TRAINER, "schedulers*.safetensors", r"(.+)\.train_sigmas")
def test_flow_matching_steps_of_diffusers(vectors: Vectors, case: str) -> None:
    tensors, config = vectors.under(f"{case}."), vectors.config[case]
    for name in tensors:
        if name.startswith("set") and name.endswith("sigmas"):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
            kind = name.partition(".")[0]
            scheduler.set_timesteps(int(kind.removeprefix("set")))
            vectors.check(f"{case}.{name}", scheduler.sigmas.double())
            vectors.check(f"{case}.{kind}.timesteps", scheduler.timesteps)
    x, steps = tensors["step.x0"], list(steps_of(tensors))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(len(steps))
    for (name, output), timestep in zip(steps, scheduler.timesteps, strict=True):
        x = scheduler.step(output, timestep, x).prev_sample
        vectors.check(f"{case}.{name}.out", x)


@golden.by_case(TRAINER, "schedulers*.safetensors", r"(.+)\.alphas_cumprod")
def test_ddpm_steps_of_diffusers(vectors: Vectors, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, config = vectors.under(f"{case}."), vectors.config[case]
    scheduler = diffusers.DDPMScheduler.from_config({"clip_sample": False, **config})
    steps = list(steps_of(tensors))
    scheduler.set_timesteps(len(steps))
    assert torch.equal(scheduler.timesteps, tensors["timesteps"])
    x = tensors["step.x0"]
    for (name, output), timestep in zip(steps, scheduler.timesteps, strict=True):
        noise = tensors[f"{name}.noise"]
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, recorded=noise, **kwargs: recorded
        )
        x = scheduler.step(output, timestep, x).prev_sample
        vectors.check(f"{case}.{name}.out", x)


# Training steps.


def build_nova(vectors: Vectors) -> NOVATransformer3DModel:
    config = vectors.config
    arch = [config["arch_defs"].get(name, name) for name in config["transformer"]["arch"]]
    model = NOVATransformer3DModel.from_config({**config["transformer"], "arch": arch})
    state = {name: value.float() for name, value in vectors.under("sd.").items()}
    model.load_state_dict(state) if state else golden.filled(model, vectors.header)
    model.enable_gradient_checkpointing(config["gradient_checkpointing"])
    return model.train()


def draws_of(vectors: Vectors, step: int) -> NovaDraws:
    kinds = [kind for _, kind, _ in vectors.header["draws_order"]]
    draws = [vectors[f"step{step}.draw.{i}"] for i in range(len(kinds))]
    dropout = [draw for draw, kind in zip(draws, kinds, strict=True) if kind == "np.random.rand"]
    posterior, order, ratio, noise, timesteps = (
        draw for draw, kind in zip(draws, kinds, strict=True) if kind != "np.random.rand"
    )
    return NovaDraws(posterior, torch.stack(dropout), order, ratio.item(), noise, timesteps)


class NoiseMinusLatents(DDPMNoise):
    """What the original trains DDPM schedulers to predict unless they predict noise: not what they say."""

    def corrupt(self, clean: Tensor, noise: Tensor, draw: Tensor) -> Corrupted:
        return dataclasses.replace(super().corrupt(clean, noise, draw), target=noise - clean)


def schedule_of(vectors: Vectors) -> NoiseSchedule:
    noise = noise_schedule({"_class_name": vectors.config["scheduler_class"], **vectors.config["scheduler"]})
    if isinstance(noise, DDPMNoise) and noise.prediction_type != "epsilon":
        return NoiseMinusLatents(noise.alphas_cumprod, noise.prediction_type)
    return noise


def flow_of(vectors: Vectors) -> Tensor | None:
    """Recorded motion scores; without any, the default where the recorded prefix has tokens for motion."""
    if "in.motion_flow" in vectors or "mid.venc.text" not in vectors:
        return vectors.tensors.get("in.motion_flow")
    count, num_tokens, _ = vectors["mid.venc.text"].shape
    has_motion = num_tokens > vectors.config["transformer"]["text_token_len"]
    return torch.full((count,), float(DEFAULT_FLOW)) if has_motion else None


def losses_of(model: NOVATransformer3DModel, vectors: Vectors, step: int, **options: Any) -> dict[str, Tensor]:
    config, moments, draws = vectors.config, vectors["in.moments"], draws_of(vectors, step)
    latents = nova_inputs(moments, draws.posterior_noise, config["vae_scaling_factor"], config["vae_shift_factor"])
    text = model.text_embed.pad([vectors[f"in.prompt.{i}"] for i in range(len(moments))])
    flow, loss_repeat = flow_of(vectors), config["loss_repeat"]
    return model(latents, draws, schedule_of(vectors), text=text, flow=flow, loss_repeat=loss_repeat, **options)


def freeze(model: NOVATransformer3DModel, vectors: Vectors) -> None:
    """As the pipeline that the file's header speaks of."""
    pipeline = "t2v" if "T2V" in vectors.header["function"] else "t2i"
    frozen = frozen_parameters(model, pipeline)
    assert sorted(frozen) == sorted(vectors.header["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def captured(model: NOVATransformer3DModel) -> dict[str, Any]:
    """What goes through the model's parts in the next forward pass: arguments, keyword arguments, output."""
    seen: dict[str, Any] = {}

    def hook(name: str):
        def store(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
            seen[name] = (args, kwargs, out)

        return store

    for name, part in model.named_children():
        part.register_forward_hook(hook(name), with_kwargs=True)
    return seen


@golden.by_file(TRAINER, "nova_t2*_train*.safetensors")
def test_intermediate_values(vectors: Vectors) -> None:
    model, config = build_nova(vectors), vectors.config
    seen = captured(model)
    with torch.no_grad():
        losses_of(model, vectors, step=0, masked_only=False)
    (tokens, prefix), options, _ = seen["video_encoder"]
    (noisy, timestep, z), _, _ = seen["image_decoder"]
    (_, visible_ids), _, _ = seen["mask_embed"]
    mask = torch.ones(*z.shape[:2], 1).scatter(1, visible_ids[..., None], 0.0)
    actual = {name: out for name, (_, _, out) in seen.items()} | {
        "venc.text": prefix,
        "venc.x": tokens,
        "mask_embed.prev_ids": visible_ids[..., None],
        "mask": mask,
        "dec.x_t": unpatchify(noisy, model.config.patch, vectors["in.moments"].shape[-2:]),
        "dec.timestep": timestep,
        "dec.z": z.repeat(config["loss_repeat"], 1, 1),
    }
    rule = vectors.header["tolerance"]
    for name, expected in vectors.under("mid.").items():
        if name == "attn_mask":
            assert frame_lengths(expected) == options["frame_lengths"]
        elif name not in actual:
            warnings.warn(
                f"{vectors.path.name}: mid.{name} is not compared: nothing here is known to be it", stacklevel=1
            )
        else:
            limits = {"rtol": rule["mid_rtol"], "atol": rule["mid_atol"]}
            expected = expected.to(actual[name].dtype)  # DDPM's timesteps are recorded as integers
            torch.testing.assert_close(actual[name], expected, **limits, msg=lambda text, at=name: f"{at}: {text}")


@golden.by_file(TRAINER, "nova_t2*_train*.safetensors")
def test_gradients(vectors: Vectors) -> None:
    model, header = build_nova(vectors), vectors.header
    assert sum(parameter.numel() for parameter in model.parameters()) == header["num_params"]
    freeze(model, vectors)
    total_loss(losses_of(model, vectors, step=0)).backward()
    rule, norms = header["tolerance"], header["grad_norms"]
    parameters = dict(model.named_parameters())
    for name, expected in norms.items():
        grad = parameters[name].grad
        assert (grad is None) == (expected is None), name
        if expected is not None:
            limits = {"rel": rule["grad_norm_rtol"], "abs": 0.0}
            assert grad.norm().item() == pytest.approx(expected, **limits), name
    for name, expected in vectors.under("grad.").items():
        error = (parameters[name].grad - expected).norm()
        assert error <= rule["grad_norm_rtol"] * expected.norm(), name


@golden.by_file(TRAINER, "nova_t2*_train*.safetensors")
def test_parameter_groups(vectors: Vectors) -> None:
    model = build_nova(vectors)
    freeze(model, vectors)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    actual = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in parameter_groups(model)]
    assert actual == vectors.header["param_groups"]


@golden.by_file(TRAINER, "nova_t2*_train*.safetensors")
def test_training_steps(vectors: Vectors) -> None:
    model, header = build_nova(vectors), vectors.header
    freeze(model, vectors)
    options = dict(vectors.config["optimizer"])
    optimizer = getattr(torch.optim, options.pop("name"))(parameter_groups(model), **options)
    ema = EMA(model, vectors.config["ema_decay"], warmup=False)
    rule = header["tolerance"]
    for step, recorded in enumerate(header["steps"]):
        losses = losses_of(model, vectors, step)
        assert {name: value.item() for name, value in losses.items()} == {
            name: pytest.approx(value, rel=rule["loss_rtol"]) for name, value in recorded["losses"].items()
        }
        loss = total_loss(losses)
        assert loss.item() == pytest.approx(recorded["total_loss"], rel=rule["loss_rtol"])
        loss.backward()
        norm = math.hypot(*(p.grad.norm().item() for p in model.parameters() if p.grad is not None))
        assert norm == pytest.approx(recorded["total_grad_norm"], rel=rule["grad_norm_rtol"])
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    check_parameters(model, vectors, "final.")
    with ema.swapped():
        check_parameters(model, vectors, "ema.")


def check_parameters(model: NOVATransformer3DModel, vectors: Vectors, prefix: str) -> None:
    rule, parameters = vectors.header["tolerance"], dict(model.named_parameters())
    limits = {"rtol": rule["mid_rtol"], "atol": rule["mid_atol"]}
    for name, expected in vectors.under(prefix).items():
        actual = parameters[name].detach()
        torch.testing.assert_close(actual, expected, **limits, msg=lambda text, at=name: f"{prefix}{at}: {text}")
