"""Runs every trainer in miniature by its documented command and reports what came of it; see `scripts/demo.sh`.

A trainer takes part by one entry in DEMOS. Parts are independent: as many run at a time as there are processor cores,
on one thread each, and their lines on the terminal begin with their names.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import torch
from report import Command, Metric, Part, Pictures, summary_cells, text_table, wrapped, write_report

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # the environment's `accelerate`, wherever PATH points
OUTPUT = ROOT / "runs" / "demo"
INTERRUPT_AT = 0.4  # share of the steps after which a training is stopped
SHOWN_LINES = 30  # of the output of a command that failed
POLL_S = 0.5
NAME_COLUMNS = 16

STOPPING = threading.Event()  # the demo was interrupted: no part begins another command


class StepFailed(RuntimeError):
    """A command did not end as it should; the text holds its last lines."""

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Places:
    """Where one trainer's demo reads and writes."""

    data: Path
    checkpoint: Path
    run: Path
    result: Path


Uses = dict[str, list[str]]  # commands by title


@dataclass(frozen=True)
class Demo:
    """One trainer's part of the demo.

    Attributes:
        trainer: name of its folder.
        minutes: how long it takes about; the longest part begins first.
        prepare: commands before training, by title, run from the data folder.
        train: the documented training command, run from the data folder.
        use: the commands that use the trained weights, by title, run from the data folder.
        steps: optimizer steps of `train`.
        checkpoint_flags: for make_tiny_checkpoints.py.
        pictures: for the report, once all is done.
        written: what lies where beyond what every run writes, for the report.
        shown_lines_of_use: last lines of the output of the last of `use` that go to the terminal.
    """

    trainer: str
    title: str
    explanation: str
    minutes: float
    steps: int
    train: Callable[[Places], list[str]]
    use: Callable[[Places], Uses]
    metric: Metric | None
    pictures: Callable[[Places], list[Pictures]]
    written: Callable[[Places], dict[str, Path]]
    checkpoint_flags: tuple[str, ...] = ()
    shown_lines_of_use: int = 0
    prepare: Callable[[Places], Uses] = lambda places: {}


