"""What training leaves behind: a small folder (LoRA and patch embedding), or a whole checkpoint of the original's form.

The whole form is the transformer's folder that the original inference reads: `base_layer` weights with the base LoRA
beside them as adapter `default`, 1361 tensors for CogVideoX-5B-I2V.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from common.pretrained import WEIGHTS_STEM, check_keys, first_line, read_json, read_tensors
from training_ggi.models.base_lora import (
    BASE_ADAPTER,
    METADATA,
    NEW_ADAPTER,
    PREFIX,
    PROJECTIONS,
    LoraFile,
    TrainMode,
    add_new_lora,
    fuse,
    has_adapter,
    install,
    lora_parameters,
    lora_targets,
    read_lora_file,
)
from training_ggi.models.transformer import widen_patch_embed

LORA_NAME = "pytorch_lora_weights.safetensors"  # diffusers' default
PROJECTION_NAME = "patch_embed_proj.safetensors"
PROJECTION_KEYS = ("patch_embed.proj.weight", "patch_embed.proj.bias")
MAX_SHARD_BYTES = 5_000_000_000


# The small folder -----------------------------------------------------------------------------------------------------


def save_result(transformer: CogVideoXTransformer3DModel, directory: str | Path, mode: TrainMode) -> None:
    """Write the LoRA and the patch embedding, in the dtype in which they trained.

    `pytorch_lora_weights.safetensors` is what `CogVideoXImageToVideoPipeline.load_lora_weights` takes; its header
    states the alpha (versions of diffusers that do not read it take the rank). The 48-channel projection, which no
    pipeline loads by itself, lies beside it in `patch_embed_proj.safetensors`.

    Args:
        mode: how it was trained: `lora` (the result belongs on top of the base LoRA) or `base_lora` (it replaces it).

    Raises:
        ValueError: `full` has no small result.
    """
    if mode == "full":
        raise ValueError("train_mode full changes every weight, which is no LoRA: use export_upstream")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    adapter = NEW_ADAPTER if mode == "lora" else BASE_ADAPTER
    settings = transformer.peft_config[adapter]
    header = {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": list(PROJECTIONS)}
    weights = lora_parameters(transformer, adapter)
    save_file(
        {f"{PREFIX}{key}": _plain(weight) for key, weight in weights.items()},
        directory / LORA_NAME,
        metadata={"format": "pt", METADATA: json.dumps({f"{PREFIX}{key}": value for key, value in header.items()})},
    )
    save_file(
        {key: _plain(transformer.get_parameter(key)) for key in PROJECTION_KEYS},
        directory / PROJECTION_NAME,
        metadata={"format": "pt", "train_mode": mode},
    )


def load_result(
    transformer: CogVideoXTransformer3DModel, directory: str | Path, base_lora: LoraFile | None = None
) -> TrainMode:
    """Bring a small folder into a transformer as loaded, in the transformer's dtype, all frozen.

    Args:
        transformer: from `load_transformer`; a result of mode `lora` gets the base LoRA fused into it.
        base_lora: the one that the result was trained on; not needed for mode `base_lora`.

    Returns:
        how the result was trained.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: it does not fit the transformer, or the base LoRA is missing.
    """
    directory = Path(directory)
    path = directory / PROJECTION_NAME
    missing = [name for name in (LORA_NAME, PROJECTION_NAME) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} is no result of training: it lacks {' and '.join(missing)}")
    lora = read_lora_file(directory / LORA_NAME, transformer)
    projection = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        mode = (file.metadata() or {}).get("train_mode")
    current = {key: transformer.get_parameter(key) for key in PROJECTION_KEYS}
    check_keys(
        f"{path} is no patch embedding of this transformer",
        current.keys() - projection.keys(),
        projection.keys() - current.keys(),
        [key for key in current.keys() & projection.keys() if current[key].shape != projection[key].shape],
    )
    if mode not in ("lora", "base_lora"):
        raise ValueError(f'{path} states the train_mode {mode!r} in its header: expected "lora" or "base_lora"')
    if mode == "lora":
        if base_lora is None:
            raise ValueError(f"{directory} was trained on top of the base LoRA: give that file too")
        fuse(transformer, base_lora)
    install(transformer, lora, NEW_ADAPTER if mode == "lora" else BASE_ADAPTER, transformer.dtype)
    with torch.no_grad():
        for key, weight in current.items():
            weight.copy_(projection[key])
    transformer.requires_grad_(False)
    return mode


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous()


# The whole checkpoint -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lazy:
    """A tensor of known shape that is made when it is written."""

    shape: torch.Size
    make: Callable[[], torch.Tensor]


def export_upstream(
    transformer: CogVideoXTransformer3DModel,
    directory: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    base_lora: LoraFile | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a transformer folder as the original's checkpoints have it, shard by shard.

    After training in mode `lora`, the base LoRA is fused into the transformer's weights. The folder wants them apart:
    `base_layer.weight` is then the base model's weight plus the new LoRA, and the base LoRA goes in as it is. So that
    the result is exact, both are read again from their files.

    The original injects rank 2048 at scale 1: a base LoRA of another scale has it multiplied into B; one of another
    rank cannot be read there.

    Args:
        transformer: trained or loaded in any mode, unwrapped, whole (not sharded).
        directory: gets `config.json` and the weights, with an index if there is more than one file.
        base: after mode `lora`, the base model: folder with a `transformer` in it, that folder itself, or model id.
        revision, cache_dir: of the model id.
        variant: of the base model's weights.
        base_lora: after mode `lora`, the base LoRA.
        dtype: of all tensors.
        max_shard_bytes: most that one file holds, and most that is held in memory beside the transformer.

    Raises:
        FileNotFoundError: the base model cannot be had.
        ValueError: there is no adapter, or the base model or the base LoRA is missing or does not fit.
    """
    if has_adapter(transformer, NEW_ADAPTER):
        if base is None or base_lora is None:
            raise ValueError("after train_mode lora, the export needs the base model and the base LoRA: give both")
        stored = _Stored(_transformer_folder(base, revision, cache_dir), variant)
        tensors = _taken_apart(transformer, stored, base_lora)
    elif has_adapter(transformer, BASE_ADAPTER):
        tensors = _as_they_are(transformer)
    else:
        raise ValueError("the transformer has no LoRA: only what was trained on the base LoRA has the original's form")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    transformer.save_config(directory)
    _write_shards(tensors, directory, dtype, max_shard_bytes)


