"""Networks as folders: configurations, weights in all their forms, and what errors say."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from common.pretrained import (
    PretrainedModel,
    check_keys,
    find_weights,
    is_local,
    load_exactly,
    load_part,
    named,
    parameter_dtype,
    read_tensors,
    widen_conv,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class LayerConfig:
    width: int = 3
    scale: float = 1.0
    bias: bool = True
    names: tuple[str, ...] = ()
    extra: tuple[float, ...] | None = None


class Layer(PretrainedModel):
    """A layer with numbers that are not saved."""

    config_class = LayerConfig
    ignored_keys = ("act_fn",)

    def __init__(self, config: LayerConfig) -> None:
        super().__init__(config)
        self.linear = nn.Linear(config.width, config.width, bias=config.bias)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.register_buffer("steps", torch.linspace(0, 1, 3), persistent=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved layer."""
    torch.manual_seed(0)
    Layer.from_config({"width": 2}).save_pretrained(tmp_path / "layer")
    return tmp_path / "layer"


# Networks.


def test_what_is_saved_is_loaded_without_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config == {"_class_name": "Layer", "width": 2, "scale": 1.0, "bias": True, "names": [], "extra": None}
    before = torch.random.get_rng_state()
    loaded = Layer.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.config == LayerConfig(width=2) and not loaded.training and loaded.linear.weight.requires_grad
    assert torch.equal(loaded.linear.weight, load_file(folder / WEIGHTS)["linear.weight"].half())
    assert loaded.count.dtype == torch.long
    assert loaded.steps.tolist() == [0.0, 0.5, 1.0] and loaded.steps.dtype == torch.float32


def test_kinds_of_values() -> None:
    values = {"scale": 2, "names": ["a"], "extra": [[1], [2]], "act_fn": "silu", "_diffusers_version": "0.20.0"}
    assert Layer.parse_config(values) == LayerConfig(scale=2, names=("a",), extra=((1,), (2,)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widht": 1}, "configuration of Layer: unknown key 'widht', did you mean 'width'?"),
        ({"zzz": 1, "width": "4"}, "configuration of Layer: unknown key 'zzz'; width is '4', but must be like 3"),
        ({"width": True}, "width is True, but must be like 3"),
        ({"bias": 1}, "bias is 1, but must be like True"),
        ({"scale": None}, "scale is None, but must be like 1.0"),
        ({"names": "a"}, "names is 'a', but must be like ()"),
        ({"_class_name": "Other"}, "this configuration is of Other, not of Layer: choose the one that fits"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Layer.from_config(config)
    assert str(error.value) == message if "configuration" in message else message in str(error.value)


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .*config.json: give the folder of a model, with config.json and w"):
        Layer.from_pretrained(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights in {folder}; tried: .*model.bin.*; .* holds config.json$"):
        Layer.from_pretrained(folder)
    for content, message in ((b"{", "is no valid JSON"), (b'"\xff"', "is no valid JSON"), (b"[]", "it holds a list$")):
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"{folder}: .*config.json .*{message}"):
            Layer.from_pretrained(folder)


def test_dtype_of_parameters() -> None:
    assert parameter_dtype(nn.Sequential(nn.Linear(1, 1)).bfloat16()) == torch.bfloat16
    assert parameter_dtype(nn.ReLU()) == parameter_dtype(lambda x: x) == torch.float32


def test_widened_convolution() -> None:
    narrow = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False).half().requires_grad_(False)
    before = torch.random.get_rng_state()
    wide = widen_conv(narrow, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(wide.weight[:, :2], narrow.weight) and not wide.weight[:, 2:].any()
    assert wide.bias is None and not wide.weight.requires_grad and wide.weight.dtype == torch.float16
    assert (wide.stride, wide.padding) == ((2, 2), (1, 1))


# Files.


def test_the_first_file_is_taken(tmp_path: Path) -> None:
    folders = [tmp_path / "unet", tmp_path]
    (tmp_path / "unet").mkdir()
    for path in ("model.safetensors", "unet/model.safetensors.index.json", WEIGHTS.replace("safetensors", "bin")):
        (tmp_path / path).touch()
    assert find_weights(folders) == tmp_path / "unet/model.safetensors.index.json"
    assert find_weights(folders, ["diffusion_pytorch_model"]).name == "diffusion_pytorch_model.bin"
    with pytest.raises(FileNotFoundError, match="unet or .*; tried: x.safetensors, .*; .* holds .*, unet$"):
        find_weights(folders, ["x"])


def test_shards(tmp_path: Path) -> None:
    state = {name: torch.full((1,), float(value)) for value, name in enumerate("abc")}
    save_file({"a": state["a"]}, tmp_path / "1.safetensors")
    torch.save({"b": state["b"], "c": state["c"]}, tmp_path / "2.bin")
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.bin", "c": "2.bin"}}))
    assert read_tensors(index) == state
    (tmp_path / "2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} lacks 2.bin, which {index.name} names: copy it again"):
        read_tensors(index)
    for content in ("{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match="index.json is no list of shards"):
            read_tensors(index)


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_damaged_files_are_refused_and_run_no_code(tmp_path: Path) -> None:
    torch.save({"x": Bomb(tmp_path / "exploded")}, tmp_path / "weights.bin")
    with pytest.raises(
        ValueError, match=r"weights.bin was refused: .* more than tensors \(no plain tensors\). Copy it"
    ):
        read_tensors(tmp_path / "weights.bin")
    assert not (tmp_path / "exploded").exists()
    for content in (b"", b"<html>not found</html>"):
        for name in ("weights.bin", "weights.safetensors"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} was refused: it is damaged"):
                read_tensors(tmp_path / name)
    for content in ({"state_dict": {"x": torch.zeros(1)}}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "weights.bin")
        with pytest.raises(ValueError, match="does not hold a plain state dict: expected parameter names"):
            read_tensors(tmp_path / "weights.bin")
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        read_tensors(tmp_path / "gone.safetensors")


# What fits.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("linear.bias"), "this Layer; 1 missing: linear.bias"),
        (lambda state: state.update(ema=torch.zeros(1)), "this Layer; 1 unexpected: ema"),
        (
            lambda state: state.update({"linear.bias": torch.zeros(5)}),
            "this Layer; 1 of another shape: linear.bias (5,) instead of (2,)",
        ),
        (
            lambda state: [state.pop("count"), state.update({f"x{n}": torch.zeros(1) for n in range(6)})],
            "1 missing: count; 6 unexpected: x0, x1, x2, x3, x4, ...",
        ),
    ],
)
def test_what_differs_is_named(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ValueError) as error:
        Layer.from_pretrained(folder)
    assert str(error.value).startswith(f"{folder / WEIGHTS} does not hold the weights of ")
    assert str(error.value).endswith(message)


def test_values_are_copied_or_assigned() -> None:
    linear, state = nn.Linear(1, 1), {"weight": torch.ones(1, 1).half(), "bias": torch.ones(1).half()}
    load_exactly(linear, state, "a file")
    assert linear.weight.item() == 1 and linear.weight.dtype == torch.float32
    load_exactly(linear, state, "a file", assign=True)
    assert linear.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="a file does not hold the weights of RAFT; 2 missing: weight, bias$"):
        load_exactly(linear, {}, "a file", "RAFT")


def test_keys_are_sorted_counted_and_cut() -> None:
    check_keys("never said", (), set())
    with pytest.raises(ValueError, match=r"^x is y; 2 missing: a, b; 1 unexpected: c; 1 of another shape: d \(1,\)$"):
        check_keys("x is y", {"b", "a"}, ["c"], ["d (1,)"])
    assert named("abcde") == "a, b, c, d, e" and named("abcdef") == "a, b, c, d, e, ..."


# Parts of a checkpoint.


def test_where_parts_are_looked_for(tmp_path: Path) -> None:
    calls: list[Any] = []

    def load(path: str, **options: Any) -> str:
        calls.append((path, options))
        return "part"

    (tmp_path / "vae").mkdir()
    assert load_part(load, "VAE", str(tmp_path), "vae", "main", variant="fp16") == "part"
    load_part(load, "VAE", str(tmp_path / "vae"), None)
    load_part(load, "VAE", "owner/name", "vae", "main", "cache")
    hub = {"revision": "main", "cache_dir": "cache", "subfolder": "vae"}
    assert calls == [(f"{tmp_path}/vae", {"variant": "fp16"}), (f"{tmp_path}/vae", {}), ("owner/name", hub)]


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    def load(path: str, **options: Any) -> None:
        raise OSError("\nno luck\nat all")

    with pytest.raises(
        FileNotFoundError, match=f"the VAE is looked for in {tmp_path}/vae, but .* has no vae; it has n"
    ):
        load_part(load, "VAE", str(tmp_path), "vae")
    with pytest.raises(FileNotFoundError, match="the folder /no/where, where the VAE is looked for, does not exist"):
        load_part(load, "VAE", "/no/where", "vae")
    (tmp_path / "vae").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"the VAE cannot be loaded from {tmp_path}/vae \(no luck\): name a f"):
        load_part(load, "VAE", str(tmp_path), "vae")
    with pytest.raises(FileNotFoundError, match="from owner/name, which is no folder, and no hub id within reach"):
        load_part(load, "VAE", "owner/name", "vae")