def flags(**settings: object) -> list[str]:
    """`--name value` for each."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def launched(script: str, *settings: str) -> list[str]:
    """`accelerate launch` of a script of the repository, in one process."""
    return [str(BIN / "accelerate"), "launch", "--num_processes", "1", *settings, str(ROOT / script)]


def validated(places: Places, steps: Sequence[int], name: str) -> list[Path]:
    """The picture `name` of the validations after some steps."""
    return [places.run / "validation" / f"step-{step:06d}" / name for step in steps]


# ----------------------------------------------------------------------------------------------------------------------
# gaussian_refiner

REFINER_STEPS = 400
REFINER_HEIGHT_PX = 192
REFINER_VALIDATED_ITEMS, REFINER_REPAIRED_ITEMS = 5, 3
REFINER_SAMPLING = flags(height_px=REFINER_HEIGHT_PX, num_inference_steps=10, strength=0.5, guidance_scale=1)


def refiner_training(places: Places) -> list[str]:
    """A random network of 0.2 M weights learns at a much higher rate than the pretrained one of 870 M would bear."""
    command = launched("gaussian_refiner/train_repair_cross_attn_version.py", "--mixed_precision", "fp16")
    command += flags(pretrained_model_name_or_path=places.checkpoint, output_dir=places.run)
    command += flags(train_batch_size=4, gradient_accumulation_steps=1, max_train_steps=REFINER_STEPS)
    command += flags(validation_steps=REFINER_STEPS // 2, max_validation_items=REFINER_VALIDATED_ITEMS)
    command += flags(checkpoints_total_limit=2, learning_rate="1e-2", lr_scheduler="cosine", lr_warmup_steps=20)
    command += flags(cond_loss_weight=0, windows_per_item=4, cache_latents=places.run / "cache")
    return command + REFINER_SAMPLING


def refiner_repair(places: Places) -> Uses:
    command = [sys.executable, str(ROOT / "gaussian_refiner" / "infer.py")]
    command += flags(model=places.run / "export", input="example_kitti.json")
    return {"use": command + flags(holdout_items=REFINER_REPAIRED_ITEMS, output_dir=places.result) + REFINER_SAMPLING}


def refiner_pictures(places: Places) -> list[Pictures]:
    first, last = validated(places, (0, REFINER_STEPS), "")
    kinds = ("render", "repaired", "gt", "cond")
    rows = []
    for item in range(REFINER_VALIDATED_ITEMS):
        render, repaired, gt, cond = (last / f"{item:03d}-{kind}.png" for kind in kinds)
        rows.append([render, first / repaired.name, repaired, gt, cond])
    headings = (
        "render (input)",
        "repaired, step 0",
        f"repaired, step {REFINER_STEPS}",
        "target",
        "other view (input)",
    )
    windows = Pictures(f"Held-out items, windows of {REFINER_HEIGHT_PX} px", headings, rows)
    pairs = json.loads((places.data / "example_kitti.json").read_text())
    count = len(pairs["render"])
    rows = [
        [places.data / pairs["render"][item], places.result / f"{item:06d}_{item:04d}.png"]
        + [places.data / pairs[kind][item] for kind in ("gt", "cond")]
        for item in range(count - REFINER_REPAIRED_ITEMS, count)
    ]
    headings = ("render", "repaired", "target", "other view")
    return [windows, Pictures("Whole images, repaired by infer.py with the exported weights", headings, rows)]


REFINER = Demo(
    trainer="gaussian_refiner",
    title="gaussian_refiner: repair of 3D-Gaussian renders",
    explanation=(
        "A UNet with the layout of SD2.1-unCLIP's, but 0.2 million random weights instead of 870 million pretrained "
        "ones, learns from 38 pairs to repair renders, and is measured on held-out ones. Sampling starts from the "
        "half noised render, so that even random weights leave traces of it. The VAE is a miniature too, fitted in "
        "seconds, and loses detail: the ceiling is the PSNR of the target itself after that VAE. The PSNR is meant to "
        "rise from step 0 towards the ceiling. It stays below that of the untouched render: in some minutes this "
        "network learns to copy the render through the VAE, not to repair it."
    ),
    minutes=3.5,
    steps=REFINER_STEPS,
    train=refiner_training,
    use=refiner_repair,
    metric=Metric("psnr", "PSNR (dB)", {"psnr_render": "untouched render", "psnr_vae": "VAE's ceiling"}),
    pictures=refiner_pictures,
    written=lambda places: {
        "encoded windows": places.run / "cache",
        "repaired images and metrics.json": places.result,
    },
    checkpoint_flags=("--vae_fit_steps", "200"),
    shown_lines_of_use=REFINER_REPAIRED_ITEMS + 3,
)

# ----------------------------------------------------------------------------------------------------------------------
# vae

VAE_STEPS, VAE_DISC_START = 450, 360
VAE_CLIP = {"RESOLUTION": "64", "NUM_FRAMES": "17"}


def vae_script(name: str, **environment: str) -> list[str]:
    """One of its shell scripts, in one process."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return ["env", *settings, "NUM_PROCESSES=1", "bash", str(ROOT / "vae" / "examples" / name)]


