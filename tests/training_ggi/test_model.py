"""GGI's transformer, LoRAs, objective and results on tiny models: properties that need no recorded vectors."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from training_ggi.models import results
from training_ggi.models.base_lora import (
    LoraFile,
    fuse,
    lora_parameters,
    lora_targets,
    read_lora_file,
    set_up_training,
)
from training_ggi.models.objective import (
    GGIConstants,
    GGIDraws,
    GGIInputs,
    assemble,
    drop_captions,
    end_image_latents,
    ggi_loss,
    noisy_end_images,
    sample_posterior,
)
from training_ggi.models.results import export_upstream, load_result, load_upstream, save_result
from training_ggi.models.schedule import alphas_cumprod
from training_ggi.models.transformer import (
    blank_transformer,
    check_video_size,
    drop_position_table,
    load_transformer,
    model_input,
    predict_velocity,
    rotary_for,
    widen_patch_embed,
)

BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 4, 6  # of the latents
RANK = 4
Transformer = CogVideoXTransformer3DModel


def tiny_transformer(seed: int = 0, **changes: object) -> Transformer:
    """CogVideoX-I2V's structure in float32, for 9 frames of 32x48 px."""
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 32,
        "time_embed_dim": 16,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": WIDTH,
        "sample_height": HEIGHT,
        "sample_frames": 9,
        "max_text_seq_length": 7,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    }
    return Transformer(**{**config, **changes}).float().eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stock base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_transformer().save_pretrained(folder / "transformer")
    return folder


def write_lora(path: Path, change: Callable[[dict], None] = lambda tensors: None, metadata: dict | None = None) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for target in lora_targets(tiny_transformer()):
        for name, shape in (("A", (RANK, 32)), ("B", (32, RANK))):
            tensors[f"transformer.{target}.lora_{name}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    return path


@pytest.fixture(scope="module")
def lora_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "base_lora.safetensors")