@pytest.mark.parametrize(
    "error", [SafetensorError("torn"), RuntimeError("torn"), EOFError("torn"), pickle.UnpicklingError("torn")]
)
def test_parts_whose_weights_are_damaged(tmp_path: Path, error: Exception) -> None:
    def load(path: str, **options: Any) -> None:
        raise error

    (tmp_path / "vae").mkdir()
    message = r"the weights of the VAE in {} are damaged, or of another network \(torn\): copy them again, whole$"
    for path_or_id, place in ((str(tmp_path), f"{tmp_path}/vae"), ("owner/name", "owner/name")):
        with pytest.raises(ValueError, match=message.format(place)):
            load_part(load, "VAE", path_or_id, "vae")


def test_parts_whose_weights_have_other_names(tmp_path: Path) -> None:
    StableUnCLIPImageNormalizer(4).save_pretrained(tmp_path / "normaliser")
    load, wanted = StableUnCLIPImageNormalizer.from_pretrained, (str(tmp_path), "normaliser")
    assert load_part(load, "normaliser", *wanted).mean.shape == (1, 4)
    path = tmp_path / "normaliser" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({"mean": tensors["mean"], "deviation": tensors["std"]}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError) as raised:
        load_part(load, "normaliser", *wanted)
    assert str(raised.value) == (
        f"the weights in {tmp_path}/normaliser are not those of the normaliser; 1 missing: std"
    )


@pytest.mark.parametrize(
    ("name", "expected"), [("/a", True), ("./a", True), ("~/a", True), ("a/b/c", True), ("a/b", False), ("gpt2", False)]
)
def test_names_that_are_paths(name: str, expected: bool) -> None:
    assert is_local(name) == expected


def test_of_many_names_the_first_are_shown() -> None:
    assert named(list("abcde")) == "a, b, c, d, e"
    assert named(list("abcdef")) == "a, b, c, d, e, ..."