def vae_training(places: Places) -> list[str]:
    """A random network of 1.9 M weights on clips of 64 px, at a higher rate than the large one of 317 M would bear."""
    resolution, num_frames = VAE_CLIP.values()
    command = vae_script("train_ddp.sh")
    command += flags(model_config=places.checkpoint / "wfvae-tiny.json", output_dir=places.run)
    command += flags(video_path=places.data / "videos", eval_video_path=places.data / "test_video")
    command += flags(resolution=resolution, num_frames=5, batch_size=4, eval_resolution=resolution)
    command += flags(eval_num_frames=num_frames, max_steps=VAE_STEPS, disc_start=VAE_DISC_START)
    command += flags(eval_steps=VAE_DISC_START, disc_weight=0.1, dataset_num_worker=1, perceptual_weight=0)
    command += flags(lr="3e-3", lr_scheduler="cosine", lr_warmup_steps=10, ema_decay=0.98, clip_grad_norm=2000)
    return command + flags(save_ckpt_step=10000, report_to="none", log_steps=1)


def vae_evaluation(places: Places) -> Uses:
    settings = {**VAE_CLIP, "EXP_NAME": "demo", "CKPT": str(places.run / "export")}
    settings |= {"DATASET_DIR": str(places.data / "test_video"), "METRIC": "psnr,ssim,flicker"}
    scripts = {"reconstruct": "gen_video.sh", "evaluate": "eval.sh"}
    return {title: vae_script(script, **settings) for title, script in scripts.items()}


def vae_pictures(places: Places) -> list[Pictures]:
    steps = (0, VAE_DISC_START, VAE_STEPS)
    rows = [[picture] for item in range(3) for picture in validated(places, steps, f"{item:03d}.png")]
    heading = f"frames in time, input | reconstruction; after steps {', '.join(map(str, steps))} for each clip"
    return [Pictures("Held-out clips", (heading,), rows)]


VAE = Demo(
    trainer="vae",
    title="vae: a video autoencoder",
    explanation=(
        "A WFVAE with 1.9 million random weights instead of 317 million learns to compress clips made of photographs 4 "
        "times in time and 8 x 8 times in space, first without, then with a discriminator, and is measured on held-out "
        "clips of other photographs. The PSNR is meant to rise far above that of step 0, and shapes and colours to be "
        "told, still blurred. The reconstructions are then written and measured by the two documented scripts."
    ),
    minutes=3,
    steps=VAE_STEPS,
    train=vae_training,
    use=vae_evaluation,
    metric=Metric("psnr", "PSNR (dB)", {}),
    pictures=vae_pictures,
    written=lambda places: {"reconstructed clips": places.data / "video_gen"},
    shown_lines_of_use=8,
)

# ----------------------------------------------------------------------------------------------------------------------
# diffnext

NOVA_T2I_STEPS, NOVA_T2V_STEPS = 800, 400
NOVA_LATENT_LENGTH = 5  # 17 frames
NOVA_SAMPLING = {"num_inference_steps": 8, "num_diffusion_steps": 25, "guidance_scale": 3}
NOVA_T2I_PROMPTS = ("an astronaut", "a cat", "stars", "a rocket", "a cup of coffee", "a motorcycle")
NOVA_T2V_PROMPTS = ("a motorcycle", "an astronaut", "a rocket", "a cat")


def nova_cache(places: Places, source: str, *settings: str) -> Uses:
    command = [sys.executable, "-m", "diffnext.build_cache", *flags(source=source, vae=places.checkpoint / "vae")]
    return {"build cache": [*command, *flags(output_dir="cache"), *settings, *flags(num_workers=0, verify=4)]}


