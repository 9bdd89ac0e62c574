"""Converts trained weights for other programs; `--help` lists all settings.

    python -m training_ggi.export --format upstream --model log --output_dir checkpoints/checkpoint-1/transformer
    python -m training_ggi.export --format diffusers --model log/checkpoint-5000 --output_dir small

`upstream` is what the original's inference reads: the folder `transformer` with all weights, the base LoRA beside them.
`diffusers` is the small folder that training exports: the LoRA, for `load_lora_weights`, and the input projection.
"""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import tools
from common.config import Parser, folder_or_id, option
from common.runtime import clear_errors, quiet_libraries
from training_ggi.models.base_lora import BASE_ADAPTER
from training_ggi.models.results import LORA_NAME, PROJECTION_NAME, WEIGHTS_STEM, export_upstream, save_result
from training_ggi.trained import Trained, base_lora_of, find_trained, load_trained

logger = logging.getLogger(__name__)

ORIGINAL_RANK = 2048
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ExportData:
    format: Literal["upstream", "diffusers"] | None = option(
        None, "the original's folder with all weights, or the LoRA and the input projection; required"
    )
    output_dir: str | None = option(None, "folder for the result; required")
    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "type of the weights", needs="format=upstream")
    overwrite: bool = option(False, "replace a result that is there already")


@dataclass(frozen=True, kw_only=True)
class ExportModel:
    model: str | None = option(
        None, "a run's folder (its export, else its newest checkpoint), its export or a checkpoint of it; required"
    )
    base: str | None = option(None, "base model, folder or hub id; null is what the run was trained on")
    base_lora: str | None = option(None, "LoRA of Go-with-the-Flow; null is what the run was trained on")
    use_ema: bool = option(False, "of a checkpoint take the averaged weights")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    data: ExportData = ExportData()
    model: ExportModel = ExportModel()


def check(config: ExportConfig) -> list[str]:
    """Problems between sections, one sentence each."""
    required = {
        "data.format": "upstream or diffusers",
        "model.model": "a run's folder, its export or one of its checkpoints",
        "data.output_dir": "a folder for the result",
    }
    return tools.required(config, required)


PARSER = Parser(
    ExportConfig,
    aliases={
        "run": "model.model",
        "output": "data.output_dir",
        "pretrained_model_name_or_path": "model.base",
        "base_lora_path": "model.base_lora",
        "export.run": "model.model",
        "export.use_ema": "model.use_ema",
        **{f"export.{name}": f"data.{name}" for name in ("format", "output_dir", "dtype", "overwrite")},
    },
    check=check,
    program="export.py",
    description="Converts trained weights for the original's inference, or for diffusers.",
)


def export(config: ExportConfig) -> Path:
    """Writes the result; returns its folder.

    Raises:
        FileNotFoundError, CheckpointError: weights are missing or damaged.
        ValueError: they cannot have this format, or there is a result already.
    """
    wanted, model = config.data, config.model
    trained = find_trained(str(model.model), use_ema=model.use_ema, base=model.base, base_lora=model.base_lora)
    if wanted.format == "diffusers" and trained.mode == "full":
        raise ValueError(
            f"{trained.folder} holds all weights of the transformer, as train_mode full changes them: that is no LoRA. "
            "Use --format upstream"
        )
    folder = Path(str(wanted.output_dir))
    if not wanted.overwrite and any((folder / name).exists() for name in ("config.json", LORA_NAME)):
        raise ValueError(f"{folder} holds weights already: give another --output_dir, or --overwrite true")
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that was cut short
    unfinished.mkdir(parents=True)
    try:
        if wanted.format == "upstream":
            write_upstream(trained, unfinished, DTYPES[wanted.dtype])
        else:
            write_diffusers(trained, unfinished)
        for old in folder.glob(f"{WEIGHTS_STEM}*"):  # shards that the new weights may not have
            old.unlink()
        for path in sorted(unfinished.iterdir(), reverse=True):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(unfinished)
    return folder


def write_upstream(trained: Trained, folder: Path, dtype: torch.dtype) -> None:
    """The original's folder."""
    transformer, model = load_trained(trained, dtype), trained.model
    if trained.mode == "lora":
        lora, base = base_lora_of(trained, transformer), folder_or_id(model.pretrained_model_name_or_path)
        hub = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
        export_upstream(transformer, folder, base=base, **hub, base_lora=lora, dtype=dtype)
        rank = lora.rank
    else:
        export_upstream(transformer, folder, dtype=dtype)
        rank = transformer.peft_config[BASE_ADAPTER].r
    if rank != ORIGINAL_RANK:
        logger.warning("the base LoRA has rank %d: the original's inference reads rank %d alone", rank, ORIGINAL_RANK)
    if not transformer.config.use_learned_positional_embeddings:
        logger.warning("the transformer has no learned position table, without which the original's cannot read it")


def write_diffusers(trained: Trained, folder: Path) -> None:
    """The LoRA and the input projection, in the type in which they trained."""
    if trained.kind == "small":
        for name in (LORA_NAME, PROJECTION_NAME):
            shutil.copyfile(trained.folder / name, folder / name)
    else:
        save_result(load_trained(trained, torch.bfloat16), folder, trained.mode)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts as the command line says; see `--help`."""
    config, warnings = PARSER.parse_or_exit(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)
    quiet_libraries()
    for warning in warnings:
        logger.warning("%s", warning)
    with clear_errors():
        print(f"written: {export(config)}")


if __name__ == "__main__":
    main()