def _as_they_are(transformer: CogVideoXTransformer3DModel) -> dict[str, _Lazy]:
    """The transformer's own tensors, its LoRA at scale 1."""
    settings = transformer.peft_config[BASE_ADAPTER]
    scale = settings.lora_alpha / settings.r
    tensors = {}
    for key, tensor in transformer.state_dict().items():
        factor = scale if f".lora_B.{BASE_ADAPTER}." in key else 1.0
        tensors[key] = _Lazy(tensor.shape, lambda tensor=tensor, factor=factor: tensor * factor)
    return tensors


def _taken_apart(transformer: CogVideoXTransformer3DModel, stored: "_Stored", base_lora: LoraFile) -> dict[str, _Lazy]:
    """The transformer's tensors, its new LoRA in the base model's stored weights, and the base LoRA beside them."""
    new = {name: tensor.detach() for name, tensor in lora_parameters(transformer, NEW_ADAPTER).items()}
    settings = transformer.peft_config[NEW_ADAPTER]
    scale = settings.lora_alpha / settings.r
    targets = lora_targets(transformer)
    check_keys(f"{stored.folder} is not the base model", {f"{t}.weight" for t in targets} - stored.keys(), ())

    def weight(target: str) -> torch.Tensor:
        down, up = (new[f"{target}.lora_{name}.weight"] for name in "AB")
        return stored[f"{target}.weight"].to(up.device).float() + (up.float() @ down.float()) * scale  # (out, in)

    def half(target: str, index: int) -> torch.Tensor:
        return base_lora.pair(target)[index] * (1.0, base_lora.scale)[index]

    tensors = {
        key: _Lazy(tensor.shape, lambda tensor=tensor: tensor)
        for key, tensor in transformer.state_dict().items()
        if f".{NEW_ADAPTER}." not in key
    }
    for target in targets:
        key = f"{target}.base_layer.weight"
        features_out, features_in = tensors[key].shape
        tensors[key] = _Lazy(tensors[key].shape, lambda target=target: weight(target))
        shapes = (base_lora.rank, features_in), (features_out, base_lora.rank)
        for index, name in enumerate("AB"):
            tensors[f"{target}.lora_{name}.{BASE_ADAPTER}.weight"] = _Lazy(
                torch.Size(shapes[index]), lambda target=target, index=index: half(target, index)
            )
    return tensors


