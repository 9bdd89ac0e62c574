"""Runs every trainer in miniature by its documented command and reports what came of it; see `scripts/demo.sh`.

A trainer takes part by one entry in DEMOS.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
import torch
from report import Command, Metric, Part, Pictures, summary_cells, text_table, wrapped, write_report

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # the environment's `accelerate`, wherever PATH points
OUTPUT = ROOT / "runs" / "demo"
SHOWN_LINES = 30  # of the output of a command that failed
POLL_S = 0.5


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


@dataclass(frozen=True)
class Demo:
    """One trainer's part of the demo.

    Attributes:
        trainer: name of its folder.
        prepare: commands before training, by title, run from the data folder.
        train: the documented training command, run from the data folder.
        use: the commands that use the trained weights, by title, run from the data folder.
        steps, interrupt_after_steps: optimizer steps of `train`, and after how many it is stopped and resumed.
        checkpoint_flags: for make_tiny_checkpoints.py.
        pictures: for the report, once all is done.
        written: what lies where, for the report.
        shown_lines_of_use: last lines of the output of the last of `use` that go to the terminal.
    """

    trainer: str
    title: str
    explanation: str
    train: Callable[[Places], list[str]]
    use: Callable[[Places], dict[str, list[str]]]
    steps: int
    interrupt_after_steps: int
    metric: Metric | None
    pictures: Callable[[Places], list[Pictures]]
    written: Callable[[Places], dict[str, Path]]
    checkpoint_flags: tuple[str, ...] = ()
    shown_lines_of_use: int = 0
    prepare: Callable[[Places], dict[str, list[str]]] = lambda places: {}


# ----------------------------------------------------------------------------------------------------------------------
# gaussian_refiner

REFINER_STEPS = 500
REFINER_HEIGHT_PX = 192
REFINER_SHOWN_ITEMS = (0, 1, 2, 4)
REFINER_SAMPLING = ["--height_px", str(REFINER_HEIGHT_PX), "--num_inference_steps", "10"]
REFINER_SAMPLING += ["--strength", "0.5", "--guidance_scale", "1"]


def refiner_training(places: Places) -> list[str]:
    """A random network of 0.2 M weights learns at a much higher rate than the pretrained one of 870 M would bear."""
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--mixed_precision", "fp16"]
    command += [str(ROOT / "gaussian_refiner" / "train_repair_cross_attn_version.py")]
    command += ["--pretrained_model_name_or_path", str(places.checkpoint), "--output_dir", str(places.run)]
    command += ["--train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    command += ["--max_train_steps", str(REFINER_STEPS), "--validation_steps", "125", "--checkpoints_total_limit", "2"]
    command += ["--learning_rate", "1e-2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"]
    command += ["--cond_loss_weight", "0", "--windows_per_item", "4", "--cache_latents", str(places.run / "cache")]
    return command + REFINER_SAMPLING


def refiner_repair(places: Places) -> dict[str, list[str]]:
    command = [sys.executable, str(ROOT / "gaussian_refiner" / "infer.py")]
    command += ["--pretrained_model_name_or_path", str(places.run / "export")]
    command += ["--input", "example_kitti.json", "--output", str(places.result)]
    return {"use": command + REFINER_SAMPLING}


def refiner_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    first, last = folder / "step-000000", folder / f"step-{REFINER_STEPS:06d}"
    rows = [
        [
            last / f"{item:03d}-render.png",
            first / f"{item:03d}-repaired.png",
            last / f"{item:03d}-repaired.png",
            last / f"{item:03d}-gt.png",
            last / f"{item:03d}-cond.png",
        ]
        for item in REFINER_SHOWN_ITEMS
    ]
    headings = (
        "render (input)",
        "repaired, step 0",
        f"repaired, step {REFINER_STEPS}",
        "target",
        "other view (input)",
    )
    windows = Pictures(f"Held-out items, windows of {REFINER_HEIGHT_PX} px", headings, rows)
    pairs = json.loads((places.data / "example_kitti.json").read_text())
    rows = [
        [places.data / pairs["render"][item], places.result / f"{item:06d}_{item:04d}.png"]
        + [places.data / pairs[kind][item] for kind in ("gt", "cond")]
        for item in (len(pairs["render"]) - 10 + shown for shown in REFINER_SHOWN_ITEMS[:2])
    ]
    headings = ("render", "repaired", "target", "other view")
    return [windows, Pictures("Whole images, repaired by infer.py with the exported weights", headings, rows)]


REFINER = Demo(
    trainer="gaussian_refiner",
    title="gaussian_refiner: repair of 3D-Gaussian renders",
    explanation=(
        "A UNet with the layout of SD2.1-unCLIP's, but 0.2 million random weights instead of 870 million pretrained "
        "ones, learns from 38 pairs to repair renders, and is measured on 10 held-out ones. Sampling starts from the "
        "half noised render, so that even random weights leave traces of it. The VAE is a miniature too, fitted in "
        "seconds, and loses detail: the ceiling is the PSNR of the target itself after that VAE. The PSNR is meant to "
        "rise from step 0 towards the ceiling. It stays below that of the untouched render: in some minutes this "
        "network learns to copy the render through the VAE, not to repair it."
    ),
    train=refiner_training,
    use=refiner_repair,
    steps=REFINER_STEPS,
    interrupt_after_steps=200,
    metric=Metric("psnr", "PSNR (dB)", {"psnr_render": "untouched render", "psnr_vae": "VAE's ceiling"}),
    pictures=refiner_pictures,
    written=lambda places: {
        "losses and metrics, one line per step": places.run / "metrics.jsonl",
        "settings": places.run / "config.yaml",
        "checkpoints": places.run / f"checkpoint-{REFINER_STEPS}",
        "pictures of every validation": places.run / "validation",
        "trained pipeline": places.run / "export",
        "encoded windows": places.run / "cache",
        "repaired images and metrics.json": places.result,
    },
    checkpoint_flags=("--vae_fit_steps", "400"),
    shown_lines_of_use=14,
)

# ----------------------------------------------------------------------------------------------------------------------

# vae

VAE_STEPS, VAE_DISC_START = 500, 400
VAE_CLIP = {"RESOLUTION": "64", "NUM_FRAMES": "17"}


def vae_training(places: Places) -> list[str]:
    """A random network of 1.9 M weights on clips of 64 px, at a higher rate than the large one of 317 M would bear."""
    command = ["bash", str(ROOT / "vae" / "examples" / "train_ddp.sh")]
    command += ["--model_config", str(places.checkpoint / "wfvae-tiny.json"), "--output_dir", str(places.run)]
    command += ["--video_path", str(places.data / "videos"), "--eval_video_path", str(places.data / "test_video")]
    command += ["--resolution", VAE_CLIP["RESOLUTION"], "--num_frames", "5", "--batch_size", "4", "--lr", "3e-3"]
    command += ["--eval_resolution", VAE_CLIP["RESOLUTION"], "--eval_num_frames", VAE_CLIP["NUM_FRAMES"]]
    command += ["--max_steps", str(VAE_STEPS), "--disc_start", str(VAE_DISC_START), "--eval_steps", "200"]
    command += ["--disc_weight", "0.1", "--dataset_num_worker", "1"]
    command += ["--perceptual_weight", "0", "--ema_decay", "0.98", "--lr_scheduler", "cosine"]
    command += ["--lr_warmup_steps", "10"]
    command += ["--save_ckpt_step", "10000", "--report_to", "none", "--log_steps", "1", "--clip_grad_norm", "2000"]
    return command


def vae_evaluation(places: Places) -> dict[str, list[str]]:
    settings = {**VAE_CLIP, "EXP_NAME": "demo", "CKPT": str(places.run / "export")}
    settings |= {"DATASET_DIR": str(places.data / "test_video"), "METRIC": "psnr,ssim,flicker"}
    environment = ["env", *(f"{name}={value}" for name, value in settings.items())]
    scripts = {"reconstruct": "gen_video.sh", "evaluate": "eval.sh"}
    return {title: [*environment, "bash", str(ROOT / "vae" / "examples" / script)] for title, script in scripts.items()}


def vae_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    steps = (0, VAE_DISC_START, VAE_STEPS)
    rows = [[folder / f"step-{step:06d}" / f"{item:03d}.png"] for item in range(3) for step in steps]
    heading = f"frames in time, input | reconstruction; after steps {', '.join(map(str, steps))} for each clip"
    return [Pictures("Held-out clips", (heading,), rows)]


VAE = Demo(
    trainer="vae",
    title="vae: a video autoencoder",
    explanation=(
        "A WFVAE with 1.9 million random weights instead of 317 million learns to compress clips made of photographs 4 "
        "times in time and 8 x 8 times in space, first without, then with a discriminator, and is measured on held-out "
        "clips of other photographs. The PSNR is meant to rise far above that of step 0. The reconstructions are then "
        "written and measured by the two documented scripts."
    ),
    train=vae_training,
    use=vae_evaluation,
    steps=VAE_STEPS,
    interrupt_after_steps=150,
    metric=Metric("psnr", "PSNR (dB)", {}),
    pictures=vae_pictures,
    written=lambda places: {
        "losses and metrics": places.run / "metrics.jsonl",
        "checkpoints": places.run / f"checkpoint-{VAE_STEPS}",
        "clips and frames of every validation": places.run / "validation",
        "trained autoencoder": places.run / "export",
        "reconstructed clips": places.data / "video_gen",
    },
    shown_lines_of_use=8,
)

# ----------------------------------------------------------------------------------------------------------------------

# diffnext

NOVA_T2I_STEPS, NOVA_T2V_STEPS = 1000, 400
NOVA_LATENT_LENGTH = 5  # 17 frames
NOVA_SAMPLING = {"num_inference_steps": "8", "num_diffusion_steps": "25", "guidance_scale": "3"}
NOVA_T2I_PROMPTS = ("an astronaut", "a cat", "stars", "a rocket", "a cup of coffee", "a motorcycle")
NOVA_T2V_PROMPTS = ("a motorcycle", "an astronaut", "a rocket", "a cat")


def nova_cache(places: Places, source: str, *settings: str) -> dict[str, list[str]]:
    command = [sys.executable, "-m", "diffnext.build_cache", "--source", source]
    command += ["--vae", str(places.checkpoint / "vae"), "--output_dir", "cache", *settings]
    return {"build cache": [*command, "--num_workers", "0", "--verify", "4"]}


def nova_training(places: Places, config: str, steps: int, prompts: Sequence[str], *more: str) -> list[str]:
    """A random network of 0.5 M weights on some 50 samples learns at a higher rate than the released ones."""
    paths = (ROOT / "configs" / config, places.checkpoint, places.run)
    configuration, checkpoint, run = (os.path.relpath(path, places.data) for path in paths)
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "1", "--mixed_precision", "no"]
    command += [str(ROOT / "scripts" / "train.py"), f"config={configuration}"]
    command += [f"pipeline.paths.pretrained_path={checkpoint}"]
    command += [
        "pipeline.paths.module_config=null",
        f"experiment.output_dir={os.path.relpath(places.run, places.data)}",
    ]
    command += ["train_dataloader.params.dataset=cache", "train_dataloader.params.num_workers=0"]
    command += [f"training.max_train_steps={steps}", "experiment.log_every=1", f"experiment.save_every={steps}"]
    command += ["optimizer.params.lr=2e-3", "lr_scheduler.target=CosineLR", "ema.params.update_every=2"]
    command += ["training.mixed_precision=no"]  # on a CPU faster than the configuration's bf16
    command += ["validation.validate_at_start=true", f"validation.validation_steps={steps}", "log.report_to=none"]
    command += [f"validation.prompts=[{','.join(prompts)}]"]
    command += [f"validation.{name}={value}" for name, value in NOVA_SAMPLING.items()]
    return [*command, *more]


def nova_generation(places: Places, *settings: str) -> dict[str, list[str]]:
    command = [sys.executable, "-m", "diffnext.infer", "--pretrained_path", str(places.checkpoint)]
    command += ["--transformer", str(places.run / "export" / "transformer"), "--prompts", "prompts.txt"]
    command += ["--output", str(places.result), "--batch_size", "8"]
    command += [word for name, value in NOVA_SAMPLING.items() for word in (f"--{name}", value)]
    return {"use": [*command, *settings]}


def nova_written(places: Places, steps: int) -> dict[str, Path]:
    return {
        "losses": places.run / "metrics.jsonl",
        "cache of latents": places.data / "cache",
        "checkpoints": places.run / f"checkpoint-{steps}",
        "samples of every validation": places.run / "validation",
        "trained transformer": places.run / "export",
        "generated by infer.py": places.result,
    }


def nova_t2i_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    rows = [
        [
            places.data / "images" / f"{number:03d}.png",
            folder / "step-000000" / f"{number:03d}.png",
            folder / f"step-{NOVA_T2I_STEPS:06d}" / f"{number:03d}.png",
            places.result / f"{number:05d}.png",
        ]
        for number in range(len(NOVA_T2I_PROMPTS))
    ]
    headings = ("a photograph", "generated, step 0", f"generated, step {NOVA_T2I_STEPS}", "by infer.py")
    return [Pictures(f"Generated from the words: {', '.join(NOVA_T2I_PROMPTS)}", headings, rows)]


def nova_t2v_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    steps = (0, NOVA_T2V_STEPS)
    rows = [
        [folder / f"step-{step:06d}" / f"{n:03d}-frames.png" for step in steps] for n in range(len(NOVA_T2V_PROMPTS))
    ]
    headings = tuple(f"frames in time, step {step}" for step in steps)
    return [Pictures(f"Clips generated from the words: {', '.join(NOVA_T2V_PROMPTS)}", headings, rows)]


NOVA_T2I = Demo(
    trainer="diffnext_t2i",
    title="diffnext: NOVA, text to image",
    explanation=(
        "A VAE with random weights, set to average and interpolate and then fitted for seconds, encodes 48 windows of "
        "six photographs into a cache. A NOVA of random weights learns from it to generate latents of 8 x 8, token set "
        "by token set, out of a random text encoder's view of some words. The loss is meant to fall, and the pictures "
        "to show what the words name, as blurred as the VAE is."
    ),
    prepare=lambda places: nova_cache(places, "images.csv"),
    train=lambda places: nova_training(
        places, "nova_d48w1024_sdxl1024.yaml", NOVA_T2I_STEPS, NOVA_T2I_PROMPTS, "training.batch_size=16"
    ),
    use=nova_generation,
    steps=NOVA_T2I_STEPS,
    interrupt_after_steps=400,
    metric=None,
    pictures=nova_t2i_pictures,
    written=lambda places: nova_written(places, NOVA_T2I_STEPS),
    checkpoint_flags=("--vae_fit_steps", "25"),
)
NOVA_T2V = Demo(
    trainer="diffnext_t2v",
    title="diffnext: NOVA, text to video",
    explanation=(
        "As above with ten clips of a camera that moves over photographs: 17 frames are 5 frames of latents, each "
        "generated after those before it. The loss of first frames and of all others is meant to fall."
    ),
    prepare=lambda places: nova_cache(
        places, "clips.jsonl", "--resize", "96", "--crop_size", "64,96", "--frame_ids", "0:34:2", "--flow", "measure"
    ),
    train=lambda places: nova_training(
        places,
        "nova_d48w1024_osp480.yaml",
        NOVA_T2V_STEPS,
        NOVA_T2V_PROMPTS,
        "training.batch_size=4",
        f"validation.max_latent_length={NOVA_LATENT_LENGTH}",
    ),
    use=lambda places: nova_generation(places, "--max_latent_length", str(NOVA_LATENT_LENGTH)),
    steps=NOVA_T2V_STEPS,
    interrupt_after_steps=150,
    metric=None,
    pictures=nova_t2v_pictures,
    written=lambda places: nova_written(places, NOVA_T2V_STEPS),
    checkpoint_flags=("--vae_fit_steps", "5"),
)

# ----------------------------------------------------------------------------------------------------------------------
# mvdiffusion

VIEWS_STEPS = 700
VIEWS_PHOTOS = ("cup", "rocket")


def views_training(places: Places) -> list[str]:
    """A network of 0.7 M weights, most of them random, at a higher rate than the pretrained one of 910 M would bear."""
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "1"]
    command += [str(ROOT / "mvdiffusion" / "train_image_variation.py")]
    command += ["--pretrained_model_name_or_path", str(places.checkpoint), "--pretrained_config_path_unet", "null"]
    command += ["--train_data_dir", "views", "--resolution", "64", "--num_validation_samples", "4"]
    command += ["--output_dir", str(places.run), "--max_train_steps", str(VIEWS_STEPS), "--validation_steps", "350"]
    command += ["--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--mixed_precision", "no"]
    command += ["--learning_rate", "3e-3", "--lr_scheduler", "cosine", "--lr_warmup_steps", "20"]
    command += ["--ema_decay", "0.99", "--prediction_type", "v_prediction", "--gradient_checkpointing", "no"]
    command += ["--bg_color", "white", "--cache_latents", str(places.run / "cache"), "--validation_dir", "photos"]
    command += ["--validation_guidance_scale", "1.5", "--num_inference_steps", "10", "--checkpoints_total_limit", "2"]
    return [*command, "--checkpointing_steps", "700", "--dataloader_num_workers", "0", "--report_to", "none"]


def views_inference(places: Places) -> dict[str, list[str]]:
    command = [sys.executable, str(ROOT / "mvdiffusion" / "infer.py"), "--model", str(places.run / "export")]
    command += ["--input", "photos", "--output_dir", str(places.result), "--num_inference_steps", "10"]
    return {"use": [*command, "--guidance_scale", "1.5", "--eta", "0"]}


def views_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    steps = (0, VIEWS_STEPS)
    rows = [[folder / f"step-{step:06d}" / f"{index:03d}-cfg1.5.png" for step in steps] for index in range(2)]
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
        "sampled and true normals to fall from the 90 degrees of chance; outlines and colours come first."
    ),
    train=views_training,
    use=views_inference,
    steps=VIEWS_STEPS,
    interrupt_after_steps=250,
    metric=Metric("psnr", "PSNR of the views (dB)", {}),
    pictures=views_pictures,
    written=lambda places: {
        "losses and metrics, one line per step": places.run / "metrics.jsonl",
        "settings": places.run / "config.yaml",
        "checkpoints": places.run / f"checkpoint-{VIEWS_STEPS}",
        "sheets of every validation": places.run / "validation",
        "trained pipeline": places.run / "export",
        "encoded objects": places.run / "cache",
        "views of photographs": places.result,
    },
    checkpoint_flags=("--vae_fit_steps", "60"),
)

# ----------------------------------------------------------------------------------------------------------------------
# training_ggi

GGI_STEPS = 120
GGI_CACHE = ["--cuts_per_scene", "2", "--noise_sets", "2"]


def ggi_settings(places: Places) -> list[str]:
    """Small clips of the demo scenes, whose edges lie beside them, and the tiny networks."""
    checkpoint = places.checkpoint
    settings = ["--pretrained_model_name_or_path", str(checkpoint), "--enable_tiling", "no", "--mixed_precision", "no"]
    settings += ["--base_lora_path", str(checkpoint / "I2V5B_final_i38800_nearest_lora_weights.safetensors")]
    settings += ["--raft_weights", str(checkpoint / "raft_large.safetensors"), "--data_root", "."]
    settings += ["--height", "256", "--width", "384", "--max_num_frames", "9", "--cond", "precomputed"]
    settings += ["--num_validation_scenes", "1", "--flow_scale", "4", "--report_to", "none", *GGI_CACHE]
    return [*settings, "--cache_latents", str(places.run.parent / "cache"), "--output_dir", str(places.run)]


def ggi_preparing(places: Places) -> dict[str, list[str]]:
    return {"prepared clips": [sys.executable, "-m", "training_ggi.prepare", *ggi_settings(places)]}


def ggi_training(places: Places) -> list[str]:
    """A new LoRA on a transformer of 0.3 M random weights, at a higher rate than that of 5.6 billion would bear."""
    command = [str(BIN / "accelerate"), "launch", "--num_processes", "1"]
    command += [str(ROOT / "training_ggi" / "exps" / "T073-000.py"), *ggi_settings(places)]
    command += ["--gradient_accumulation", "1", "--batch_size", "2", "--max_train_steps", str(GGI_STEPS)]
    command += ["--learning_rate", "5e-3", "--lr_warmup_steps", "10", "--rank", "16", "--lora_alpha", "16"]
    command += ["--validation_steps", str(GGI_STEPS), "--validate_at_start", "yes", "--num_inference_steps", "4"]
    return [*command, "--checkpointing_steps", str(GGI_STEPS), "--dataloader_num_workers", "0"]


def ggi_inference(places: Places) -> dict[str, list[str]]:
    command = [sys.executable, "-m", "training_ggi.infer", "--result", str(places.run / "export")]
    command += ["--first", "segment/ends/frame_00001.png", "--last", "segment/ends/frame_00002.png"]
    command += ["--edges", "segment/edges", "--flow", "segment/flow.npy", "--output_dir", str(places.result)]
    return {"use": [*command, "--num_inference_steps", "4", "--enable_tiling", "no", "--frames"]}


def ggi_pictures(places: Places) -> list[Pictures]:
    folder = places.run / "validation"
    steps = (0, GGI_STEPS)
    headings = tuple(f"generated above, true below, step {step}" for step in steps)
    rows = [[folder / f"step-{step:06d}" / "000-frames.png" for step in steps]]
    return [Pictures("A scene that training never saw", headings, rows)]


GGI = Demo(
    trainer="training_ggi",
    title="training_ggi: frames between two images",
    explanation=(
        "Six scenes with true motion, five of them prepared once: optical flow, noise warped along it, latents. A LoRA "
        "is trained on a CogVideoX-I2V of random weights, whose VAE is random too: the loss is meant to fall, and the "
        "whole way from images to a clip to work. The pictures of such networks show nothing yet."
    ),
    prepare=ggi_preparing,
    train=ggi_training,
    use=ggi_inference,
    steps=GGI_STEPS,
    interrupt_after_steps=50,
    metric=Metric("loss_t625", "loss at timestep 625", {}),
    pictures=ggi_pictures,
    written=lambda places: {
        "losses and metrics, one line per step": places.run / "metrics.jsonl",
        "settings": places.run / "config.yaml",
        "checkpoints": places.run / f"checkpoint-{GGI_STEPS}",
        "clips of every validation": places.run / "validation",
        "LoRA and input projection": places.run / "export",
        "prepared clips": places.run.parent / "cache",
        "a generated clip": places.result,
    },
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
    make = [sys.executable, str(ROOT / "scripts" / "make_demo_data.py"), "--output", str(output / "data")]
    commands = [run_step("demo data", [*make, "--only", demo.trainer], ROOT, output, demo)]
    make = [sys.executable, str(ROOT / "scripts" / "make_tiny_checkpoints.py"), "--output", str(output / "checkpoints")]
    command = [*make, "--only", demo.trainer, *demo.checkpoint_flags]
    commands.append(run_step("tiny checkpoint", command, ROOT, output, demo))
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
        written=demo.written(places),
    )


def run_until_interrupted(demo: Demo, command: list[str], places: Places, output: Path) -> tuple[Command, int]:
    """Trains, sends SIGTERM after some steps, and finds the checkpoint; returns the command and the step it is of."""

    def interrupt(process: subprocess.Popen, step: int) -> bool:
        if step < demo.interrupt_after_steps:
            return False
        # `accelerate launch` keeps a signal to itself: the training process is its child.
        for child in psutil.Process(process.pid).children():
            child.terminate()
        print(f"    SIGTERM at step {step}", flush=True)
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
    print(f"  {title}:\n{wrapped(line, indent='    ')}", flush=True)
    started, shown, acted = time.monotonic(), 0, act is None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                latest = last_training_record(progress) if progress else None
                if latest and latest["step"] >= shown + demo.steps // 10:
                    shown = latest["step"]
                    print(f"    step {shown} of {demo.steps}, loss {latest['loss']:.3f}", flush=True)
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
        print(last_lines(log, show))
    print(f"    done in {seconds:.0f} s", flush=True)
    return Command(title, line, folder.relative_to(ROOT), seconds)


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
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]
    training = [record for record in records if record["kind"] == "train" and record["loss"] is not None]
    return training[-1] if training else None


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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen demos, prints the summary and writes the report. Exits with the status of a step that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [demo.trainer for demo in DEMOS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TRAINER")
    chosen = parser.parse_args(argv).only
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    OUTPUT.mkdir(parents=True)
    started, parts = time.monotonic(), []
    for demo in DEMOS:
        if demo.trainer in chosen:
            print(demo.title, flush=True)
            try:
                parts.append(run_demo(demo, OUTPUT))
            except StepFailed as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(error.exit_status if error.exit_status > 0 else 1)
    minutes = (time.monotonic() - started) / 60
    facts = [
        f"{datetime.now():%Y-%m-%d %H:%M}, {minutes:.1f} minutes, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}",
        "Random miniatures of the networks on a few photographs: that the trainers work, not what they can do.",
    ]
    write_report(OUTPUT / "report.html", "Demo of the trainers", facts, parts)
    print(f"\n{text_table([summary_cells(part) for part in parts])}\n")
    for part in parts:
        print(f"{part.trainer} wrote:")
        print("".join(f"  {what}: {path}\n" for what, path in part.written.items()), end="")
    print(f"report: {OUTPUT / 'report.html'} ({minutes:.1f} minutes in all)")


if __name__ == "__main__":
    main()
