"""Rows, attention patterns, the multi-view UNet and its start weights."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from mvdiffusion.models.attention import MVAttention, MVTransformerBlock
from mvdiffusion.models.initialise import from_pretrained_2d, load_unet, trainable_parameters
from mvdiffusion.models.layout import DOMAINS, from_rows, repeat_for_rows, to_rows
from mvdiffusion.models.unet_mv2d import UNetMV2DConditionModel, supported_config

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
}
TINY: dict[str, Any] = {
    **SIZES,
    "down_block_types": ("CrossAttnDownBlockMV2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlockMV2D"),
    "sample_size": 4,
}
OBJECTS, VIEWS = 2, 3
ROWS = 2 * OBJECTS * VIEWS


def tiny(**config: Any) -> UNetMV2DConditionModel:
    """A small network whose joint layers do something."""
    torch.manual_seed(0)
    unet = UNetMV2DConditionModel(**{**TINY, "num_views": VIEWS, "cd_attention_mid": True, **config}).eval()
    for name, parameter in unet.named_parameters():
        if "joint" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return unet


def inputs(rows: int = ROWS, size: int = 4, tokens: int = 1) -> list[torch.Tensor]:
    """Sample, timesteps, condition, labels; each row has its own."""
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, 8, size, size), (rows, tokens, 6), (rows, 10)
    sample, context, labels = (torch.randn(shape, generator=generator) for shape in shapes)
    return [sample, torch.randint(1000, (rows,), generator=generator), context, labels]


def check_permuted(unet: UNetMV2DConditionModel, permute: Callable[[torch.Tensor], torch.Tensor], equal: bool) -> None:
    with torch.no_grad():
        expected = permute(unet(*inputs()).sample)
        actual = unet(*map(permute, inputs())).sample
    assert torch.allclose(actual, expected, atol=2e-5) == equal


# Rows.


def test_rows_are_domain_major() -> None:
    numbers = torch.arange(ROWS).view(2, OBJECTS, VIEWS)
    assert DOMAINS == ("normal", "colour")
    rows = to_rows(numbers[0], numbers[1])
    assert rows.tolist() == list(range(ROWS))
    halves = from_rows(rows, VIEWS)
    assert torch.equal(halves["normal"], numbers[0])
    assert torch.equal(halves["colour"], numbers[1])
    assert repeat_for_rows(torch.tensor([5, 7]), VIEWS).tolist() == [5, 5, 5, 7, 7, 7] * 2
    assert repeat_for_rows(torch.tensor([5, 7]), 2, num_domains=1).tolist() == [5, 5, 7, 7]


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 rows are no multiple of 2 domains x num_views=3"):
        from_rows(torch.zeros(10), 3)
    with pytest.raises(ValueError, match=r"normal \(1, 2\) and colour \(1, 3\) must have one shape"):
        to_rows(torch.zeros(1, 2), torch.zeros(1, 3))


# Attention patterns, each against a mask over all tokens of the batch.


def visible(pattern: str, height: int, width: int) -> torch.Tensor:
    """How often a key is in a query's sight, (N*L, N*L), by the definition of the pattern."""
    grid = torch.cartesian_prod(*map(torch.arange, (2, OBJECTS, VIEWS, height, width)))  # (N*L, 5)
    domain, obj, view, line, _ = (grid[:, None] == grid[None]).unbind(-1)  # (N*L, N*L) each
    own = domain & obj & view
    first = domain & obj & (grid[None, :, 2] == 0)
    counts = {
        "off": own,
        "dense": domain & obj,
        "sparse": own.int() + first.int(),
        "row_wise": domain & obj & line,
        "joint": obj & view,
    }
    return counts[pattern].float()


