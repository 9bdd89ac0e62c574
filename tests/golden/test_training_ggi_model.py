"""GGI's transformer, schedule and training step against recorded vectors, and the names of the released weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vectors as golden
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import save_file
from vectors import KEYS_DIR, Vectors

from common.diffusion import add_noise, velocity
from common.optim import lr_factor
from common.pretrained import widen_conv
from training_ggi.models.base_lora import install, read_lora_file, set_up_training
from training_ggi.models.noise_warp import resize_list
from training_ggi.models.objective import GGIConstants, GGIDraws, GGIInputs, ggi_loss, noisy_end_images
from training_ggi.models.schedule import alphas_cumprod
from training_ggi.models.transformer import (
    LATENT_PX,
    model_input,
    rotary_for,
    rotary_tables,
    widen_patch_embed,
)

TRAINER = "training_ggi"


def check(name: str, actual: torch.Tensor | float, expected: torch.Tensor | float, rule: Any) -> None:
    """Compare at a rule of these headers: "exact", a largest difference, or "rel x" of the largest value."""
    expected = torch.as_tensor(expected)
    actual = torch.as_tensor(actual).detach().to(expected.dtype)
    assert actual.shape == expected.shape, f"{name} is {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual - expected).abs().max()
    is_relative = isinstance(rule, str) and rule.startswith("rel")
    limit = 0.0 if rule == "exact" else float(rule.split()[1]) * expected.abs().max() if is_relative else float(rule)
    assert error <= limit, f"{name} differs by {error}, more than {limit}"


def rel(rule: str) -> float:
    return float(rule.split()[1])


# Pieces.


@golden.by_case(TRAINER, "patch_embed_expand*.safetensors", r"([^/]+)/weight_in")
def test_patch_embed_expand(vectors: Vectors, case: str) -> None:
    narrow, x = vectors[f"{case}/weight_in"], vectors[f"{case}/x"]
    rules = vectors.header["tolerance"]
    projection = torch.nn.Conv2d(narrow.shape[1], narrow.shape[0], narrow.shape[2:], narrow.shape[2:])
    with torch.no_grad():
        projection.weight.copy_(narrow)
        projection.bias.copy_(vectors[f"{case}/bias_in"])
    wide = widen_conv(projection, x.shape[1])
    check("weight", wide.weight, vectors[f"{case}/weight_out"], rules["weights"])
    check("bias", wide.bias, vectors[f"{case}/bias_out"], rules["weights"])
    check("y", wide(x), vectors[f"{case}/y"], rules["y"])
    check("y of the narrow one", projection(x[:, : narrow.shape[1]]), vectors[f"{case}/y"], rules["y"])


@golden.by_case(TRAINER, "rope*.safetensors", r"([^/]+)/cos")
def test_rope(vectors: Vectors, case: str) -> None:
    config = vectors.header["cases"][case]
    rule = vectors.header["tolerance"]
    grid, base_grid = ((config[f"{base}height"] // 16, config[f"{base}width"] // 16) for base in ("", "base_"))
    tables = rotary_tables(config["head_dim"], config["latent_frames"], grid, base_grid)
    rows = vectors[f"{case}/rows"].long()
    for name, table in zip(("cos", "sin"), tables, strict=True):
        assert list(table.shape) == config["shape"], f"{name} is {tuple(table.shape)}"
        check(name, table[rows], vectors[f"{case}/{name}"], rule)
        assert abs(table.double().sum().item() - config[f"sum_{name}"]) <= rule * table.numel(), f"sum of {name}"


@golden.by_file(TRAINER, "scheduler*.safetensors")
def test_scheduler(vectors: Vectors) -> None:
    rules = vectors.header["tolerance"]
    alphas = alphas_cumprod(vectors.config)
    check("alphas_cumprod", alphas, vectors["alphas_cumprod"], rules["alphas_cumprod"])
    check("loss_weight", 1 / (1 - alphas), vectors["loss_weight_fp32"], rules["loss"])

    clean, noise, v, timesteps = (vectors[name] for name in ("x0", "noise", "model_output", "timesteps"))
    noisy = add_noise(clean, noise, timesteps, alphas)
    check("noisy", noisy, vectors["noisy"], rules["noisy"])
    # The original rounds the schedule to bfloat16 first; ours is nearer to the truth.
    rounded = alphas.bfloat16()[timesteps].reshape(-1, *[1] * (clean.ndim - 1))
    upstream = rounded.sqrt() * clean.bfloat16() + (1 - rounded).sqrt() * noise.bfloat16()
    check("noisy_bf16", upstream, vectors["noisy_bf16"], rules["noisy_bf16"])
    error, upstream_error = ((each - vectors["noisy"]).abs().max() for each in (noisy, vectors["noisy_bf16"].float()))
    assert error < upstream_error, f"ours errs by {error}, the original by {upstream_error}"
    x0_pred = velocity(v, noisy, timesteps, alphas)  # x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v, the same formula
    check("x0_pred", x0_pred, vectors["x0_pred"], rules["x0_pred"])
    v_mse = (v - velocity(clean, noise, timesteps, alphas)).square().flatten(1).mean(1)
    for name in ("per_sample_loss", "per_sample_v_mse"):
        torch.testing.assert_close(v_mse, vectors[name], atol=0, rtol=rel(rules["loss"]))


@golden.by_case(TRAINER, "lr_schedule*.safetensors", r"([^/]+)/multiplier")
def test_lr_schedule(vectors: Vectors, case: str) -> None:
    config = vectors.header["cases"][case]
    names = {"warmup": "warmup_steps", "total": "total_steps", "cycles": "num_cycles", "power": "power"}
    steps = {name: config[key] for key, name in names.items() if key in config}
    factors = [lr_factor(config["kind"], step, **steps) for step in vectors[f"{case}/step"].tolist()]
    expected = vectors[f"{case}/multiplier"]
    check("multiplier", torch.tensor(factors, dtype=expected.dtype), expected, vectors.header["tolerance"])


# The whole step.


def build_transformer(vectors: Vectors) -> CogVideoXTransformer3DModel:
    transformer = CogVideoXTransformer3DModel(**vectors.header["transformer_config"])
    transformer.load_state_dict(vectors.under("base/"))
    return widen_patch_embed(transformer.float(), vectors.header["widen_in_channels_to"])


def lora_path(vectors: Vectors, folder: Path) -> Path:
    save_file(vectors.under("lora_file/"), folder / "base_lora.safetensors")
    return folder / "base_lora.safetensors"


@torch.no_grad()
def encode(vectors: Vectors, clip: torch.Tensor) -> torch.Tensor:
    """Moments (B, 2C, F, h, w) of a clip (B, frames, 3, H, W)."""
    vae = AutoencoderKLCogVideoX(**vectors.header["vae_config"])
    vae.encoder.load_state_dict(vectors.under("vae/encoder."))
    return vae.encode(clip.transpose(1, 2)).latent_dist.parameters


def step_of(vectors: Vectors, transformer: CogVideoXTransformer3DModel) -> tuple[GGIInputs, GGIDraws, GGIConstants]:
    """The file's inputs and draws in our layout: (B, frames, channels, ...)."""
    header = vectors.header
    repeats = header["frames_after_repeat"] - header["frames_in"]
    clip, cond = (
        torch.cat([vectors[name], vectors[name][:, -1:].expand(-1, repeats, -1, -1, -1)], dim=1)
        for name in ("in/videos", "in/conds")
    )  # (B, frames, 3, H, W)
    eps = {name: vectors[f"in/eps_{name}"].transpose(1, 2) for name in ("first", "last", "video", "cond")}
    batch = clip.shape[0]
    draws = GGIDraws(
        timesteps=vectors["in/timesteps"],
        alpha=vectors["in/alpha"].float().expand(batch),
        fresh_noise=vectors["in/fresh_noise"],
        sigma_normal=(vectors["in/log_sigma"] + 3) / 0.5,
        image_noise=vectors["in/image_noise"].transpose(1, 2),
        first_eps=eps["first"],
        last_eps=eps["last"],
        video_eps=eps["video"],
        cond_eps=eps["cond"],
        image_dropout=torch.zeros(batch),
        caption_dropout=torch.zeros(batch),
    )
    ends = noisy_end_images(clip, draws.sigma_normal, draws.image_noise)
    picked = resize_list(list(vectors["in/warped_noise_all_frames"].unbind(1)), header["latent_frames"])
    inputs = GGIInputs(
        first_moments=encode(vectors, ends[:, :1]),
        last_moments=encode(vectors, ends[:, 1:]),
        video_moments=encode(vectors, clip),
        cond_moments=encode(vectors, cond),
        warped_noise=torch.stack(picked, dim=1),
        prompt_embeds=vectors["in/prompt_embeds"],
    )
    constants = GGIConstants(
        alphas_cumprod(header["scheduler_config"]),
        rotary_for(transformer, draws.fresh_noise),
        vae_scaling_factor=header["vae_config"]["scaling_factor"],
    )
    return inputs, draws, constants


