"""The five trainers in small: of what a run of a few steps is made, how it is started, and how its data break."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import make_demo_data
import make_tiny_checkpoints
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from spheres import Sphere, write_object

from common.video import write_video
from diffnext.data.records import RecordWriter
from mvdiffusion.data.poses import fixed_poses
from mvdiffusion.views import VIEW_LISTS

TINY_WFVAE = {
    "_class_name": "WFVAEModel",
    "latent_dim": 4,
    "base_channels": 4,
    "encoder_energy_flow_hidden_size": 4,
    "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}
GGI_LORA = "I2V5B_final_i38800_nearest_lora_weights.safetensors"
NUM_OBJECTS, NUM_RECORDS, NUM_SCENES, NUM_SCENE_IMAGES, SCENE_SIDE_PX = 8, 16, 2, 12, 64
STEPS = 4
# In the spelling that all trainers have: four steps of two samples, each with a checkpoint, without validation before.
HOUSE = (
    f"run.max_train_steps={STEPS} run.mixed_precision=no data.batch_size=1 data.num_workers=0 "
    "checkpoint.checkpointing_steps=1 checkpoint.checkpoints_total_limit=null log.report_to=none "
    "log.log_every_steps=1 validation.validate_at_start=false run.hang_timeout_s=120"
)


@dataclass(frozen=True)
class Trainer:
    """What a promise is tried on.

    Attributes:
        name: of the trainer's folder.
        task: its class in `task.py`.
        launcher: how the guide starts two processes, from the trainer's `folder`.
        script: the documented entry, from there.
        folder: where users stand, from the repository root.
        make: writes `model` and `data` into a folder.
        words: of the command, for these two and a folder for a cache.
        damage: breaks an item of a data folder, which a run meets within its steps; returns the file.
        cached: a setting that a cache depends on, and what is said of it where a run has another one; none where a run
            makes no cache.
        tolerance: relative, within which the metrics of 1 and 2 processes agree.
    """

    name: str
    task: str
    launcher: str
    script: str
    folder: str
    make: Callable[[Path], None]
    words: Callable[[Path, Path, Path], str]
    damage: Callable[[Path], Path]
    cached: tuple[str, str] | None = None
    tolerance: float = 1e-4

    def command(self, tiny: Path, **others: Path) -> list[str]:
        """The words of a small run on what `make` has written into `tiny`, but for other `model`, `data`, `cache`."""
        places = {name: tiny / name for name in ("model", "data", "cache")} | others
        return [*self.words(**places).split(), *HOUSE.split()]


def truncate(path: Path) -> Path:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def with_other_weights(model: Path, part: str, copy: Path) -> Path:
    """A copy of a model folder in which one tensor of `part` is another."""
    shutil.copytree(model, copy)
    path = next((copy / part).glob("*.safetensors"))
    weights = load_file(path)
    name = min(weights)
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    return copy


# gaussian_refiner -----------------------------------------------------------------------------------------------------


def make_refiner(folder: Path) -> None:
    """A folder structurally identical to stable-diffusion-2-1-unclip; 16 pairs, of which the last 10 are held out."""
    make_tiny_checkpoints.make_refiner_checkpoint(folder / "model")
    make_demo_data.make_refiner_data(folder / "data", items=16)


def refiner_words(model: Path, data: Path, cache: Path) -> str:
    return (
        f"--pretrained_model_name_or_path {model} --data_json {data}/example_kitti.json --data_root {data} "
        f"--cache_latents {cache} --windows_per_item 2 --height_px 64 --num_inference_steps 2 --max_validation_items 1 "
        "optim.use_ema=true"
    )


# vae ------------------------------------------------------------------------------------------------------------------


def make_vae(folder: Path) -> None:
    """The json of a WFVAE of some 20,000 weights; eight moving clips of 24 to 31 frames, 48 x 40 px, in two folders."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "wfvae-tiny.json").write_text(json.dumps(TINY_WFVAE))
    y, x = np.mgrid[:40, :48]
    for number in range(8):
        rng = np.random.default_rng(number)
        time = np.arange(24 + number)[:, None, None, None]
        speed, phase = rng.uniform(0.1, 0.4, 3), rng.uniform(0, 6, 3)
        waves = np.sin(x[None, ..., None] * speed + time * 0.3 + phase) + np.cos(y[None, ..., None] * speed[::-1])
        clip = folder / "data" / f"part{number % 2}" / f"{number}.mp4"
        write_video(clip, (waves * 60 + 127).clip(0, 255).astype(np.uint8), 24)