def loaded(base: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_transformer(base, torch_dtype=dtype)


def trainable(base: Path, lora_path: Path, mode: str, dtype: torch.dtype = torch.float32) -> Transformer:
    transformer = loaded(base, dtype)
    torch.manual_seed(2)
    set_up_training(transformer, mode, read_lora_file(lora_path, transformer), rank=3, alpha=6)
    return transformer


def trained(base: Path, lora_path: Path, mode: str) -> Transformer:
    """As after training: everything that trains has moved."""
    transformer = trainable(base, lora_path, mode)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def latents(seed: int, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, FRAMES, channels, HEIGHT, WIDTH, generator=generator)


@torch.no_grad()
def output(transformer: Transformer, cond_seed: int = 12) -> torch.Tensor:
    inputs = model_input(latents(10), latents(11), latents(cond_seed))
    prompt = torch.randn(BATCH, 7, 24, generator=torch.Generator().manual_seed(13))
    timesteps = torch.tensor([3, 700])
    return predict_velocity(transformer, inputs, prompt, timesteps, rotary_for(transformer, inputs))


def step_arguments(transformer: Transformer) -> tuple[GGIInputs, GGIDraws, GGIConstants]:
    generator = torch.Generator().manual_seed(20)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (16, HEIGHT, WIDTH)
    inputs = GGIInputs(
        first_moments=normal(BATCH, 32, 1, HEIGHT, WIDTH),
        last_moments=normal(BATCH, 32, 1, HEIGHT, WIDTH),
        video_moments=normal(BATCH, 32, FRAMES, HEIGHT, WIDTH),
        cond_moments=normal(BATCH, 32, FRAMES, HEIGHT, WIDTH),
        warped_noise=normal(BATCH, FRAMES, *size),
        prompt_embeds=normal(BATCH, 7, 24),
        empty_prompt_embeds=normal(1, 7, 24),
    )
    draws = GGIDraws(
        timesteps=torch.tensor([0, 999]),
        alpha=torch.tensor([0.0, 1.0]),
        fresh_noise=normal(BATCH, FRAMES, *size),
        sigma_normal=normal(BATCH),
        image_noise=normal(BATCH, 2, 3, 8 * HEIGHT, 8 * WIDTH),
        first_eps=normal(BATCH, 1, *size),
        last_eps=normal(BATCH, 1, *size),
        video_eps=normal(BATCH, FRAMES, *size),
        cond_eps=normal(BATCH, FRAMES, *size),
        image_dropout=torch.tensor([0.01, 0.2]),
        caption_dropout=torch.tensor([0.3, 0.02]),
    )
    return inputs, draws, GGIConstants(alphas_cumprod(), rotary_for(transformer, draws.fresh_noise))


# Widening and loading.


def test_widening_leaves_the_output_as_it_was(base: Path) -> None:
    narrow = tiny_transformer()
    before = torch.get_rng_state()
    wide = widen_patch_embed(tiny_transformer())
    assert torch.equal(torch.get_rng_state(), before), "widening drew random numbers"
    assert wide.config.in_channels == 48 and wide.patch_embed.proj.in_channels == 48, "not widened"
    torch.testing.assert_close(output(wide), output(wide, cond_seed=99), atol=0, rtol=0)
    inputs = torch.cat([latents(10), latents(11)], dim=2)
    prompt = torch.randn(BATCH, 7, 24, generator=torch.Generator().manual_seed(13))
    with torch.no_grad():
        plain = predict_velocity(narrow, inputs, prompt, torch.tensor([3, 700]), rotary_for(narrow, inputs))
    torch.testing.assert_close(output(wide), plain)

    ggi_loss(wide.requires_grad_(), *step_arguments(wide)).loss.backward()
    assert (wide.patch_embed.proj.weight.grad[:, 32:].abs().amax((0, 2, 3)) > 0).all(), "a new channel has no gradient"


def test_a_widened_folder_reloads(base: Path, tmp_path: Path) -> None:
    wide = loaded(base)
    with torch.no_grad():
        wide.patch_embed.proj.weight[:, 32:] = 0.5
    wide.save_pretrained(tmp_path)
    again = load_transformer(tmp_path, None, torch_dtype=torch.float32)
    torch.testing.assert_close(output(again), output(wide), atol=0, rtol=0)
    stock = Transformer.from_pretrained(tmp_path)
    torch.testing.assert_close(output(stock), output(wide), atol=0, rtol=0)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 16 channels; expected 32 .* or 48"):
        widen_patch_embed(tiny_transformer(in_channels=16))
    with pytest.raises(ValueError, match="patch_size_t is 1: this is CogVideoX 1.5"):
        widen_patch_embed(tiny_transformer(patch_size_t=1))


def test_loading_is_strict(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder /no/where of the base model does not exist"):
        load_transformer("/no/where")
    with pytest.raises(FileNotFoundError, match="no transformer at .*/transformer: .* CogVideoX-5b-I2V"):
        load_transformer(tmp_path)
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["proj_out.bais"] = weights.pop("proj_out.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((base / "transformer" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"1 missing: proj_out.bias; 1 unexpected: proj_out.bais"):
        load_transformer(tmp_path, None)


def test_a_blank_model_has_the_shapes_of_the_loaded_one(base: Path, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    config = (base / "transformer" / "config.json").read_text()
    (tmp_path / "transformer" / "config.json").write_text(config)  # and no weights
    for without_table in (False, True):
        options = {"ignore_learned_positional_embeddings": without_table}
        blank, full = blank_transformer(tmp_path, **options), load_transformer(base, **options)
        assert blank.device == torch.device("meta")
        assert {**blank.config, "_name_or_path": ""} == {**full.config, "_name_or_path": ""}
        shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (blank, full)]
        assert shapes[0] == shapes[1]
    with pytest.raises(FileNotFoundError, match="the folder /no/where of the base model does not exist"):
        blank_transformer("/no/where")


def test_video_size() -> None:
    transformer = tiny_transformer()
    assert check_video_size(transformer, 9, 32, 48) == (3, 4, 6)
    with pytest.raises(ValueError, match="for 9 frames of 32x48 px .*, not 9 of 48x32: take that size, or set ignore_"):
        check_video_size(transformer, 9, 48, 32)
    with pytest.raises(ValueError, match="for 9 frames .* not 13 of 32x48"):
        check_video_size(transformer, 13, 32, 48)
    with pytest.raises(ValueError, match="height=40 must be a positive multiple of 16; max_num_frames=46 must be 4k"):
        check_video_size(transformer, 46, 40, 48)


def test_without_the_position_table_any_size_goes(tmp_path: Path) -> None:
    transformer = widen_patch_embed(tiny_transformer(sample_width=10))
    with pytest.raises(ValueError, match="not possible to generate videos at a different resolution"):
        output(transformer)
    drop_position_table(transformer)
    assert check_video_size(transformer, 13, 64, 16) == (4, 8, 2)
    transformer.save_pretrained(tmp_path)
    torch.testing.assert_close(output(Transformer.from_pretrained(tmp_path)), output(transformer), atol=0, rtol=0)


# LoRA files.


def test_a_good_lora_file(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformer = loaded(base)
    lora = read_lora_file(write_lora(tmp_path / "lora.safetensors"), transformer)
    assert lora == LoraFile(tmp_path / "lora.safetensors", RANK, float(RANK), torch.float32)

    def alphas(tensors: dict) -> None:
        tensors.update({f"transformer.{target}.alpha": torch.tensor(2.0) for target in lora_targets(transformer)})

    in_entries = read_lora_file(write_lora(tmp_path / "entries.safetensors", alphas), transformer)
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 2})}
    in_header = read_lora_file(write_lora(tmp_path / "header.safetensors", metadata=header), transformer)
    assert in_entries.scale == in_header.scale == 0.5, "alpha 2 over rank 4"
    target = lora_targets(transformer)[0]
    torch.testing.assert_close(in_entries.delta(target), 0.5 * lora.delta(target))

    with caplog.at_level(logging.INFO):
        set_up_training(loaded(base, torch.bfloat16), "full", lora)
    assert "converted from torch.float32 to torch.bfloat16" in caplog.text
    set_up_training(loaded(base), "lora", in_entries)
    assert "its alpha, 2, scales the base LoRA by 0.5" in caplog.text


KEY = "transformer.transformer_blocks.1.attn1.to_k.lora_"


def rename(tensors: dict) -> None:
    tensors[f"{KEY}C.weight"] = tensors.pop(f"{KEY}B.weight")


def lose_prefix(tensors: dict) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)


