"""The original's single-file checkpoints: read safely, written from a checkpoint folder of ours, turned into a folder.

    python upstream.py results/.../checkpoint-5000 checkpoint-5000.ckpt
    python upstream.py checkpoint-5000.ckpt folder

The second command takes the autoencoder alone, averaged where the file has an average, and writes config.json and
safetensors, as the original's save_hf_model.py does.

A file is a pickled dictionary: `state_dict` with `gen_model` and `dics_model` (so spelt), `optimizer_state`,
`ema_state_dict` (names start with `module.`), `scaler_state`, `sampler_state`, `epoch`, `current_step`.
"""

import argparse
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import CheckpointError, problems_of, read_state, read_weights
from common.optim import EMA, settings_kept
from common.pretrained import load_exactly, read_json, read_tensors
from common.runtime import clear_errors
from vae.config import VaeCheckpoint
from vae.models.base import Autoencoder
from vae.models.discriminator import RealAndFake
from vae.models.load import MODELS, build_model
from vae.models.perceptual import PerceptualLoss

logger = logging.getLogger(__name__)

WRAPPED_PREFIX, DISCRIMINATOR_PREFIX = "module.", "discriminator."
OPTIMIZERS = ("optimizer.bin", "optimizer_1.bin")  # in the order of `accelerator.prepare`
FRESH_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
FRESH_SCALER["_growth_tracker"] = 0  # the original scales in any precision, and refuses an empty state
PART_FLAGS = ("not_resume_training_process", "not_resume_optimizer", "not_resume_discriminator")


@dataclass
class UpstreamCheckpoint:
    """What a .ckpt file holds.

    Attributes:
        vae, loss: state dicts; `loss` has `logvar`, `discriminator.*` and `perceptual_loss.*`.
        ema: averaged parameters by their names in the autoencoder; empty without one.
        vae_optimizer, discriminator_optimizer, scaler: their states; empty where absent.
        step: optimizer steps done, of both kinds.
        sample: samples consumed; None where the file does not tell.
    """

    vae: dict[str, Tensor]
    loss: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    vae_optimizer: dict[str, Any] = field(default_factory=dict)
    discriminator_optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    sample: int | None = None

    def summary(self, source: Path) -> str:
        """What a run takes from `source`, for the log."""
        held = {
            "its average": self.ema,
            "its optimizer": self.vae_optimizer,
            "discriminator": self.discriminator,
            "the discriminator's optimizer": self.discriminator_optimizer,
        }
        taken = ["autoencoder", *(name for name, part in held.items() if part)]
        fresh = [name for name, part in held.items() if not part]
        return f"from {source}: {', '.join(taken)}; not from there: {', '.join(fresh) or 'nothing'}"

    @property
    def discriminator(self) -> dict[str, Tensor]:
        """The discriminator's tensors, with its prefix."""
        return {name: value for name, value in self.loss.items() if name.startswith(DISCRIMINATOR_PREFIX)}


def read_ckpt(path: Path) -> UpstreamCheckpoint:
    """A .ckpt file of the original; no code in it is run.

    Raises:
        CheckpointError: it is not there, is damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        states = content["state_dict"]
        optimizers = content.get("optimizer_state") or {}
        return UpstreamCheckpoint(
            vae=_unwrapped(states["gen_model"]),
            loss=_unwrapped(states.get("dics_model") or {}),
            ema=_unwrapped(content.get("ema_state_dict") or {}),
            vae_optimizer=optimizers.get("gen_optimizer") or {},
            discriminator_optimizer=optimizers.get("disc_optimizer") or {},
            scaler=content.get("scaler_state") or {},
            step=int(content.get("current_step", 0)),
        )
    except pickle.UnpicklingError as error:  # its text advises to run the code
        raise CheckpointError(
            f"{path} is no checkpoint of the original's layout, or is damaged (no plain tensors and numbers)"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}"
        raise CheckpointError(f"{path} is no checkpoint of the original's layout, or is damaged ({reason})") from error


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names in the network itself, not in DistributedDataParallel around it."""
    return {name.removeprefix(WRAPPED_PREFIX): value for name, value in state.items()}