def vae_words(model: Path, data: Path, cache: Path) -> str:
    return (
        f"--model_name WFVAE --model_config {model}/wfvae-tiny.json --video_path {data} --resolution 32 --num_frames 9 "
        "--sample_rate 1 --perceptual_weight 0 --disc_start 0 --wavelet_loss --lr 1e-3 optim.use_ema=true"
    )


# mvdiffusion ----------------------------------------------------------------------------------------------------------


def make_mvdiffusion(folder: Path) -> None:
    """A folder structurally identical to sd-image-variations-diffusers; coloured spheres in six upright views."""
    make_tiny_checkpoints.make_mvdiffusion_checkpoint(folder / "model")
    views = VIEW_LISTS[6]
    for number in range(NUM_OBJECTS):
        rng = np.random.default_rng(number)
        x, y, z = rng.uniform(-0.15, 0.15, 3)
        sphere = Sphere((x, y, z), float(rng.uniform(0.2, 0.4)))
        write_object(folder / "data", f"{number:02d}sphere", views, fixed_poses(views, "upright"), sphere)


def mvdiffusion_words(model: Path, data: Path, cache: Path) -> str:
    return (
        f"--pretrained_model_name_or_path {model} --train_data_dir {data} --cache_latents {cache} "
        "--pretrained_config_path_unet null "
        "--num_views 2 --resolution 64 --num_validation_samples 2 --max_validation_items 1 --num_inference_steps 2 "
        "--validation_guidance_scale 2 --gradient_checkpointing no --lr_warmup_steps 0 --allow_tf32 no "
        "optim.use_ema=true"
    )


# diffnext -------------------------------------------------------------------------------------------------------------