def one_rank(tensors: dict) -> None:
    tensors[f"{KEY}A.weight"] = tensors[f"{KEY}A.weight"][:2].clone()


def other_width(tensors: dict) -> None:
    for key in list(tensors):
        if "lora_A" in key:
            tensors[key] = torch.zeros(RANK, 48)


def one_dtype(tensors: dict) -> None:
    tensors[f"{KEY}A.weight"] = tensors[f"{KEY}A.weight"].bfloat16()


def all_integers(tensors: dict) -> None:
    for key in tensors:
        tensors[key] = tensors[key].to(torch.int8)


def one_alpha(tensors: dict) -> None:
    tensors["transformer.transformer_blocks.0.attn1.to_q.alpha"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, rf"8 attention projections; 1 missing: {KEY}B.weight; 1 unexpected: {KEY}C.weight$"),
        (lose_prefix, r"16 missing: .*, \.\.\.; 16 unexpected: .*, \.\.\.$"),
        (one_rank, rf"at rank 4, .* 1 of another shape: {KEY}A.weight \(2, 32\) instead of \(4, 32\)"),
        (other_width, r"8 of another shape: .*\(4, 48\) instead of \(4, 32\)"),
        (one_dtype, "holds BF16, F32: expected one of F32, F16, BF16 throughout"),
        (all_integers, "holds I8: expected one of"),
        (one_alpha, r"holds 1 alpha entries of values \[1.0\] for 8 projections"),
    ],
)
def test_a_wrong_lora_file_is_refused(base: Path, tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    path = write_lora(tmp_path / "lora.safetensors", change)
    with pytest.raises(ValueError, match=message):
        read_lora_file(path, loaded(base))


def test_other_files_are_refused(base: Path, tmp_path: Path) -> None:
    transformer = loaded(base)
    with pytest.raises(FileNotFoundError, match="does not exist; the base LoRA is Go-with-the-Flow's"):
        read_lora_file(tmp_path / "none.safetensors", transformer)
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        read_lora_file(tmp_path / "page.safetensors", transformer)
    header = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})}
    with pytest.raises(ValueError, match="sets use_rslora in its header: only plain LoRAs"):
        read_lora_file(write_lora(tmp_path / "rs.safetensors", metadata=header), transformer)

    def empty(tensors: dict) -> None:
        tensors.update({key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "lora_B" in key})

    zero = read_lora_file(write_lora(tmp_path / "zero.safetensors", empty), transformer)
    with pytest.raises(ValueError, match="its largest change of a weight is 0.0: the file is empty"):
        fuse(transformer, zero)
    with pytest.raises(ValueError, match="its largest entry of B is 0.0: the file is empty"):
        set_up_training(transformer, "full", zero)