def nova_training(places: Places, config: str, steps: int, prompts: Sequence[str], *more: str) -> list[str]:
    """A random network of 0.5 M weights on some 50 samples learns at a higher rate than the released ones."""
    paths = (ROOT / "configs" / config, places.checkpoint, places.run)
    configuration, checkpoint, run = (os.path.relpath(path, places.data) for path in paths)
    settings = {
        "config": configuration,
        "pipeline.paths.pretrained_path": checkpoint,
        "pipeline.paths.module_config": "null",
        "experiment.output_dir": run,
        "experiment.log_every": 1,
        "experiment.save_every": steps,
        "train_dataloader.params.dataset": "cache",
        "train_dataloader.params.num_workers": 0,
        "training.max_train_steps": steps,
        "training.mixed_precision": "no",  # on a CPU faster than the configuration's bf16
        "optimizer.params.lr": "2e-3",
        "lr_scheduler.target": "CosineLR",
        "ema.params.update_every": 2,
        "log.report_to": "none",
        "validation.validate_at_start": "true",
        "validation.validation_steps": steps,
        "validation.prompts": f"[{','.join(prompts)}]",
        **{f"validation.{name}": value for name, value in NOVA_SAMPLING.items()},
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    return [*launched("scripts/train.py", "--mixed_precision", "no"), *words, *more]


def nova_generation(places: Places, **settings: object) -> Uses:
    command = [sys.executable, "-m", "diffnext.infer", *flags(model=places.checkpoint)]
    command += flags(transformer=places.run / "export" / "transformer", prompts="prompts.txt", output_dir=places.result)
    return {"use": command + flags(batch_size=8, **NOVA_SAMPLING, **settings)}


def nova_written(places: Places) -> dict[str, Path]:
    return {"cache of latents": places.data / "cache", "generated by infer.py": places.result}


def nova_t2i_pictures(places: Places) -> list[Pictures]:
    rows = [
        [
            places.data / "images" / f"{number:03d}.png",
            *validated(places, (0, NOVA_T2I_STEPS), f"{number:03d}.png"),
            places.result / f"{number:05d}.png",
        ]
        for number in range(len(NOVA_T2I_PROMPTS))
    ]
    headings = ("a photograph", "generated, step 0", f"generated, step {NOVA_T2I_STEPS}", "by infer.py")
    return [Pictures(f"Generated from the words: {', '.join(NOVA_T2I_PROMPTS)}", headings, rows)]


def nova_t2v_pictures(places: Places) -> list[Pictures]:
    steps = (0, NOVA_T2V_STEPS)
    rows = [validated(places, steps, f"{number:03d}-frames.png") for number in range(len(NOVA_T2V_PROMPTS))]
    headings = tuple(f"frames in time, step {step}" for step in steps)
    return [Pictures(f"Clips generated from the words: {', '.join(NOVA_T2V_PROMPTS)}", headings, rows)]


NOVA_T2I = Demo(
    trainer="diffnext_t2i",
    title="diffnext: NOVA, text to image",
    explanation=(
        "A VAE with random weights, set to average and interpolate and then fitted for seconds, encodes 48 windows of "
        "six photographs into a cache. A NOVA of random weights learns from it to generate latents of 8 x 8, token set "
        "by token set, out of a random text encoder's view of some words. The loss is meant to fall, and the pictures "
        "to take the colours of what the words name, more blurred than the VAE makes them."
    ),
    minutes=1.5,
    steps=NOVA_T2I_STEPS,
    prepare=lambda places: nova_cache(places, "images.csv"),
    train=lambda places: nova_training(
        places, "nova_d48w1024_sdxl1024.yaml", NOVA_T2I_STEPS, NOVA_T2I_PROMPTS, "training.batch_size=16"
    ),
    use=nova_generation,
    metric=None,
    pictures=nova_t2i_pictures,
    written=nova_written,
    checkpoint_flags=("--vae_fit_steps", "25"),
)
NOVA_T2V = Demo(
    trainer="diffnext_t2v",
    title="diffnext: NOVA, text to video",
    explanation=(
        "As above with ten clips of a camera that moves over photographs: 17 frames are 5 frames of latents, each "
        "generated after those before it. The loss of first frames and of all others is meant to fall, and the frames "
        "to turn from noise into patches of the clips' colours; what they show takes far more steps."
    ),
    minutes=2,
    steps=NOVA_T2V_STEPS,
    prepare=lambda places: nova_cache(
        places, "clips.jsonl", *flags(resize=96, crop_size="64,96", frame_ids="0:34:2", flow="measure")
    ),
    train=lambda places: nova_training(
        places,
        "nova_d48w1024_osp480.yaml",
        NOVA_T2V_STEPS,
        NOVA_T2V_PROMPTS,
        "training.batch_size=4",
        f"validation.max_latent_length={NOVA_LATENT_LENGTH}",
    ),
    use=lambda places: nova_generation(places, max_latent_length=NOVA_LATENT_LENGTH),
    metric=None,
    pictures=nova_t2v_pictures,
    written=nova_written,
    checkpoint_flags=("--vae_fit_steps", "5"),
)

# ----------------------------------------------------------------------------------------------------------------------
# mvdiffusion

VIEWS_STEPS = 450
VIEWS_PHOTOS = ("cup", "rocket")


def views_training(places: Places) -> list[str]:
    """A network of 0.7 M weights, most of them random, at a higher rate than the pretrained one of 910 M would bear."""
    command = launched("mvdiffusion/train_image_variation.py")
    command += flags(pretrained_model_name_or_path=places.checkpoint, pretrained_config_path_unet="null")
    command += flags(train_data_dir="views", resolution=64, num_validation_samples=4, output_dir=places.run)
    command += flags(max_train_steps=VIEWS_STEPS, validation_steps=VIEWS_STEPS, checkpointing_steps=VIEWS_STEPS)
    command += flags(train_batch_size=4, gradient_accumulation_steps=1, mixed_precision="no")
    command += flags(learning_rate="3e-3", lr_scheduler="cosine", lr_warmup_steps=20, ema_decay=0.99)
    command += flags(prediction_type="v_prediction", gradient_checkpointing="no", bg_color="white")
    command += flags(cache_latents=places.run / "cache", validation_dir="photos", validation_guidance_scale=1.5)
    return command + flags(num_inference_steps=10, dataloader_num_workers=0, report_to="none")


def views_inference(places: Places) -> Uses:
    command = [sys.executable, str(ROOT / "mvdiffusion" / "infer.py"), *flags(model=places.run / "export")]
    command += flags(input="photos", output_dir=places.result, num_inference_steps=10, guidance_scale=1.5, eta=0)
    return {"use": command}


def views_pictures(places: Places) -> list[Pictures]:
    steps = (0, VIEWS_STEPS)
    rows = [validated(places, steps, f"{index:03d}-cfg1.5.png") for index in range(2)]
    headings = tuple(f"sampled above, true below, step {step}" for step in steps)
    objects = Pictures("Objects that training never saw, in colour and normals", headings, rows)
    rows = [[places.result / name / "sheet.png"] for name in VIEWS_PHOTOS]
    return [objects, Pictures("Photographs, by infer.py with the exported pipeline", ("views",), rows)]


MVDIFFUSION = Demo(
    trainer="mvdiffusion",
    title="mvdiffusion: one image to six views in colour and normals",
    explanation=(
        "32 textured bodies are rendered from six sides. A miniature of the image-variation UNet, with random weights "
        "instead of pretrained ones, learns from 28 of them to make the other views and the normals from the front "
        "view, and is measured on the other four. PSNR is meant to rise from that of noise, and the angle between "
        "sampled and true normals to fall from the 90 degrees of chance. Rough outlines on white come first; true "
        "colours and normals take far more steps."
    ),
    minutes=3,
    steps=VIEWS_STEPS,
    train=views_training,
    use=views_inference,
    metric=Metric("psnr", "PSNR of the views (dB)", {}),
    pictures=views_pictures,
    written=lambda places: {
        "encoded objects": places.run / "cache",
        "views of photographs": places.result,
    },
    checkpoint_flags=("--vae_fit_steps", "60"),
)

# ----------------------------------------------------------------------------------------------------------------------
# training_ggi

GGI_STEPS = 60


def ggi_settings(places: Places) -> list[str]:
    """Small clips of the demo scenes, whose edges lie beside them, and the tiny networks."""
    checkpoint = places.checkpoint
    settings = flags(pretrained_model_name_or_path=checkpoint, enable_tiling="no", mixed_precision="no")
    settings += flags(base_lora_path=checkpoint / "I2V5B_final_i38800_nearest_lora_weights.safetensors")
    settings += flags(raft_weights=checkpoint / "raft_large.safetensors", data_root=".")
    settings += flags(height=256, width=384, max_num_frames=9, cond="precomputed", num_validation_scenes=1)
    settings += flags(flow_scale=4, report_to="none", cuts_per_scene=2, noise_sets=2)
    return settings + flags(cache_latents=places.run.parent / "cache", output_dir=places.run)


def ggi_preparing(places: Places) -> Uses:
    return {"prepared clips": [sys.executable, "-m", "training_ggi.prepare", *ggi_settings(places)]}


def ggi_training(places: Places) -> list[str]:
    """A new LoRA on a transformer of 0.3 M random weights, at a higher rate than that of 5.6 billion would bear."""
    command = [*launched("training_ggi/exps/T073-000.py"), *ggi_settings(places)]
    command += flags(gradient_accumulation=1, batch_size=2, max_train_steps=GGI_STEPS, checkpointing_steps=GGI_STEPS)
    command += flags(learning_rate="5e-3", lr_warmup_steps=10, rank=16, lora_alpha=16, dataloader_num_workers=0)
    return command + flags(validation_steps=GGI_STEPS, validate_at_start="yes", num_inference_steps=4)


def ggi_inference(places: Places) -> Uses:
    command = [sys.executable, "-m", "training_ggi.infer", *flags(model=places.run / "export")]
    command += flags(first="segment/ends/frame_00001.png", last="segment/ends/frame_00002.png")
    command += flags(edges="segment/edges", flow="segment/flow.npy", output_dir=places.result)
    return {"use": [*command, *flags(num_inference_steps=4, enable_tiling="no"), "--frames"]}


def ggi_pictures(places: Places) -> list[Pictures]:
    steps = (0, GGI_STEPS)
    headings = tuple(f"generated above, true below, step {step}" for step in steps)
    rows = [validated(places, steps, "000-frames.png")]
    return [Pictures("A scene that training never saw", headings, rows)]


GGI = Demo(
    trainer="training_ggi",
    title="training_ggi: frames between two images",
    explanation=(
        "Six scenes with true motion, five of them prepared once: optical flow, noise warped along it, latents. A LoRA "
        "is trained on a CogVideoX-I2V of random weights, whose VAE is random too: the loss is meant to fall, and the "
        "whole way from images to a clip to work. The pictures of such networks show nothing yet."
    ),
    minutes=4,
    steps=GGI_STEPS,
    prepare=ggi_preparing,
    train=ggi_training,
    use=ggi_inference,
    metric=Metric("loss_t625", "loss at timestep 625", {}),
    pictures=ggi_pictures,
    written=lambda places: {"prepared clips": places.run.parent / "cache", "a generated clip": places.result},
)

# ----------------------------------------------------------------------------------------------------------------------

DEMOS = (REFINER, VAE, NOVA_T2I, NOVA_T2V, MVDIFFUSION, GGI)


def run_demo(demo: Demo, output: Path) -> Part:
    """Data, checkpoint, training up to an interruption, the rest of training, use; StepFailed where one goes wrong."""
    places = Places(
        data=output / "data" / demo.trainer,
        checkpoint=output / "checkpoints" / demo.trainer,
        run=output / demo.trainer / "run",
        result=output / demo.trainer / "result",
    )
    say(demo, demo.title)
    commands = []
    for title, script, more in (
        ("data", "make_demo_data.py", ()),
        ("checkpoints", "make_tiny_checkpoints.py", demo.checkpoint_flags),
    ):
        command = [sys.executable, str(ROOT / "scripts" / script), *flags(output=output / title, only=demo.trainer)]
        commands.append(run_step(f"demo {title}", [*command, *more], ROOT, output, demo))
    for title, command in demo.prepare(places).items():
        commands.append(run_step(title, command, places.data, output, demo))
    train = demo.train(places)
    interrupted, saved_at = run_until_interrupted(demo, train, places, output)
    commands.append(interrupted)
    resume = [*train, "--resume_from_checkpoint", "latest"]
    commands.append(run_step("resume", resume, places.data, output, demo, progress=places.run))
    uses = demo.use(places)
    for title, command in uses.items():
        shown = demo.shown_lines_of_use if title == list(uses)[-1] else 0
        commands.append(run_step(title, command, places.data, output, demo, show=shown))
    return Part(
        trainer=demo.trainer,
        title=demo.title,
        explanation=demo.explanation,
        run_dir=places.run,
        metric=demo.metric,
        commands=commands,
        interrupted_at=saved_at,
        pictures=demo.pictures(places),
        written=written(demo, places),
    )


def written(demo: Demo, places: Places) -> dict[str, Path]:
    """What lies where, by what it is."""
    return {
        "losses and metrics, one line per step": places.run / "metrics.jsonl",
        "settings": places.run / "config.yaml",
        "checkpoints": places.run / f"checkpoint-{demo.steps}",
        "samples of every validation": places.run / "validation",
        "exported weights": places.run / "export",
        **demo.written(places),
    }


def run_until_interrupted(demo: Demo, command: list[str], places: Places, output: Path) -> tuple[Command, int]:
    """Trains, sends SIGTERM after some steps, and finds the checkpoint; returns the command and the step it is of."""

    def interrupt(process: subprocess.Popen, step: int) -> bool:
        if step < INTERRUPT_AT * demo.steps:
            return False
        # `accelerate launch` keeps a signal to itself: the training process is its child.
        for child in psutil.Process(process.pid).children():
            child.terminate()
        say(demo, f"    SIGTERM at step {step}")
        return True

    done = run_step("train", command, places.data, output, demo, progress=places.run, act=interrupt)
    checkpoints = sorted(places.run.glob("checkpoint-*"))
    if len(checkpoints) != 1 or (places.run / "export").exists():
        found = ", ".join(path.name for path in checkpoints) or "none"
        raise StepFailed(f"after SIGTERM one checkpoint and no export were expected in {places.run}; found {found}", 1)
    step = int(checkpoints[0].name.split("-")[1])
    note = f"stopped by SIGTERM, saved {checkpoints[0].name}, exit status 0"
    return Command(done.title, done.line, done.folder, done.seconds, note), step


def run_step(
    title: str,
    command: Sequence[str],
    folder: Path,
    output: Path,
    demo: Demo,
    *,
    progress: Path | None = None,
    act: Callable[[subprocess.Popen, int], bool] | None = None,
    show: int = 0,
) -> Command:
    """Runs a command to its end, its output in a log file; StepFailed with its last lines unless it exits with 0.

    Args:
        progress: a run folder whose losses are shown while the command runs.
        act: called with the process and the step reached, until it returns True.
        show: so many last lines of the output are printed.
    """
    log = output / demo.trainer / "logs" / f"{title.replace(' ', '_')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    line = readable(command, folder)
    say(demo, f"  {title}:\n{wrapped(line, indent='    ')}")
    started, shown, acted = time.monotonic(), 0, act is None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                if STOPPING.wait(POLL_S):
                    raise StepFailed(f"{demo.trainer}, {title}: interrupted", 130)
                latest = last_training_record(progress) if progress else None
                if latest and latest["step"] >= shown + demo.steps // 5:
                    shown = latest["step"]
                    say(demo, f"    step {shown} of {demo.steps}, loss {latest['loss']:.3f}")
                if not acted and latest:
                    acted = act(process, latest["step"])
        finally:
            end(process)
    seconds = time.monotonic() - started
    if process.returncode != 0:
        message = f"{demo.trainer}, {title}: exit status {process.returncode}; the end of {log}:\n"
        message += last_lines(log, SHOWN_LINES)
        raise StepFailed(message, process.returncode)
    if show:
        say(demo, last_lines(log, show))
    say(demo, f"    done in {seconds:.0f} s")
    return Command(title, line, folder.relative_to(ROOT), seconds)


def say(demo: Demo, text: str) -> None:
    """Prints lines behind the part's name, in one piece: several parts print at the same time."""
    lines = [f"{demo.trainer:{NAME_COLUMNS}} | {line}\n" for line in text.splitlines()]
    print("".join(lines), end="", flush=True)


def last_lines(log: Path, count: int) -> str:
    """The end of a command's output, indented; what a progress bar wrote over is left out."""
    text = log.read_bytes().decode(errors="replace").rstrip()
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in lines[-count:])