@golden.by_file(TRAINER, "train_step*.safetensors")
def test_train_step(vectors: Vectors, tmp_path: Path) -> None:
    """Mode full: the original's way, in float32."""
    header, rules = vectors.header, vectors.header["tolerance"]
    transformer = build_transformer(vectors)
    lora = read_lora_file(lora_path(vectors, tmp_path), transformer)
    assert (lora.rank, lora.alpha, lora.scale) == tuple(header["lora"][key] for key in ("rank", "alpha", "scale"))
    trained = set_up_training(transformer, "full", lora)
    inputs, draws, constants = step_of(vectors, transformer)
    result = ggi_loss(transformer, inputs, draws, constants)

    batch = result.batch
    for name in ("video_latents", "image_latents", "cond_latents", "noise"):
        check(name, getattr(batch, name), vectors[f"mid/{name}"], rules["latents"])
    check("rope", torch.stack(constants.rotary), torch.stack([vectors["mid/rope_cos"], vectors["mid/rope_sin"]]), 1e-5)
    together = model_input(batch.noisy, batch.image_latents, batch.cond_latents)
    check("noisy_latents", batch.noisy, vectors["out/noisy_latents"], rules["latents"])
    check("model_input", together, vectors["out/model_input"], rules["latents"])
    check("model_output", result.prediction, vectors["out/model_output"], rules["model_output"])
    x0 = velocity(result.prediction, batch.noisy, batch.timesteps, constants.alphas_cumprod)  # as in test_scheduler
    check("x0_pred", x0, vectors["out/x0_pred"], rules["model_output"])
    for name in ("loss_per_sample", "v_mse_per_sample"):
        torch.testing.assert_close(result.per_sample, vectors[f"out/{name}"], atol=0, rtol=rel(rules["loss"]))
    check("loss", result.loss, header["loss"], rules["loss"])

    result.loss.backward()
    grads = {name: transformer.get_parameter(name).grad for name in trained}
    assert sorted(grads) == sorted([*header["grad_norms"], *header["trainable_without_grad"]]), "what trains"
    for name, norm in header["grad_norms"].items():
        torch.testing.assert_close(grads[name].norm().item(), norm, atol=0, rtol=rel(rules["grads"]))
    for name, grad in vectors.under("grad/").items():
        check(name, grads[name], grad, rules["grads"])
    settings = header["optimizer"]
    parameters = [transformer.get_parameter(name) for name in trained]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
    for expected in (header["grad_norm_total"], header["clip_return"]):
        check("gradient norm", norm, expected, rules["grads"])
    options = {key: settings[key] for key in ("lr", "betas", "eps", "weight_decay")}
    torch.optim.AdamW(parameters, **options).step()
    for name, weight in vectors.under("after_step/").items():
        check(name, transformer.get_parameter(name), weight, rules["after_step"])