def test_fusing_rounds_once(base: Path, lora_path: Path) -> None:
    """Into bfloat16 weights too, W + B A is computed in float32."""
    exact, rounded = loaded(base), loaded(base, torch.bfloat16)
    lora = read_lora_file(lora_path, exact)
    start = rounded.transformer_blocks[0].attn1.to_q.weight.float()
    fuse(rounded, lora)
    expected = (start + lora.delta("transformer_blocks.0.attn1.to_q")).bfloat16()
    assert torch.equal(rounded.transformer_blocks[0].attn1.to_q.weight, expected)


# What trains.


def test_what_trains(base: Path, lora_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    projection = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    for mode, adapter in (("lora", "ggi"), ("base_lora", "default")):
        transformer = loaded(base, torch.bfloat16)
        names = set_up_training(transformer, mode, read_lora_file(lora_path, transformer), rank=3, alpha=6)
        others = set(names) - projection
        assert len(names) == 18 and all(f".{adapter}.weight" in name for name in others), f"{mode}: {names}"
        for name, parameter in transformer.named_parameters():
            assert parameter.requires_grad == (name in names), f"{mode}: {name}"
            assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16), f"{mode}: {name}"
    assert not caplog.records, caplog.text

    transformer = loaded(base, torch.bfloat16)
    names = set_up_training(transformer, "full", read_lora_file(lora_path, transformer))
    frozen = {name for name, _ in transformer.named_parameters()} - set(names)
    assert len(frozen) == 16 and all(".default.weight" in name for name in frozen), frozen
    assert "trains torch.bfloat16 weights without a float32 copy" in caplog.text