@pytest.mark.parametrize("pattern", ["off", "dense", "sparse", "row_wise", "joint"])
@torch.no_grad()
def test_pattern(pattern: Any) -> None:
    torch.manual_seed(0)
    height, width, dim = 3, 2, 8
    attention = MVAttention(dim, 2, 4, pattern=pattern, num_views=VIEWS)
    x = torch.randn(ROWS, height * width, dim)
    q, k, v = (layer(x).reshape(-1, 2, 4).transpose(0, 1) for layer in (attention.to_q, attention.to_k, attention.to_v))
    weights = (q @ k.mT / 2).exp() * visible(pattern, height, width)  # (heads, N*L, N*L)
    expected = (weights / weights.sum(-1, keepdim=True)) @ v  # (heads, N*L, d)
    expected = attention.to_out(expected.transpose(0, 1).reshape(x.shape))
    torch.testing.assert_close(attention(x, height), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_one_token_is_ordinary_cross_attention() -> None:
    torch.manual_seed(0)
    block = MVTransformerBlock(8, 2, 4, cross_attention_dim=6)
    x, token = torch.randn(2, 5, 8), torch.randn(2, 1, 6)
    # The same token twice changes no attention, but takes the ordinary way.
    torch.testing.assert_close(block(x, token), block(x, token.expand(2, 2, 6)), atol=1e-6, rtol=1e-5)


# The network.


def test_swapping_domains_swaps_outputs() -> None:
    check_permuted(tiny(cd_attention_last=True), lambda x: x.roll(ROWS // 2, 0), equal=True)


def test_permuting_objects_permutes_outputs() -> None:
    order = torch.tensor([1, 0])
    check_permuted(tiny(), lambda x: x.unflatten(0, (2, OBJECTS, VIEWS))[:, order].flatten(0, 2), equal=True)


@pytest.mark.parametrize(("config", "equal"), [({}, True), ({"sparse_mv_attention": True}, False)])
def test_permuting_views_permutes_outputs_unless_sparse(config: dict[str, Any], equal: bool) -> None:
    order = torch.tensor([2, 0, 1])
    check_permuted(tiny(**config), lambda x: x.unflatten(0, (2, OBJECTS, VIEWS))[:, :, order].flatten(0, 2), equal)


@torch.no_grad()
def test_objects_do_not_see_each_other() -> None:
    unet, (sample, *conditions) = tiny(), inputs()
    other = sample.clone()
    other.unflatten(0, (2, OBJECTS, VIEWS))[:, 0] += 1
    kept, changed = (
        unet(x, *conditions).sample.unflatten(0, (2, OBJECTS, VIEWS)).transpose(0, 1) for x in (sample, other)
    )
    torch.testing.assert_close(changed[1], kept[1], atol=1e-6, rtol=1e-5)
    assert (changed[0] - kept[0]).abs().min() > 0


@torch.no_grad()
def test_new_joint_layers_add_nothing() -> None:
    stage_1 = tiny(cd_attention_mid=False)
    stage_2 = UNetMV2DConditionModel(**TINY, num_views=VIEWS, cd_attention_mid=True, cd_attention_last=True).eval()
    stage_2.load_state_dict(stage_1.state_dict(), strict=False)
    assert torch.equal(stage_2(*inputs()).sample, stage_1(*inputs()).sample)


@pytest.mark.parametrize("size", [5, 7, 8])
@torch.no_grad()
def test_any_size_and_one_timestep(size: int) -> None:
    sample, _, context, labels = inputs(size=size)
    unet = tiny()
    output = unet(sample, 7, context, labels, return_dict=False)[0]
    assert output.shape == (ROWS, 4, size, size)
    assert torch.equal(output, unet(sample, torch.full((ROWS,), 7), context, labels).sample)


def test_row_wise_is_set_by_the_config() -> None:
    unet = tiny(row_wise_mv_attention=True)
    patterns = {module.pattern for name, module in unet.named_modules() if name.endswith("attn1")}
    assert patterns == {"row_wise"}
    assert unet(*inputs()).sample.isfinite().all()


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        ({}, 9, r"9 rows do not divide into objects of num_views=3 views, in 2 domains .*: give a multiple of 6 rows"),
        ({"cd_attention_mid": False}, 7, r"7 rows do not divide into objects of num_views=3 views: .* multiple of 3"),
    ],
)
def test_rows_must_divide(config: dict[str, Any], rows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**config)(*inputs(rows))


def test_shapes_must_fit() -> None:
    unet, (sample, timestep, context, labels) = tiny(), inputs()
    with pytest.raises(ValueError, match=r"sample is \(12, 4, 4, 4\): expected \(rows, 8, height, width\)"):
        unet(sample[:, :4], timestep, context, labels)
    with pytest.raises(ValueError, match=r"encoder_hidden_states is \(12, 6\): expected \(12, tokens, 6\)"):
        unet(sample, timestep, context[:, 0], labels)
    with pytest.raises(ValueError, match=r"class_labels is None: expected \(12, 10\)"):
        unet(sample, timestep, context)
    with pytest.raises(ValueError, match=r"class_labels is \(12, 5\): expected \(12, 10\)"):
        unet(sample, timestep, context, labels[:, :5])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sparse_mv_attention": True, "row_wise_mv_attention": True}, "exclude each other"),
        ({"num_views": 0}, "num_views=0 must be at least 1"),
        ({"attention_head_dim": 3}, "attention_head_dim=3 is the number of heads"),
        ({"attention_head_dim": None}, "attention_head_dim=None is the number of heads"),
        ({"transformer_layers_per_block": [1, 2]}, r"transformer_layers_per_block=\[1, 2\]: expected one number"),
        ({"down_block_types": ("DownBlock2D",)}, "expected 2 of"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "expected 2 of"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "expected 'UNetMidBlockMV2DCrossAttn'"),
        ({"class_embed_type": "timestep"}, "expected 'projection' or null"),
        ({"projection_class_embeddings_input_dim": None}, "needs projection_class_embeddings_input_dim"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_config_keys_of_other_versions() -> None:
    with pytest.warns(UserWarning, match="joint_attention_twice is a legacy key without effect"):
        kept = supported_config(
            {"_class_name": "x", "num_views": 2, "joint_attention_twice": True, "dropout": 0, "encoder_hid_dim": None}
        )
    assert kept == {"num_views": 2}
    with pytest.raises(ValueError, match="knows no config {'num_attention_heads': 4, 'num_view': 2}: remove"):
        supported_config({"num_attention_heads": 4, "num_view": 2})
    with pytest.warns(UserWarning, match="mvcd_attention has no effect"):
        tiny(mvcd_attention=True)


# Training.


def gradients(unet: UNetMV2DConditionModel) -> dict[str, torch.Tensor | None]:
    unet.zero_grad()
    unet(*inputs()).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


def test_every_trained_parameter_gets_a_gradient() -> None:
    unet = tiny().train()
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    grads = gradients(unet)
    assert {name for name, grad in grads.items() if grad is not None} == trained
    frozen = grads.keys() - trained
    assert {name.partition("transformer_blocks.0.")[2] for name in frozen} == {
        "norm2.weight",
        "norm2.bias",
        "attn2.to_q.weight",
        "attn2.to_k.weight",
    }


@pytest.mark.parametrize("suffixes", [None, ["joint_mid"]])
def test_gradient_checkpointing_changes_no_gradient(suffixes: list[str] | None) -> None:
    unet = tiny().train()
    chosen = trainable_parameters(unet, suffixes)
    expected = gradients(unet)
    unet.enable_gradient_checkpointing()
    calls = []
    unet.mid_block.attentions[0].register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(unet)
    assert len(calls) == 2, "the mid block was not recomputed"
    for name in chosen:
        torch.testing.assert_close(actual[name], expected[name], atol=0, rtol=0)


def test_trainable_modules_are_chosen_by_suffix() -> None:
    unet = tiny(cd_attention_last=True)
    everything = trainable_parameters(unet)
    assert not any(".attn2.to_q" in name or "transformer_blocks.0.norm2" in name for name in everything)
    joint = trainable_parameters(unet, ["joint_mid"])
    assert len(joint) == 7 * sum(isinstance(module, MVTransformerBlock) for module in unet.modules())
    assert all("joint_mid" in name for name in joint)
    assert {name for name, each in unet.named_parameters() if each.requires_grad} == joint.keys()
    both = trainable_parameters(unet, ["class_embedding", "joint_mid"])
    assert both.keys() - joint.keys() == {name for name in everything if name.startswith("class_embedding.")}
    assert trainable_parameters(unet).keys() == everything.keys()
    for nothing in ("joint_middle", "attn2.to_q"):
        with pytest.raises(ValueError, match=rf"ends with '{nothing}'; names end with .*attn_joint_last.*class_embed"):
            trainable_parameters(unet, ["joint_mid", nothing])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    unet, (sample, timestep, context, labels) = tiny(), inputs()
    expected = unet(sample, timestep, context, labels).sample
    with torch.autocast("cpu", dtype):
        under_autocast = unet(sample, timestep, context, labels).sample
    cast = unet.to(dtype)(sample.to(dtype), timestep, context.to(dtype), labels).sample
    for output in (under_autocast, cast):
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.05)


@torch.no_grad()
def test_compiles_without_graph_breaks() -> None:
    unet = tiny()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs()).sample, unet(*inputs()).sample)