def make_diffnext(folder: Path, kind: str = "t2i") -> None:
    """A tiny NOVA pipeline for images (`t2i`) or clips (`t2v`), and latents of the size that it takes."""
    make_tiny_checkpoints.make_nova_checkpoint(folder / "model", kind, 0)
    network = json.loads((folder / "model" / "transformer" / "config.json").read_text())
    height, width = (side // network["image_stride"] for side in network["image_size"])
    frames = () if kind == "t2i" else (min(5, network["video_base_size"][0]),)
    write_records(folder / "data", (2 * network["image_dim"], *frames, height, width))


def write_records(folder: Path, shape: tuple[int, ...]) -> Path:
    """Random latents with captions."""
    features = {"moments": "bytes", "caption": "string", "text": "string", "shape": ["int64"]}
    features |= {"flow": "float64"} if len(shape) == 4 else {}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with RecordWriter(str(folder), features) as writer:
        for number in range(NUM_RECORDS):
            moments = rng.standard_normal(shape).astype(np.float16)
            moments[shape[0] // 2 :] -= 3
            caption, short = f"A thing with the number {number}. It is long.", f"thing {number}"
            example = {"shape": shape, "moments": moments.tobytes(), "caption": caption, "text": short}
            writer.write(example | ({"flow": float(number % 5 + 1)} if len(shape) == 4 else {}))
    return folder


def diffnext_words(model: Path, data: Path, cache: Path) -> str:
    return (
        f"config=./configs/nova_d48w1024_sdxl1024.yaml pipeline.paths.pretrained_path={model} "
        f"train_dataloader.params.dataset={data} model.gradient_checkpointing=3 ema.params.update_every=1 "
        # The tiny network's own sizes in place of those that the documented configuration gives.
        + "pipeline.paths.module_config.transformer="
        + (model / "transformer" / "config.json").read_text().replace(" ", "").replace("\n", "")
    )


def damage_records(data: Path) -> Path:
    """Overwrites all records of the first half but the very first: a run of four steps meets half of all records."""
    offsets = [[int(word) for word in line.split()] for line in (data / "00000.index").read_text().splitlines()]
    content = bytearray((data / "00000.data").read_bytes())
    for offset, length in offsets[1 : NUM_RECORDS // 2]:
        content[offset : offset + length] = bytes(length)
    (data / "00000.data").write_bytes(content)
    return data / "00000.data"


# training_ggi ---------------------------------------------------------------------------------------------------------


def make_ggi(folder: Path) -> None:
    """CogVideoX, its base LoRA and the annotators in small, for the smallest clips that RAFT takes; two scenes."""
    with pytest.MonkeyPatch.context() as patch:  # a VAE of fewer layers, as it would take most of the time
        patch.setattr(make_tiny_checkpoints, "GGI_VAE", make_tiny_checkpoints.GGI_VAE | {"layers_per_block": 1})
        make_tiny_checkpoints.make_ggi_checkpoint(folder / "model", num_frames=9, height_px=256, width_px=256)
    write_scenes(folder / "data")


def write_scenes(root: Path) -> None:
    """A data root: walls of random texture that move past, each with its caption."""
    for number in range(NUM_SCENES):
        folder = root / f"DL3DV-10K/1K/wall{number}/images_2"
        folder.mkdir(parents=True)
        coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        wall = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        for i in range(NUM_SCENE_IMAGES):
            corner = 2 * i, i * number
            box = (*corner, corner[0] + SCENE_SIDE_PX, corner[1] + SCENE_SIDE_PX)
            wall.crop(box).save(folder / f"frame_{i + 1:05d}.png")
    names = [f"wall{number}" for number in range(NUM_SCENES)]
    (root / "seeds.txt").write_text("".join(f"DL3DV-10K/1K/{name}\n" for name in names))
    (root / "captions.json").write_text(json.dumps({name: f"a photograph of {name}" for name in names}))


def ggi_words(model: Path, data: Path, cache: Path) -> str:
    return (
        f"--pretrained_model_name_or_path {model} --base_lora_path {model}/{GGI_LORA} "
        f"--raft_weights {model}/raft_large.safetensors --hed_weights {model}/ControlNetHED.safetensors "
        f"--midas_path {model}/dpt-hybrid-midas --data_root {data} --height 256 --width 256 --max_num_frames 9 "
        "--detect_resolution 64 --cond hed --flow_scale 2 --enable_tiling no --num_validation_scenes 0 "
        "--num_inference_steps 2 --guidance_scale 1 --allow_tf32 no --rank 4 --lora_alpha 8 --lr_warmup_steps 0 "
        "--learning_rate 1e-3 optim.use_ema=true "
        f"--cache_latents {cache} --cuts_per_scene 1 --noise_sets 2"
    )


# ----------------------------------------------------------------------------------------------------------------------

TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer(
            name="gaussian_refiner",
            task="RefinerTask",
            launcher="accelerate launch --multi_gpu --num_processes 2 --mixed_precision fp16 --main_process_port 0",
            script="train_repair_cross_attn_version.py",
            folder="gaussian_refiner",
            make=make_refiner,
            words=refiner_words,
            damage=lambda data: truncate(data / "gt" / "0002.png"),
            cached=("--windows_per_item 4", "windows_per_item was 2, is 4"),
        ),
        Trainer(
            name="vae",
            task="VaeTask",
            launcher="torchrun --standalone --nproc_per_node 2",
            script="train_ddp.py",
            folder="vae",
            make=make_vae,
            words=vae_words,
            damage=lambda data: truncate(data / "part0" / "0.mp4"),
            tolerance=1e-3,
        ),
        Trainer(
            name="mvdiffusion",
            task="MVTask",
            launcher="accelerate launch --config_file ../accelerate_configs/cpu_2_processes.yaml",
            script="train_image_variation.py",
            folder="mvdiffusion",
            make=make_mvdiffusion,
            words=mvdiffusion_words,
            damage=lambda data: truncate(data / "03" / "03sphere" / "rgb_000_back.png"),
            cached=("--resolution 128", "resolution_px was 64, is 128"),
        ),
        Trainer(
            name="diffnext",
            task="NovaTask",
            launcher="accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 "
            "--main_process_port 0",
            script="scripts/train.py",
            folder=".",
            make=make_diffnext,
            words=diffnext_words,
            damage=damage_records,
        ),
        Trainer(
            name="training_ggi",
            task="GGITask",
            launcher="accelerate launch --config_file default.yaml --num_processes 2 --main_process_port 0",
            script="exps/T073-000.py",
            folder="training_ggi",
            make=make_ggi,
            words=ggi_words,
            damage=lambda data: truncate(data / "DL3DV-10K/1K/wall1/images_2/frame_00006.png"),
            cached=("--detect_resolution 128", "detect_resolution was 64, is 128"),
        ),
    )
}