def test_a_frozen_lora_in_half_precision_changes_nothing_under_autocast(base: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.bfloat16() for key, tensor in tensors.items()})

    lora_path, outputs = write_lora(tmp_path / "lora.safetensors", halve), []
    for dtype in (None, torch.bfloat16):
        transformer = loaded(base)
        set_up_training(transformer, "full", read_lora_file(lora_path, transformer), frozen_dtype=dtype)
        kinds = {parameter.dtype for parameter in transformer.parameters() if not parameter.requires_grad}
        assert kinds == {dtype or torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(output(transformer))
    assert torch.equal(*outputs)


def test_wrong_set_up_is_refused(base: Path, lora_path: Path) -> None:
    lora = read_lora_file(lora_path, tiny_transformer())
    with pytest.raises(ValueError, match="train_mode 'all' is unknown: use lora, full, base_lora"):
        set_up_training(loaded(base), "all", lora)
    with pytest.raises(ValueError, match="takes 32 channels, not 48: widen it"):
        set_up_training(tiny_transformer(), "lora", lora)
    with pytest.raises(ValueError, match="rank=0 and lora_alpha=64 must be above 0"):
        set_up_training(loaded(base), "lora", lora, rank=0)


@pytest.mark.parametrize("mode", ["lora", "full", "base_lora"])
def test_checkpointing_changes_no_gradient(base: Path, lora_path: Path, mode: str) -> None:
    transformer = trained(base, lora_path, mode).train()
    gradients = []
    for enable in (transformer.disable_gradient_checkpointing, transformer.enable_gradient_checkpointing):
        enable()
        transformer.zero_grad()
        ggi_loss(transformer, *step_arguments(transformer)).loss.backward()
        gradients.append({n: p.grad for n, p in transformer.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_training_beside_a_bfloat16_base(base: Path, lora_path: Path) -> None:
    """Under autocast: gradients in float32 near the exact ones, and every parameter moves by a small update."""
    exact, mixed = trained(base, lora_path, "lora"), trainable(base, lora_path, "lora", torch.bfloat16)
    with torch.no_grad():
        for ours, theirs in zip(mixed.parameters(), exact.parameters(), strict=True):
            ours.copy_(theirs)
    exact_loss = ggi_loss(exact, *step_arguments(exact)).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed_loss = ggi_loss(mixed, *step_arguments(mixed)).loss
    assert mixed_loss.dtype == torch.float32
    torch.testing.assert_close(mixed_loss, exact_loss, atol=0, rtol=0.01)
    exact_loss.backward()
    mixed_loss.backward()
    parameters = [p for p in mixed.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for ours, theirs in zip(parameters, (p for p in exact.parameters() if p.requires_grad), strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.99
    torch.optim.AdamW(parameters, lr=5e-5).step()
    moved = torch.cat([(new != old).flatten() for new, old in zip(parameters, before, strict=True)])
    assert moved.float().mean() > 0.999


# Results: the same output in all forms.


@pytest.mark.parametrize("mode", ["lora", "full", "base_lora"])
def test_all_forms_have_one_output(base: Path, lora_path: Path, mode: str, tmp_path: Path) -> None:
    """Adapter form, fused form, exported and reloaded, small folder and reloaded."""
    transformer = trained(base, lora_path, mode)
    lora = read_lora_file(lora_path, transformer)
    expected = output(transformer)
    assert (expected - output(loaded(base))).abs().max() > 0.1, "nothing was trained"
    export_upstream(transformer, tmp_path / "export", base=base, base_lora=lora, dtype=torch.float32)
    for fuse_lora in (False, True):
        again = load_upstream(tmp_path / "export", torch_dtype=torch.float32, fuse_lora=fuse_lora)
        torch.testing.assert_close(output(again), expected, atol=1e-5, rtol=0)
    again = load_upstream(tmp_path / "export", torch_dtype=torch.float32)
    parts = lora_parameters(again, "default")
    if mode != "base_lora":
        for target in lora_targets(again):
            down, up = lora.pair(target)
            assert torch.equal(parts[f"{target}.lora_A.weight"], down), f"{target}: A of the base LoRA has changed"
            assert torch.equal(parts[f"{target}.lora_B.weight"], up), f"{target}: B of the base LoRA has changed"
    if mode == "full":
        with pytest.raises(ValueError, match="train_mode full changes every weight, which is no LoRA"):
            save_result(transformer, tmp_path / "small", mode)
        return
    save_result(transformer, tmp_path / "small", mode)
    small = loaded(base)
    assert load_result(small, tmp_path / "small", lora) == mode
    torch.testing.assert_close(output(small), expected, atol=1e-5, rtol=0)
    export_upstream(small, tmp_path / "again", base=base, base_lora=lora, dtype=torch.float32)
    again = load_upstream(tmp_path / "again", torch_dtype=torch.float32)
    torch.testing.assert_close(output(again), expected, atol=1e-5, rtol=0)


def test_adapter_and_fused_form_of_the_base_lora(base: Path, lora_path: Path) -> None:
    outputs = [output(trainable(base, lora_path, mode)) for mode in ("lora", "full", "base_lora")]
    assert (outputs[0] - output(loaded(base))).abs().max() > 0.01, "the base LoRA changes nothing"
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=0)


def test_a_scaled_base_lora_is_exported_at_scale_one(base: Path, tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})}
    path = write_lora(tmp_path / "half.safetensors", metadata=header)
    for mode in ("lora", "full", "base_lora"):
        transformer = trained(base, path, mode)
        lora = read_lora_file(path, transformer)
        export_upstream(transformer, tmp_path / mode, base=base, base_lora=lora, dtype=torch.float32)
        again = load_upstream(tmp_path / mode, torch_dtype=torch.float32)
        torch.testing.assert_close(output(again), output(transformer), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["lora", "base_lora"])
def test_stock_pipeline_loads_the_lora(base: Path, lora_path: Path, mode: str, tmp_path: Path) -> None:
    """With the widened projection put in, diffusers' own loading gives our output; alpha comes from the header."""
    transformer = trained(base, lora_path, mode)
    save_result(transformer, tmp_path, mode)
    stock = widen_patch_embed(Transformer.from_pretrained(base, subfolder="transformer"))
    stock.load_state_dict(load_file(tmp_path / "patch_embed_proj.safetensors"), strict=False)
    pipeline = CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=stock, scheduler=CogVideoXDPMScheduler()
    )
    adapters = ["ggi"]
    if mode == "lora":
        pipeline.load_lora_weights(lora_path.parent, weight_name=lora_path.name, adapter_name="base")
        adapters.append("base")
    pipeline.load_lora_weights(tmp_path, adapter_name="ggi")
    pipeline.set_adapters(adapters)
    torch.testing.assert_close(output(pipeline.transformer), output(transformer), atol=1e-5, rtol=0)
    assert pipeline.transformer.peft_config["ggi"].lora_alpha == {"lora": 6, "base_lora": RANK}[mode]


def test_the_base_is_read_from_the_runs_cache_and_variant(
    base: Path, lora_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, key = tmp_path / "hub" / "transformer", "transformer_blocks.0.attn1.to_q"
    folder.mkdir(parents=True)
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    other = {**weights, f"{key}.weight": weights[f"{key}.weight"] + 1}
    save_file(other, folder / "diffusion_pytorch_model.half.safetensors")
    asked: list[object] = []
    monkeypatch.setattr(results, "snapshot_download", lambda *names, **options: asked.append(options) or folder.parent)
    transformer = trainable(base, lora_path, "lora")
    lora = read_lora_file(lora_path, transformer)
    hub = {"revision": "r", "cache_dir": "c", "variant": "half"}
    export_upstream(transformer, tmp_path / "out", base="someone/model", **hub, base_lora=lora, dtype=torch.float32)
    assert asked == [{"revision": "r", "cache_dir": "c", "allow_patterns": "transformer/*"}]
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written[f"{key}.base_layer.weight"], other[f"{key}.weight"])


def test_shards_have_an_index(base: Path, lora_path: Path, tmp_path: Path) -> None:
    transformer = trained(base, lora_path, "lora")
    lora = read_lora_file(lora_path, transformer)
    export_upstream(transformer, tmp_path, base=base, base_lora=lora, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert paths[0].name == f"diffusion_pytorch_model-00001-of-{len(paths):05d}.safetensors" and len(paths) > 2
    stored = {key: (path.name, tensor) for path in paths for key, tensor in load_file(path).items()}
    assert index["weight_map"] == {key: name for key, (name, _) in stored.items()}
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for _, tensor in stored.values())
    assert all(sum(2 * tensor.numel() for tensor in load_file(path).values()) <= 20_000 for path in paths)
    assert {tensor.dtype for _, tensor in stored.values()} == {torch.bfloat16}
    assert stored.keys() == trainable(base, lora_path, "full").state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["in_channels"] == 48
    assert output(load_upstream(tmp_path)).isfinite().all()


def test_incomplete_results_are_refused(base: Path, lora_path: Path, tmp_path: Path) -> None:
    transformer = trained(base, lora_path, "lora")
    lora = read_lora_file(lora_path, transformer)
    save_result(transformer, tmp_path / "small", "lora")
    with pytest.raises(ValueError, match="was trained on top of the base LoRA: give that file too"):
        load_result(loaded(base), tmp_path / "small")
    with pytest.raises(ValueError, match=r"1 of another shape: patch_embed.proj.weight"):
        load_result(tiny_transformer(), tmp_path / "small", lora)
    (tmp_path / "small" / "patch_embed_proj.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="it lacks patch_embed_proj.safetensors"):
        load_result(loaded(base), tmp_path / "small", lora)

    with pytest.raises(ValueError, match="needs the base model and the base LoRA: give both"):
        export_upstream(transformer, tmp_path / "none")
    with pytest.raises(ValueError, match="the transformer has no LoRA"):
        export_upstream(loaded(base), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither a folder nor a model id"):
        export_upstream(transformer, tmp_path / "none", base="nobody/nothing", base_lora=lora)
    with pytest.raises(ValueError, match="it is no checkpoint of the original's form"):
        load_upstream(base / "transformer")
    with pytest.raises(FileNotFoundError, match="holds no safetensors weights"):
        load_upstream(tmp_path / "none")

    export_upstream(trained(base, lora_path, "full"), tmp_path / "export")
    path = tmp_path / "export" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["transformer_blocks.1.attn1.to_v.lora_B.default.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="1 missing: transformer_blocks.1.attn1.to_v.lora_B.default.weight"):
        load_upstream(tmp_path / "export")


def test_small_result_keeps_its_precision(base: Path, lora_path: Path, tmp_path: Path) -> None:
    save_result(trainable(base, lora_path, "lora", torch.bfloat16), tmp_path, "lora")
    assert {path.name for path in tmp_path.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "patch_embed_proj.safetensors",
    }
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(key.startswith("transformer.transformer_blocks.") for key in file.keys())
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}
    bfloat16 = loaded(base, torch.bfloat16)
    load_result(bfloat16, tmp_path, read_lora_file(lora_path, bfloat16))
    assert {parameter.dtype for parameter in bfloat16.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in bfloat16.parameters())


# The objective.


def test_v_mse_is_the_weighted_error_of_x0() -> None:
    """Value and gradient of mean((x0_hat - x0)^2) / (1 - alphas_cumprod), in double precision."""
    generator = torch.Generator().manual_seed(4)
    x0, noise, v = (torch.randn(8, 3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    timesteps = torch.tensor([0, 1, 2, 10, 100, 500, 998, 999])
    alphas = alphas_cumprod()[timesteps].reshape(-1, 1, 1, 1, 1)
    signal, sigma = alphas.sqrt(), (1 - alphas).sqrt()
    weighted = (signal * (signal * x0 + sigma * noise) - sigma * v - x0).square() / (1 - alphas)
    plain = (v - (signal * noise - sigma * x0)).square()
    gradients = [torch.autograd.grad(each.mean(), v)[0] for each in (weighted, plain)]
    torch.testing.assert_close(weighted.flatten(1).mean(1), plain.flatten(1).mean(1), atol=0, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-5)


def test_schedule() -> None:
    alphas = alphas_cumprod()
    assert alphas.dtype == torch.float64 and alphas[-1] == 0 and (alphas.diff() < 0).all()
    assert round(alphas[0].item(), 5) == 0.99915
    stock = CogVideoXDPMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=3.0, prediction_type="v_prediction")
    torch.testing.assert_close(alphas_cumprod(stock.config), stock.alphas_cumprod.double(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="prediction_type is 'epsilon': only 'v_prediction'"):
        alphas_cumprod({"prediction_type": "epsilon"})


def test_end_images() -> None:
    clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(1, 4, 3, 2, 2)
    noise = torch.ones(1, 2, 3, 2, 2)
    noisy = noisy_end_images(clip, torch.tensor([2.0]), noise)
    torch.testing.assert_close(noisy[0, :, 0, 0, 0], torch.tensor([0.0, 3.0]) + torch.exp(torch.tensor(-2.0)))
    first, last = latents(1)[:, :1], latents(2)[:, :1]
    ends = end_image_latents(first, last, 5)
    assert torch.equal(ends[:, :1], first) and torch.equal(ends[:, 4:], last) and not ends[:, 1:4].any()
    with pytest.raises(ValueError, match="1 latent frame has no room for a first and a last image"):
        end_image_latents(first, last, 1)


def test_posterior() -> None:
    moments = torch.tensor([2.0, 100.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1)
    drawn = sample_posterior(moments, torch.tensor([0.0, 1.0, -1.0]).reshape(1, 3, 1, 1, 1), 0.5)
    std = torch.exp(torch.tensor(10.0))  # the log variance is clamped to 20
    torch.testing.assert_close(drawn.flatten(), 0.5 * (2 + std * torch.tensor([0.0, 1.0, -1.0])))
    with pytest.raises(ValueError, match=r"moments \(1, 2, 3, 1, 1\) .* do not fit a draw of \(1, 1, 3, 1, 1\)"):
        sample_posterior(moments, torch.zeros(1, 1, 3, 1, 1), 0.5)


def test_dropping_is_per_sample(base: Path) -> None:
    inputs, draws, constants = step_arguments(loaded(base))
    whole = assemble(inputs, draws, constants)
    assert torch.equal(whole.noise, torch.stack([inputs.warped_noise[0], draws.fresh_noise[1]])), "alpha 0, then 1"
    assert torch.equal(whole.noisy[1], whole.noise[1]), "at the last timestep there is noise alone"
    assert torch.equal(whole.prompt_embeds, inputs.prompt_embeds)
    dropped = assemble(inputs, draws, replace(constants, image_dropout_prob=0.05, caption_dropout_prob=0.1))
    assert not dropped.image_latents[0].any() and torch.equal(dropped.image_latents[1], whole.image_latents[1])
    assert torch.equal(dropped.prompt_embeds[0], inputs.prompt_embeds[0])
    assert torch.equal(dropped.prompt_embeds[1], inputs.empty_prompt_embeds[0])
    assert torch.equal(dropped.target, whole.target)
    with pytest.raises(ValueError, match="caption_dropout_prob=0.1 needs the embedding of the empty caption"):
        drop_captions(inputs.prompt_embeds, None, draws.caption_dropout, 0.1)


def test_loss_is_the_mean_of_samples(base: Path, lora_path: Path) -> None:
    transformer = trained(base, lora_path, "lora")
    inputs, draws, constants = step_arguments(transformer)
    with torch.no_grad():
        result = ggi_loss(transformer, inputs, draws, constants)
    assert result.loss == result.per_sample.mean() and torch.equal(result.timesteps, draws.timesteps)
    errors = (result.prediction - result.batch.target).square().flatten(1).mean(1)
    torch.testing.assert_close(result.per_sample, errors, atol=0, rtol=0)
    with pytest.raises(ValueError, match="do not fit a draw of"):
        ggi_loss(transformer, inputs, replace(draws, video_eps=draws.video_eps[:, :2]), constants)
    with pytest.raises(ValueError, match=r"must share one shape \(B, F, C, h, w\)"):
        model_input(latents(0), latents(1)[:, :2], latents(2))
