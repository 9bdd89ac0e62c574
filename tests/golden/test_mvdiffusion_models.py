"""The multi-view UNet's layers, forward pass and start weights against recorded vectors."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import vectors as golden
from safetensors.torch import save_file
from vectors import KEYS_DIR, Vectors

from mvdiffusion.models.attention import MVAttention, MVTransformer, MVTransformerBlock
from mvdiffusion.models.initialise import LEGACY_NAMES, from_pretrained_2d, load_unet, trainable_parameters
from mvdiffusion.models.unet_mv2d import LEGACY_KEYS, UNetMV2DConditionModel, self_pattern

TRAINER = "mvdiffusion"
SELF_PATTERNS = {"self_plain": "off", "self_mv_dense": "dense", "self_mv_sparse": "sparse"}


def views_of(case: str) -> int:
    """V of a case, which names it: nv6, nv2_b3."""
    return int(re.search(r"nv(\d+)", case)[1])


def load(module: torch.nn.Module, superset: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The module with its part of some weights."""
    module.load_state_dict({key: superset[key] for key in module.state_dict()})
    return module.eval()


def referred_to(vectors: Vectors, key: str) -> Vectors:
    """The file that a header refers to by its name, or the one of its kind in this set."""
    named = re.match(r"\S+?\.safetensors", vectors.config[key])[0]
    path = vectors.path.parent / named
    return golden.load(path if path.is_file() else golden.files(TRAINER, f"{named.partition('_')[0]}_*")[0])


# Attention and transformers.


@golden.by_case(TRAINER, "05_attention_processors*", r"((?!w\.)[^.]+)\.x")
@torch.no_grad()
def test_attention(vectors: Vectors, case: str) -> None:
    config, x = vectors.config, vectors[f"{case}.x"]
    sizes = {"dim": config["query_dim"], "heads": config["heads"], "head_dim": config["dim_head"]}
    for name in vectors.under(f"{case}."):
        key = f"{case}.{name}"
        if name in SELF_PATTERNS:
            attention = MVAttention(**sizes, pattern=SELF_PATTERNS[name], num_views=views_of(case))
            vectors.check(key, load(attention, vectors.under("w.self."))(x))
        elif name == "joint":
            vectors.check(key, load(MVAttention(**sizes, pattern="joint"), vectors.under("w.joint."))(x))
        elif name.startswith("cross"):
            attention = load(MVAttention(**sizes, key_dim=config["cross_dim"]), vectors.under("w.cross."))
            context = vectors[f"{case}.enc{name.removeprefix('cross')}"]
            vectors.check(key, attention.attend(x, context))
            if context.shape[1] == 1:
                vectors.check(key, attention.constant(context).expand_as(x))
        else:
            assert name == "x" or name.startswith("enc"), f"{key} was not compared"


def block_options(vectors: Vectors, case: str) -> dict[str, Any]:
    flags = vectors.config["block_variants"][case.rpartition(".")[2]]
    return {
        "cross_attention_dim": vectors.config["cross_attention_dim"],
        "num_views": views_of(case),
        "pattern": self_pattern(
            flags.get("multiview_attention", True), flags.get("sparse_mv_attention", False), row_wise=False
        ),
        **{name: flags[name] for name in ("cd_attention_mid", "cd_attention_last") if name in flags},
    }


@golden.by_case(TRAINER, "06_transformer_blocks*", r"((?!w\.)[^.]+\.block\.[^.]+)")
@torch.no_grad()
def test_block(vectors: Vectors, case: str) -> None:
    config, prefix = vectors.config, case.partition(".")[0]
    block = MVTransformerBlock(config["dim"], config["heads"], config["dim_head"], **block_options(vectors, case))
    load(block, vectors.under("w.block."))
    vectors.check(case, block(vectors[f"{prefix}.x"], vectors[f"{prefix}.enc"]))


@golden.by_case(TRAINER, "06_transformer_blocks*", r"((?!w\.)[^.]+\.transformer_(?:conv|linear)\.[^.]+)")
@torch.no_grad()
def test_transformer(vectors: Vectors, case: str) -> None:
    config, (prefix, kind, _) = vectors.config, case.split(".")
    transformer = MVTransformer(
        config["dim"],
        config["heads"],
        config["norm_num_groups"],
        use_linear_projection=kind == "transformer_linear",
        num_layers=config["transformer_num_layers"],
        **block_options(vectors, case),
    )
    load(transformer, vectors.under(f"w.{kind}."))
    vectors.check(case, transformer(vectors[f"{prefix}.img"], vectors[f"{prefix}.enc"]))


# The whole network.


@golden.by_case(TRAINER, "07_unet_forward*", r"([^.]+\.out\.[^.]+)")
@torch.no_grad()
def test_unet(vectors: Vectors, case: str) -> None:
    config, (prefix, _, variant) = vectors.config, case.split(".")
    timestep, num_views = vectors.tensors.get(f"{prefix}.timesteps"), config["odd_case"]["num_views"]
    if timestep is None:
        timestep = config["odd_case"]["timestep"]
    else:
        num_views = views_of(case)
    flags = {**config["unet"], **config["variants"][variant], "num_views": num_views}
    unet = UNetMV2DConditionModel.from_config(flags)
    load(unet, referred_to(vectors, "weights_file").under("unet."))
    inputs = [vectors[f"{prefix}.sample"], timestep, vectors[f"{prefix}.enc"], vectors[f"{prefix}.class_labels"]]
    vectors.check(case, unet(*inputs).sample)