def _write_shards(tensors: Mapping[str, _Lazy], directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    sizes = {key: lazy.shape.numel() * dtype.itemsize for key, lazy in tensors.items()}
    shards: list[list[str]] = [[]]
    held = 0
    for key, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(key)
        held += size
    names = [f"{WEIGHTS_STEM}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{WEIGHTS_STEM}.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        shard = {key: _plain(tensors[key].make().detach().to(dtype)) for key in keys}
        save_file(shard, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / f"{WEIGHTS_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load_upstream(
    directory: str | Path, *, torch_dtype: torch.dtype = torch.bfloat16, fuse_lora: bool = False
) -> CogVideoXTransformer3DModel:
    """Load a folder that `export_upstream` or the original has written: its `checkpoint-<step>/transformer`.

    Args:
        fuse_lora: add the base LoRA to the weights, in float32, instead of installing it as adapter `default`.

    Returns:
        the model in evaluation mode, frozen.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
        ValueError: keys or shapes differ from those of its config.
    """
    stored = _Stored(Path(directory))
    first = f"transformer_blocks.0.attn1.{PROJECTIONS[0]}.lora_A.{BASE_ADAPTER}.weight"
    if first not in stored.keys():
        raise ValueError(f"{stored.folder} has no {first}: it is no checkpoint of the original's form")
    transformer = _empty_transformer(stored.folder, stored.shape(first)[0])
    shapes = {key: tuple(tensor.shape) for key, tensor in transformer.state_dict().items()}
    check_keys(
        f"{stored.folder} does not fit its config",
        shapes.keys() - stored.keys(),
        stored.keys() - shapes.keys(),
        [key for key in shapes.keys() & stored.keys() if shapes[key] != stored.shape(key)],
    )
    if fuse_lora:
        transformer = _empty_transformer(stored.folder, None)
    tensors = _fused(stored) if fuse_lora else stored.items()
    transformer.load_state_dict({key: tensor.to(torch_dtype) for key, tensor in tensors}, assign=True)
    return transformer.requires_grad_(False).eval()


def _empty_transformer(folder: Path, rank: int | None) -> CogVideoXTransformer3DModel:
    """The transformer of a folder's config, on the meta device, with a LoRA of that rank if any."""
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(config)
        widen_patch_embed(transformer)  # a config may say 32 where the weights have 48
        if rank:
            add_new_lora(transformer, rank, rank, BASE_ADAPTER)
    return transformer


def _fused(stored: "_Stored") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a plain transformer, W + B A in the place of W."""
    for key in stored:
        if ".lora_" in key:
            continue
        tensor = stored[key]
        if key.endswith(".base_layer.weight"):
            target = key.removesuffix(".base_layer.weight")
            down, up = (stored[f"{target}.lora_{name}.{BASE_ADAPTER}.weight"].float() for name in "AB")
            tensor = tensor.float() + up @ down  # (out, in)
        yield key.replace(".base_layer.", "."), tensor


def _transformer_folder(base: str | Path, revision: str | None, cache_dir: str | None) -> Path:
    folder = Path(base)
    if not folder.is_dir():
        place = {"revision": revision, "cache_dir": cache_dir}
        try:
            folder = Path(snapshot_download(str(base), allow_patterns="transformer/*", **place))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{base} is neither a folder nor a model id that can be had: {first_line(error)}"
            ) from error
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


class _Stored(Mapping[str, torch.Tensor]):
    """Tensors of the safetensors files of a folder, each read when asked for."""

    def __init__(self, folder: Path, variant: str | None = None):
        self.folder = folder
        self._paths: dict[str, Path] = {}
        # A folder may hold other precisions beside: theirs have one more part in their names.
        stem = f"{WEIGHTS_STEM}.{variant}" if variant else WEIGHTS_STEM
        kinds = (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", "*.safetensors")
        for path in next((found for kind in kinds if (found := sorted(folder.glob(kind)))), []):
            with safe_open(path, framework="pt") as file:
                self._paths |= dict.fromkeys(file.keys(), path)
        if not self._paths:
            raise FileNotFoundError(f"{folder} holds no safetensors weights")

    def __getitem__(self, key: str) -> torch.Tensor:
        with safe_open(self._paths[key], framework="pt") as file:
            return file.get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self._paths[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