# Saving and start weights.


@pytest.fixture
def source_2d(tmp_path: Path) -> Path:
    """A 2-D image-variation UNet in a checkpoint folder."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        **SIZES,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(tmp_path / "2d" / "unet")
    return tmp_path / "2d"


def test_saved_network_reloads(tmp_path: Path) -> None:
    unet = tiny(attention_head_dim=(2, 4))
    unet.save_pretrained(tmp_path)
    reloaded = UNetMV2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded(*inputs()).sample, unet(*inputs()).sample)
    frozen = {name for name, each in unet.named_parameters() if not each.requires_grad}
    assert {name for name, each in reloaded.named_parameters() if not each.requires_grad} == frozen
    assert UNetMV2DConditionModel.from_pretrained(tmp_path, num_views=2).config.num_views == 2
    loaded, report = load_unet(tmp_path, num_views=VIEWS)
    assert (report.new, report.widened, report.left_out, report.renamed) == ((), (), (), {})
    assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)
    assert not loaded.training


def test_average_of_weights_reloads(tmp_path: Path) -> None:
    unet = tiny()
    ema = EMAModel(unet.parameters(), model_cls=UNetMV2DConditionModel, model_config=unet.config)
    ema.save_pretrained(tmp_path / "unet_ema")
    loaded, report = load_unet(tmp_path, "unet_ema", num_views=VIEWS)
    assert len(report.copied) == len(unet.state_dict())
    assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)


def test_start_from_2d(source_2d: Path) -> None:
    unet, report = load_unet(source_2d, unet_config={"cd_attention_mid": True}, num_views=VIEWS)
    state, source = unet.state_dict(), load_file(source_2d / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(report.copied) == source.keys() - {"conv_in.weight"}
    assert all(torch.equal(state[key], source[key]) for key in report.copied)
    assert report.widened == ("conv_in.weight",)
    assert torch.equal(state["conv_in.weight"][:, :4], source["conv_in.weight"])
    assert not state["conv_in.weight"][:, 4:].any()
    assert all("joint_mid" in key or key.startswith("class_embedding.") for key in report.new)
    assert not any(state[key].any() for key in report.new if "to_out" in key)
    assert unet.config.num_views == VIEWS
    assert str(report).startswith(f"{len(report.copied)} tensors copied; conv_in.weight widened; ")
    assert unet(*inputs()).sample.isfinite().all()


@torch.no_grad()
def test_from_2d_with_zero_labels_and_condition_starts_as_the_2d_network(source_2d: Path) -> None:
    flat = UNet2DConditionModel.from_pretrained(source_2d, subfolder="unet")
    unet = from_pretrained_2d(
        source_2d, num_views=1, projection_class_embeddings_input_dim=10, subfolder="unet", cd_attention_last=True
    )
    for parameter in unet.class_embedding.linear_2.parameters():
        parameter.zero_()
    sample, timestep, context, labels = inputs()
    expected = flat(sample[:, :4], timestep, context).sample
    torch.testing.assert_close(unet(sample, timestep, context, labels).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("conv_in_init", "latents_copied"), [("copy_random", True), ("random", False)], ids=lambda value: str(value)
)
def test_other_starts_of_conv_in(source_2d: Path, conv_in_init: Any, latents_copied: bool) -> None:
    unet, report = load_unet(source_2d, num_views=1, conv_in_init=conv_in_init)
    weight = unet.conv_in.weight
    source = load_file(source_2d / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert torch.equal(weight[:, :4], source) == latents_copied
    assert ("conv_in.weight" in report.new) != latents_copied
    bound = (8 * 9) ** -0.5  # of nn.Conv2d's default, by fan-in
    assert 0.5 * bound < weight[:, 4:].abs().max() <= bound


def test_joint_bias_as_in_the_original(source_2d: Path) -> None:
    config = {"cd_attention_last": True}
    unet, _ = load_unet(source_2d, unet_config=config, num_views=1, zero_init_joint_bias=False)
    outputs = [module for name, module in unet.named_modules() if name.endswith("attn_joint_last.to_out.0")]
    assert outputs
    assert not any(output.weight.any() for output in outputs)
    assert all(output.bias.all() for output in outputs)


def test_start_of_stage_2_from_stage_1(tmp_path: Path) -> None:
    stage_1 = tiny(cd_attention_mid=False)
    stage_1.save_pretrained(tmp_path)
    stage_2, report = load_unet(tmp_path, None, unet_config={"cd_attention_mid": True}, num_views=VIEWS)
    assert all("joint_mid" in key for key in report.new)
    assert torch.equal(stage_2(*inputs()).sample, stage_1(*inputs()).sample)
    stage_2.save_pretrained(tmp_path / "again")
    back, report = load_unet(tmp_path / "again", None, unet_config={"cd_attention_mid": False}, num_views=VIEWS)
    assert all("joint_mid" in key for key in report.left_out)
    assert len(report.left_out) == len(stage_2.state_dict()) - len(back.state_dict())


def test_legacy_names_are_translated(tmp_path: Path) -> None:
    unet = tiny(cd_attention_last=True)
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"joint_last.": "joint.", "joint_mid.": "joint_twice."}
    state = load_file(file)
    for new_name, old_name in old.items():
        state = {key.replace(new_name, old_name): tensor for key, tensor in state.items()}
    save_file(state, file)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("cd_attention_mid") and config.pop("cd_attention_last")  # younger than these names
    (tmp_path / "config.json").write_text(json.dumps({**config, "joint_attention_twice": True}))
    with pytest.warns(UserWarning, match="joint_attention_twice is a legacy key without effect"):
        loaded, report = load_unet(tmp_path, None, num_views=VIEWS)
    assert len(report.renamed) == sum("joint" in key for key in state)
    assert report.new == report.left_out == ()
    assert torch.equal(loaded(*inputs()).sample, unet(*inputs()).sample)


def test_pickled_half_precision_shards(tmp_path: Path) -> None:
    """Weights in float16 .bin files, and in parts, are read too; the network is float32."""
    unet = tiny()
    unet.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    parts, _ = load_unet(tmp_path / "parts", num_views=VIEWS)
    assert torch.equal(parts(*inputs()).sample, unet(*inputs()).sample)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((tmp_path / "parts" / "config.json").read_text())
    halved = {key: tensor.half() for key, tensor in unet.state_dict().items()}
    torch.save(halved, tmp_path / "half" / "diffusion_pytorch_model.bin")
    half, _ = load_unet(tmp_path / "half", num_views=VIEWS)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert torch.equal(half.conv_in.weight, unet.conv_in.weight.half().float())


def damaged(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], config: dict[str, Any]) -> str:
    """What is said when some tensors of a stage-2 folder were changed."""
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ValueError) as caught:
        load_unet(tmp_path, None, unet_config=config, num_views=VIEWS)
    return str(caught.value)


def test_unexplained_tensors_are_named(tmp_path: Path) -> None:
    joint = "mid_block.attentions.0.transformer_blocks.0.attn_joint_mid.to_q.weight"
    message = damaged(
        tmp_path,
        lambda state: (state.pop(joint), state.pop("class_embedding.linear_1.bias"), state.update(extra=torch.ones(1))),
        {},
    )
    assert "2 missing: class_embedding.linear_1.bias, " + joint in message
    assert "1 unexpected: extra" in message


def test_a_whole_class_embedding_may_lack_in_2d_sources_alone(tmp_path: Path) -> None:
    def without(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith("class_embedding.")]:
            del state[key]

    assert "4 missing: class_embedding.linear_1.bias" in damaged(tmp_path, without, {})


def test_sizes_that_cannot_fit_are_named(tmp_path: Path) -> None:
    config = {"projection_class_embeddings_input_dim": 14, "in_channels": 4, "out_channels": 8}
    message = damaged(tmp_path, lambda state: None, config)
    assert "conv_in.weight (8, 8, 3, 3) instead of (8, 4, 3, 3)" in message
    assert "class_embedding.linear_1.weight (32, 10) instead of (32, 14)" in message
    assert "conv_out.weight (4, 8, 3, 3) instead of (8, 8, 3, 3)" in message


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the UNet is looked for in /nowhere, which is no folder"):
        load_unet("/nowhere", num_views=1)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*unet or .*; tried: diffusion_pytorch_model.saf"):
        load_unet(tmp_path, num_views=1)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"no weights")
    with pytest.raises(FileNotFoundError, match="has no config.json beside it: put it there, or give unet_config"):
        load_unet(tmp_path, num_views=1)
    with pytest.raises(ValueError, match="was refused: it is damaged"):
        load_unet(tmp_path, unet_config=TINY, num_views=1)
    save_file({"weight": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="holds no UNet"):
        load_unet(tmp_path, unet_config=TINY, num_views=1)
    with pytest.raises(ValueError, match="conv_in_init='zero': expected one of"):
        load_unet(tmp_path, num_views=1, conv_in_init="zero")  # type: ignore[arg-type]


def test_hub_without_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="some/model is no local folder, and the hub gives no unet weights"):
        load_unet("some/model", num_views=1, cache_dir=str(tmp_path))


def test_from_pretrained_2d_refuses_other_cameras(source_2d: Path) -> None:
    with pytest.raises(ValueError, match="only 'e_de_da_sincos' is known"):
        from_pretrained_2d(source_2d, camera_embedding_type="plucker")
    with pytest.warns(UserWarning, match="zero_init_camera_projection has no effect"):
        from_pretrained_2d(source_2d, zero_init_camera_projection=True, subfolder="unet")


def test_released_config_is_read(tmp_path: Path) -> None:
    """The keys that diffusers and Wonder3D write over ours, at their defaults."""
    config = {key: None for key in ("encoder_hid_dim", "cross_attention_norm", "num_attention_heads")}
    config |= {"class_embeddings_concat": False, "joint_attention": False, "_name_or_path": "x", "act_fn": "silu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet = UNetMV2DConditionModel.from_config({**json.loads(json.dumps(TINY)), **config})
    assert unet.config.block_out_channels == [8, 16]
