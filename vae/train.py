"""Training, from the command line to the exported weights; reads top to bottom."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import runtime, training
from common.checkpoint import CheckpointError, read_weights
from common.config import find_file
from common.data import BAD_SAMPLE_ERRORS, rng_for
from common.metrics import Lpips, LpipsUnavailable, find_backbone_weights, lpips_for_all
from common.optim import EMA, Learner, build_adamw, lr_schedule
from common.pretrained import CONFIG_FILE, read_json, read_tensors
from common.runtime import Processes
from common.video import contact_sheet
from vae import upstream
from vae.config import DISCRIMINATORS, VaeCheckpoint, VaeConfig, VaeModel
from vae.data import Clips, EvalClips, list_videos
from vae.models.discriminator import NLayerDiscriminator, NLayerDiscriminator3D, RealAndFake
from vae.models.load import build_model, load_model
from vae.models.perceptual import PerceptualLoss
from vae.task import SHEET_CLIPS, SHEET_FRAMES, VaeTask

logger = logging.getLogger(__name__)

MEMORY_KNOBS = (
    "batch_size (raise gradient_accumulation_steps to match), resolution or num_frames, or use "
    "--mix_precision bf16, --use_8bit_adam, --offload_ema, for validation --eval_batch_size, --enable_tiling"
)


def with_both_turns(config: VaeConfig) -> VaeConfig:
    """From step 0, so that the few steps of a preflight try both networks, and need the memory of both."""
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, disc_start=0))


def draw_samples(config: VaeConfig) -> np.ndarray:
    """A contact sheet of the first clips that can be read; ValueError if not one of them can."""
    clips, rows, reasons = training_data(config), [], []
    for number in range(min(len(clips), SHEET_CLIPS)):
        try:
            video = clips.sample(number, rng_for(config.run.seed, "augmentation", number))["video"]  # (3, T, R, R)
        except BAD_SAMPLE_ERRORS as error:  # training replaces it
            logger.warning("a training clip cannot be read: %s", error)
            reasons.append(str(error))
            continue
        video = video / 2 + 0.5
        chosen = np.linspace(0, video.shape[1] - 1, min(SHEET_FRAMES, video.shape[1])).round().astype(int)
        rows.append([video[:, index] for index in chosen])
    if not rows:
        raise ValueError(f"none of the first {len(reasons)} training clips can be read, the first: {reasons[0]}")
    return contact_sheet(rows)


def training_data(config: VaeConfig) -> Clips:
    """The training clips of a configuration."""
    data = config.data
    root = _folder(data.video_path, "--video_path")
    paths = list_videos(root, data.allow_list, images=data.num_frames == 1)
    return Clips(
        paths,
        root,
        data.num_frames,
        data.resolution,
        data.sample_rate,
        data.dynamic_sample,
        short_clips=data.short_clips,
    )


def validation_data(config: VaeConfig) -> EvalClips | None:
    """The validation clips; None without a folder."""
    validation = config.validation
    if validation.eval_video_path is None:
        return None
    root = _folder(validation.eval_video_path, "--eval_video_path")
    return EvalClips(
        list_videos(root, images=validation.eval_num_frames == 1),
        root,
        validation.eval_num_frames,
        validation.eval_resolution,
        validation.eval_sample_rate,
        subset_size=validation.max_validation_items or 0,
    )


def _folder(path: str | None, setting: str) -> Path:
    if not Path(str(path)).is_dir():
        raise FileNotFoundError(
            f"{setting} {path} is not a folder (looked from {Path.cwd()}): set it to that of the videos"
        )
    return Path(str(path))


def network_json(model: VaeModel) -> Path:
    """The file that says which network a run trains: the pretrained folder's own, else --model_config.

    With `ignore_mismatched_sizes` the latter wins.
    """
    given = find_file(model.model_config, "--model_config") if model.model_config else None
    if not model.pretrained_model_name_or_path or (given and model.ignore_mismatched_sizes):
        assert given is not None, "the configuration's check lets no other case pass"
        return given
    own = _folder(model.pretrained_model_name_or_path, "--pretrained_model_name_or_path") / CONFIG_FILE
    return own if own.is_file() or given is None else given


def check_sizes(config: VaeConfig) -> None:
    """ValueError, which names the nearest sizes, for clips that the network cannot take; asked before data are."""
    model, data, validation = config.model, config.data, config.validation
    path = network_json(model)
    if not path.is_file():
        return  # `load_vae` says what is missing
    with torch.device("meta"):
        network = build_model(model.model_name, read_json(path))
    sizes = [("", data.num_frames, data.resolution)]
    if validation.eval_video_path:
        sizes += [("eval_", validation.eval_num_frames, validation.eval_resolution)]
        if model.enable_tiling:
            network.enable_tiling()  # a network that cannot says so
    for prefix, num_frames, resolution in sizes:
        try:
            network.check_size(num_frames, resolution, resolution)
        except ValueError as error:
            raise ValueError(f"--{prefix}num_frames {num_frames}, --{prefix}resolution {resolution}: {error}") from None


def load_vae(config: VaeConfig) -> Any:
    """The autoencoder to start from: a json's network, a pretrained folder, or a folder with a .ckpt file.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: files are absent or do not belong together.
    """
    model, path = config.model, network_json(config.model)
    vae: Any
    if not model.pretrained_model_name_or_path:
        vae = build_model(model.model_name, read_json(path))
    else:
        folder = Path(model.pretrained_model_name_or_path)
        if model.model_config and model.ignore_mismatched_sizes:
            vae = build_model(model.model_name, read_json(path))
            _load_fitting(vae, folder)
        elif upstream.find_ckpt(folder):
            vae = upstream.load_ckpt_model(folder, model.model_name, path)
        else:
            vae = load_model(folder, model.model_name)
        _warn_of_unused_json(vae, model, path)
    if model.freeze_encoder:
        for module in vae.encoder_modules():
            module.requires_grad_(False)
    return vae


def _warn_of_unused_json(vae: Any, model: VaeModel, used: Path) -> None:
    given = find_file(model.model_config, "--model_config") if model.model_config else used
    try:
        is_the_same = given == used or type(vae).parse_config(read_json(given)) == vae.config
    except ValueError:  # of another class
        is_the_same = False
    if not is_the_same:
        logger.warning(
            "--model_config %s is not used: the network is that of %s; --ignore_mismatched_sizes builds the json's, "
            "with those weights that fit",
            given,
            used,
        )


def _load_fitting(vae: nn.Module, folder: Path) -> None:
    """Weights of a folder into a network of another configuration, where name and shape agree."""
    ckpt = upstream.find_ckpt(folder)
    weights = upstream.read_ckpt(ckpt).vae if ckpt else read_weights(folder)
    own = vae.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    vae.load_state_dict(fitting, strict=False)
    fresh = sorted(own.keys() - fitting.keys())
    if fresh:
        logger.warning("%d of %d tensors start at random, e.g. %s", len(fresh), len(own), ", ".join(fresh[:5]))


def load_adversary(config: VaeConfig) -> RealAndFake:
    """The discriminator, fresh or from another run's checkpoint; ValueError if clips are too small for it."""
    build = NLayerDiscriminator3D if DISCRIMINATORS[config.loss.discriminator_class] == 3 else NLayerDiscriminator
    adversary, data = RealAndFake(build()), config.data
    with torch.device("meta"):
        try:
            build()(torch.empty(data.batch_size, 3, data.num_frames, data.resolution, data.resolution))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the discriminator cannot take a batch of {data.batch_size} clips of {data.num_frames} frames, "
                f"{data.resolution} px, whose last layers have no two values per channel: raise --resolution"
            ) from error
    if source := config.model.load_disc_from_checkpoint:
        upstream.load_discriminator(adversary, _discriminator_weights(Path(source)), source)
    return adversary