def end(process: subprocess.Popen) -> None:
    """Ends what a demo that is itself interrupted left behind; nothing if it has ended by itself."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def last_training_record(run_dir: Path) -> dict | None:
    """The newest line about a training step, if there is one yet; a line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    for line in reversed(text.splitlines(keepends=True)):
        record = json.loads(line) if line.endswith("}\n") else {}
        if record.get("kind") == "train" and record["loss"] is not None:
            return record
    return None


def readable(command: Sequence[str], folder: Path) -> str:
    """The command as one would type it in `folder` with the environment activated."""
    shown = []
    for part in command:
        path = Path(part)
        if path.parent == BIN:
            shown.append("python" if part == sys.executable else path.name)
        elif path.is_relative_to(ROOT):
            shown.append(os.path.relpath(path, folder))
        else:
            shown.append(part)
    return shlex.join(shown)


def run_all(demos: Sequence[Demo], output: Path, jobs: int) -> tuple[list[Part], list[StepFailed]]:
    """Runs parts, `jobs` at a time; returns those that finished, in their order, and what went wrong in the others."""
    parts, failures = [], []
    with ThreadPoolExecutor(jobs) as pool:
        longest_first = sorted(demos, key=lambda demo: -demo.minutes)
        running = {demo.trainer: pool.submit(run_demo, demo, output) for demo in longest_first}
        try:
            for demo in demos:
                try:
                    parts.append(running[demo.trainer].result())
                except StepFailed as error:
                    failures.append(error)
        except BaseException:
            STOPPING.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return parts, failures


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen demos, prints the summary and writes the report. Exits with the status of a step that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [demo.trainer for demo in DEMOS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TRAINER")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parts that run at a time")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; it must be 1 or more")
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir(parents=True)
    started = time.monotonic()
    chosen = [demo for demo in DEMOS if demo.trainer in arguments.only]
    parts, failures = run_all(chosen, OUTPUT, arguments.jobs)
    if parts:
        report_parts(parts, failures, (time.monotonic() - started) / 60)
    for error in failures:
        print(f"error: {error}", file=sys.stderr)
    if failures:
        sys.exit(max(1, failures[0].exit_status))


def report_parts(parts: Sequence[Part], failures: Sequence[StepFailed], minutes: float) -> None:
    """Prints the summary and writes report.html."""
    facts = [
        f"{datetime.now():%Y-%m-%d %H:%M}, {minutes:.1f} minutes, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        "Random miniatures of the networks on a few photographs: that the trainers work, not what they can do.",
        *(f"Failed: {str(error).splitlines()[0]}" for error in failures),
    ]
    write_report(OUTPUT / "report.html", "Demo of the trainers", facts, parts)
    print(f"\n{text_table([summary_cells(part) for part in parts])}\n")
    for part in parts:
        print(f"{part.trainer} wrote:")
        print("".join(f"  {what}: {path}\n" for what, path in part.written.items()), end="")
    print(f"report: {OUTPUT / 'report.html'} ({minutes:.1f} minutes in all)")


if __name__ == "__main__":
    main()