def find_ckpt(folder: Path) -> Path | None:
    """The .ckpt file of a folder, None if it has none; of several the one with the highest step in its name."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))
    if len(found) > 1:
        logger.info("%s holds %d .ckpt files; %s is used", folder, len(found), found[-1].name)
    return found[-1] if found else None


def load_ckpt_model(path: Path, model_name: str | None = None, model_config: str | Path | None = None) -> Autoencoder:
    """The autoencoder of a .ckpt file: averaged weights where it has them, unless NOT_USE_EMA_MODEL is set.

    Args:
        path: the file, or a folder with one.
        model_name: WFVAE, CausalVAE or WFVAE2; None is what the config says.
        model_config: json; None is `config.json` beside the file.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
        FileNotFoundError: there is no config.
        ValueError: the weights are not those of the config's network.
    """
    ckpt_path = find_ckpt(path) if path.is_dir() else path
    if ckpt_path is None:
        raise CheckpointError(f"{path} holds no .ckpt file")
    config_path = Path(model_config) if model_config else ckpt_path.with_name("config.json")
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path} is not there: a .ckpt file holds no configuration; put the network's json beside it as "
            "config.json, or name it with --model_config"
        )
    ckpt = read_ckpt(ckpt_path)
    model = build_model(model_name, read_json(config_path))
    load_exactly(model, ckpt.vae, ckpt_path)
    if ckpt.ema and "NOT_USE_EMA_MODEL" not in os.environ:
        load_exactly(model, {**model.state_dict(), **ckpt.ema}, f"the average in {ckpt_path}")
    return model


def load_discriminator(adversary: RealAndFake, state: Mapping[str, Tensor], source: str) -> None:
    """Loads weights whose names and shapes are the discriminator's; ValueError names `source` and what differs."""
    load_exactly(adversary, state, source, f"this {type(adversary.discriminator).__name__}")


def trained_parameters(vae: Any) -> list[nn.Parameter]:
    """The autoencoder's trained parameters in the order in which the original's optimizer numbers them."""
    modules = [*vae.decoder_modules(), *vae.encoder_modules()]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def source_of_parts(checkpoint: VaeCheckpoint) -> Path | None:
    """The .ckpt file or folder from which a new run takes parts; None where a run is resumed as a whole, or is fresh.

    With `latest` the flags that leave parts out have done their work when the run began.
    """
    wanted, leaves_out = checkpoint.resume_from_checkpoint, any(getattr(checkpoint, flag) for flag in PART_FLAGS)
    if not wanted or wanted == "latest":
        if leaves_out:
            logger.warning("--not_resume_* flags count when a run begins, not when it goes on with `latest`")
        return None
    return Path(wanted) if leaves_out or wanted.endswith(".ckpt") else None


def read_parts(source: Path, checkpoint: VaeCheckpoint) -> UpstreamCheckpoint:
    """What a new run takes from a .ckpt file or from a checkpoint folder of ours, as the flags say."""
    parts = read_ckpt(source) if source.suffix == ".ckpt" else read_folder(source)
    if checkpoint.not_resume_discriminator:
        parts.loss, parts.discriminator_optimizer = {}, {}
    if checkpoint.not_resume_optimizer:
        parts.vae_optimizer = {}
    if checkpoint.not_resume_training_process:
        parts.step, parts.sample = 0, 0
    return parts


def read_folder(folder: Path) -> UpstreamCheckpoint:
    """A checkpoint folder of ours in the same form; CheckpointError if it is not whole."""
    problems = problems_of(folder)
    if problems:
        raise CheckpointError(f"{folder} cannot be used: {'; '.join(problems[:3])}")
    state, scaler = read_state(folder), folder / "scaler.pt"
    vae_optimizer, discriminator_optimizer = (
        torch.load(folder / name, map_location="cpu", weights_only=True) for name in OPTIMIZERS
    )
    logvar = {"logvar": torch.tensor(float(state["config"]["loss"]["logvar_init"]))}
    return UpstreamCheckpoint(
        vae=read_weights(folder / "vae"),
        loss=logvar | read_weights(folder / "discriminator"),
        ema=_averages(folder) if (folder / "vae_ema").is_dir() else {},
        vae_optimizer=vae_optimizer,
        discriminator_optimizer=discriminator_optimizer,
        scaler=torch.load(scaler, weights_only=True) if scaler.exists() else {},
        step=state["step"],
        sample=state["sample"],
    )