@torch.no_grad()
@pytest.mark.parametrize("mode", ["lora", "base_lora"])
@golden.by_file(TRAINER, "train_step*.safetensors")
def test_first_output_is_the_same_in_all_modes(vectors: Vectors, mode: str, tmp_path: Path) -> None:
    transformer = build_transformer(vectors)
    lora = read_lora_file(lora_path(vectors, tmp_path), transformer)
    set_up_training(transformer, mode, lora)
    result = ggi_loss(transformer, *step_of(vectors, transformer))
    check("model_output", result.prediction, vectors["out/model_output"], vectors.header["tolerance"]["model_output"])
    check("loss", result.loss, vectors.header["loss"], vectors.header["tolerance"]["loss"])


# Names and shapes of the released weights.


def released(name: str) -> dict[str, list[int]]:
    path = KEYS_DIR / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no list of keys {path}")
    return json.loads(path.read_text())


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in module.state_dict().items()}


def full_size(in_channels: int = 32) -> CogVideoXTransformer3DModel:
    """CogVideoX-5B-I2V's transformer without memory."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel(
            num_attention_heads=48,
            in_channels=in_channels,
            num_layers=42,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )


def test_transformer_keys() -> None:
    transformer = full_size()
    assert shapes_of(transformer) == released("ggi_cogvideox5b_i2v_transformer_in32")
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_479_680
    widen_patch_embed(transformer)
    assert shapes_of(transformer) == released("ggi_cogvideox5b_i2v_transformer_in48")
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_676_288
    assert transformer.config.in_channels == 48
    assert (transformer.config.sample_height * LATENT_PX, transformer.config.sample_width * LATENT_PX) == (480, 720)


def test_base_lora_and_checkpoint_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released file's header, without its 4 GB, is accepted, and makes the original's checkpoint."""
    keys = released("ggi_base_lora_file_r2048")
    path = tmp_path / "base_lora.safetensors"
    write_sparse(path, keys)
    transformer = widen_patch_embed(full_size())
    lora = read_lora_file(path, transformer)
    assert (lora.rank, lora.alpha, lora.dtype) == (2048, 2048.0, torch.bfloat16)

    monkeypatch.setattr(type(lora), "pair", lambda self, target, device: meta_pair(keys, target))
    install(transformer, lora, "default", torch.bfloat16)
    assert shapes_of(transformer) == released("ggi_checkpoint_transformer_in48_base_lora2048")


def meta_pair(keys: dict[str, list[int]], target: str) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = (torch.empty(keys[f"transformer.{target}.lora_{name}.weight"], device="meta") for name in "AB")
    return down, up


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A bfloat16 safetensors file of these shapes that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_vae_keys() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            layers_per_block=3,
            latent_channels=16,
        )
    assert shapes_of(vae) == released("ggi_cogvideox_vae")