def _discriminator_weights(source: Path) -> dict[str, Tensor]:
    if source.suffix == ".ckpt":
        return upstream.read_ckpt(source).discriminator
    folder = source / "discriminator"
    if not folder.is_dir():
        raise CheckpointError(f"--load_disc_from_checkpoint {source} is neither a .ckpt file nor a checkpoint folder")
    return read_weights(folder)


def load_perceptual(config: VaeConfig, accelerator: Processes) -> PerceptualLoss | None:
    """LPIPS on VGG16 as a loss; None at weight 0. The main process downloads first.

    Raises:
        LpipsUnavailable: there are no weights; the text says how to get them.
    """
    if not config.loss.perceptual_weight:
        return None
    found = None
    for turn in (True, False):
        if accelerator.is_main_process is turn:
            try:
                path = find_backbone_weights("vgg", config.loss.vgg_weights, setting="vgg_weights")
                found = PerceptualLoss.load(read_tensors(path), accelerator.device)
            except (LpipsUnavailable, FileNotFoundError, ValueError) as error:
                raise LpipsUnavailable(
                    f"{error} (The loss needs it: --vgg_weights names a file, --perceptual_weight 0 does without)"
                ) from error
        accelerator.wait_for_everyone()
    return found


def train(config: VaeConfig, warnings: Sequence[str] = ()) -> None:
    """Trains as `config` says; ValueError, OSError or CheckpointError before anything is written or hours are lost."""
    session = training.start(
        config, warnings, num_networks=2, find_unused_parameters=config.model.find_unused_parameters
    )
    config, accelerator, stop, device = session.config, session.accelerator, session.stop, session.device

    # Data: clips to train on, clips to look at, of sizes that the network can take.
    check_sizes(config)
    clips, eval_clips = training_data(config), validation_data(config)

    # The networks. Initial weights follow from the seed, so that they are the same on all processes.
    runtime.seed_model_randomness(config.run.seed, 0)
    bare_vae, bare_adversary = load_vae(config), load_adversary(config)
    if config.loss.wavelet_loss and not bare_vae.has_wavelet_coefficients:
        logger.warning("--wavelet_loss has no effect: %s gives no coefficients to compare", type(bare_vae).__name__)
    perceptual = load_perceptual(config, accelerator)

    # The order of the clips, and where an earlier start left off. Parts of another run are taken up below instead.
    source = upstream.source_of_parts(config.checkpoint)
    fresh = dataclasses.replace(config, checkpoint=_fresh(config.checkpoint)) if source else config
    course = training.course_of(dataclasses.replace(session, config=fresh), clips)

    # An optimizer for each of the two, learning rate, moving average.
    vae_optimizer = build_adamw(upstream.trained_parameters(bare_vae), config.optim, device)
    adversary_optimizer = build_adamw(bare_adversary.parameters(), config.optim, device)
    vae, adversary, vae_optimizer, adversary_optimizer = accelerator.prepare(
        bare_vae.train(), bare_adversary.train(), vae_optimizer, adversary_optimizer
    )
    learning_rate = lr_schedule(config.optim, course.total_steps, course.plan.global_batch)
    ema = None
    if config.optim.use_ema:
        ema = EMA(bare_vae, config.optim.ema_decay, config.optim.offload_ema, warmup=False)
    max_norm = config.optim.max_grad_norm
    learners = {
        "model": Learner(vae, vae_optimizer, learning_rate, max_norm, ema),
        "discriminator": Learner(adversary, adversary_optimizer, learning_rate, max_norm),
    }
    begin_at: dict[str, Any] = {}
    if source:
        parts = upstream.read_parts(source, config.checkpoint)
        optimizers = (vae_optimizer, adversary_optimizer)
        upstream.restore(parts, bare_vae, bare_adversary, optimizers, ema, accelerator.scaler, str(source))
        if accelerator.is_main_process:
            logger.info("%s", parts.summary(source))
        sample = parts.step * course.plan.global_batch if parts.sample is None else parts.sample
        begin_at = {"step": parts.step, "sample": sample}

    # Resume, say what is about to happen, train.
    run = training.open_run(
        session,
        course,
        models={"vae": bare_vae, "discriminator": bare_adversary},
        learners=learners,
        memory_knobs=MEMORY_KNOBS,
        **begin_at,
    )
    task = VaeTask(
        config,
        accelerator,
        vae,
        bare_vae,
        adversary,
        bare_adversary,
        perceptual,
        eval_clips,
        run.log,
        stop,
        lpips=_lpips(config, accelerator),
    )
    training.run_to_end(run, task, clips)


def _fresh(checkpoint: VaeCheckpoint) -> VaeCheckpoint:
    return dataclasses.replace(checkpoint, resume_from_checkpoint=None)


def _lpips(config: VaeConfig, accelerator: Processes) -> Lpips | None:
    validation = config.validation
    if validation.eval_video_path is None or not validation.eval_lpips:
        return None
    return lpips_for_all("alex", validation.lpips_weights, accelerator, spatial=True)