def variants() -> list[Any]:
    path = KEYS_DIR / "mvunet_wonder3d.json"
    if not path.is_file():
        return [pytest.param(None, None, marks=pytest.mark.skip(reason=f"no {path}"), id="absent")]
    keys = json.loads(path.read_text())
    return [pytest.param(keys, name, id=name) for name in ("stage2", *keys["variants"])]


@pytest.mark.parametrize(("keys", "name"), variants())
def test_names_and_sizes(keys: dict[str, Any], name: str) -> None:
    expected = dict(keys["params"])
    if name != "stage2":
        variant = keys["variants"][name]
        expected = {key: size for key, size in expected.items() if key not in variant["removed"]}
        expected |= variant["added"] | {key: new for key, (_, new) in variant["changed"].items()}
    labels = expected.get("class_embedding.linear_1.weight")
    with torch.device("meta"):
        unet = UNetMV2DConditionModel(
            in_channels=expected["conv_in.weight"][1],
            class_embed_type="projection" if labels else None,
            projection_class_embeddings_input_dim=labels[1] if labels else None,
            cd_attention_mid=any("attn_joint_mid" in key for key in expected),
            cd_attention_last=any("attn_joint_last" in key for key in expected),
        )
    assert {key: list(tensor.shape) for key, tensor in unet.state_dict().items()} == expected
    count = keys if name == "stage2" else keys["variants"][name]
    assert sum(parameter.numel() for parameter in unet.parameters()) == count["total_params"]
    assert len(unet.state_dict()) == count["n_tensors"]
    if name == "stage2":
        joint = trainable_parameters(unet, ["joint_mid"])
        assert len(joint) == keys["joint_mid_tensors"]
        assert sum(parameter.numel() for parameter in joint.values()) == keys["joint_mid_params"]


# Start weights.


def write_source(vectors: Vectors, folder: Path) -> Path:
    """The 2-D UNet of a file, as diffusers saves it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vectors.config["src_config"]))
    save_file(vectors.under("src."), folder / "diffusion_pytorch_model.safetensors")
    return folder


@golden.by_file(TRAINER, "08a_init*")
def test_start_as_the_original(vectors: Vectors, tmp_path: Path) -> None:
    config, expected = vectors.config, vectors.config["report"]
    is_legacy = any(config["dst_overrides"].get(key) for key in LEGACY_KEYS)
    with pytest.warns(UserWarning, match="legacy") if is_legacy else nullcontext():
        unet, report = load_unet(
            write_source(vectors, tmp_path / "unet"),
            None,
            unet_config=config["dst_overrides"],
            num_views=config["num_views"],
            conv_in_init="copy_zero" if expected["conv_in_first4_copied"] else "random",
            zero_init_joint_bias=False,
        )
    state, source = unet.state_dict(), vectors.under("src.")
    assert sorted(report.copied) == sorted(expected["copied"])
    assert sorted(report.new + report.widened) == sorted(expected["not_copied"])
    assert all(torch.equal(state[key], source[key]) for key in report.copied)
    assert all(torch.equal(state[key], tensor) for key, tensor in vectors.under("dst.").items())
    assert sorted(key for key in report.new if not state[key].any()) == sorted(expected["zero"])


@golden.by_file(TRAINER, "08b_init*")
def test_start_as_wonder3d(vectors: Vectors, tmp_path: Path) -> None:
    folder = write_source(referred_to(vectors, "src_weights"), tmp_path / "unet")
    source = referred_to(vectors, "src_weights").under("src.")
    for case, expected in vectors.config["report"].items():
        if "kwargs" not in expected:
            continue
        unet = from_pretrained_2d(folder, zero_init_joint_bias=False, **expected["kwargs"])
        assert not unet.training
        state = unet.state_dict()
        copied = [key for key in state if key in source and torch.equal(state[key], source[key])]
        assert len(copied) == expected["n_copied"]
        assert sorted(state.keys() - set(copied)) == sorted(expected["not_copied"])
        latents = source["conv_in.weight"].shape[1]
        assert bool(state["conv_in.weight"][:, latents:].any()) != expected["conv_in_last4_zero"]
        torch.testing.assert_close(
            state["conv_in.weight"][:, :latents], vectors[f"{case}.conv_in.weight_first4"], atol=0, rtol=0
        )
        for key in ("conv_in.bias", "conv_out.weight"):
            torch.testing.assert_close(state[key], vectors[f"{case}.{key}"], atol=0, rtol=0)
        outputs = [key for key in state if "joint" in key and ".to_out." in key and not state[key].any()]
        assert sorted(outputs) == sorted(expected["to_out_zero"] + expected["to_out_bias_zero"])
    renames = vectors.config["report"].get("legacy_renames", {"verified": True, **LEGACY_NAMES})
    assert {"verified": True, **LEGACY_NAMES} == renames