def _averages(folder: Path) -> dict[str, Tensor]:
    """The averaged parameters; buffers and fixed filters are not averaged."""
    averaged = read_weights(folder / "vae_ema")
    with torch.device("meta"):
        model = build_model(None, read_json(folder / "vae" / "config.json"))
    return {name: averaged[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore(
    parts: UpstreamCheckpoint,
    vae: nn.Module,
    adversary: RealAndFake,
    optimizers: tuple[Any, Any],
    ema: EMA | None,
    scaler: Any,
    source: str,
) -> None:
    """Puts what `parts` holds into the objects of a run that has been set up for it.

    Args:
        optimizers: of the autoencoder and of the discriminator.

    Raises:
        CheckpointError: the state of an optimizer is of other parameters.
        ValueError: the weights are of another network.
    """
    load_exactly(vae, parts.vae, source)
    if parts.discriminator:
        load_discriminator(adversary, parts.discriminator, f"the discriminator in {source}")
    for optimizer, state in zip(optimizers, (parts.vae_optimizer, parts.discriminator_optimizer), strict=True):
        if not state:
            continue
        try:
            with settings_kept([optimizer]):
                optimizer.load_state_dict(state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"the optimizer state in {source} does not fit: {error}. Another --freeze_encoder needs a fresh one: "
                "--not_resume_optimizer"
            ) from None
    if ema is not None:
        ema.restore({**dict(vae.named_parameters()), **parts.ema}, updates=parts.step)
    if scaler is not None and parts.scaler:
        scaler.load_state_dict(parts.scaler)


def write_ckpt(folder: Path, path: Path, vgg_weights: Path | None = None) -> None:
    """Writes a checkpoint folder of ours as a .ckpt file of the original, and config.json beside it.

    Args:
        vgg_weights: torchvision's VGG16, for the `perceptual_loss.*` that the original's trainer has in its files.

    Raises:
        CheckpointError: the folder is not a whole checkpoint.
        ValueError: `vgg_weights` are not VGG16's.
    """
    parts, state = read_folder(folder), read_state(folder)
    if vgg_weights is not None:
        perceptual = PerceptualLoss.load(read_tensors(vgg_weights)).state_dict()
        parts.loss |= {f"perceptual_loss.{name}": value for name, value in perceptual.items()}
    epoch, index = divmod(state["sample"], state["fingerprint"]["num_items"])
    content = {
        "epoch": epoch,
        "current_step": parts.step,
        "optimizer_state": {"gen_optimizer": parts.vae_optimizer, "disc_optimizer": parts.discriminator_optimizer},
        "state_dict": {"gen_model": parts.vae, "dics_model": parts.loss},
        "ema_state_dict": {f"{WRAPPED_PREFIX}{name}": value for name, value in parts.ema.items()},
        "scaler_state": parts.scaler or FRESH_SCALER,
        "sampler_state": {"epoch": epoch, "seed": 0, "current_index": index // state["world_size"]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    torch.save(content, staged)
    os.replace(staged, path)
    path.with_name("config.json").write_text((folder / "vae" / "config.json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a .ckpt file, or a folder out of one; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="upstream.py",
        description="Writes a checkpoint folder as the original's .ckpt, or the autoencoder of a .ckpt as a folder.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder checkpoint-<step>, or a .ckpt file or a folder with one")
    parser.add_argument("output", type=Path, help="file to write, config.json is put beside it; or folder to write")
    parser.add_argument("--vgg_weights", type=Path, help="torchvision's VGG16, which the original's trainer expects")
    parser.add_argument("--model_name", choices=MODELS, help="of a .ckpt file; default: what config.json says")
    parser.add_argument("--model_config", type=Path, help="json of a .ckpt file; default: config.json beside it")
    arguments = parser.parse_args(argv)
    source, output = arguments.checkpoint, arguments.output
    with clear_errors():
        if source.suffix == ".ckpt" or find_ckpt(source):
            load_ckpt_model(source, arguments.model_name, arguments.model_config).save_pretrained(output)
            print(f"wrote {output}")
        else:
            write_ckpt(source, output, arguments.vgg_weights)
            print(f"wrote {output} and {output.with_name('config.json')}")


if __name__ == "__main__":
    main()
