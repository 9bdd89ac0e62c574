"""From segments on disk to clips, the sampler beside diffusers' pipeline, and the formats of trained weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import make_tiny_checkpoints
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline
from PIL import Image
from running import on_ranks
from safetensors.torch import load_file

from common.checkpoint import TRAINER_STATE, TrainedWeights, save_weights, seal
from common.config import to_dict, to_yaml
from common.video import load_image, probe_video, read_frames
from training_ggi import export, infer
from training_ggi.config import GGIConfig, GGIData, GGIModel
from training_ggi.infer import PARSER, main
from training_ggi.models.base_lora import read_lora_file, set_up_training
from training_ggi.models.components import (
    decode_video,
    encode_prompts,
    load_scheduler_config,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    video_moments,
)
from training_ggi.models.objective import end_image_latents, sample_posterior
from training_ggi.models.results import export_upstream, save_result
from training_ggi.models.transformer import load_transformer, model_input, predict_velocity, rotary_for
from training_ggi.sampling import _dynamic, generate_clip
from training_ggi.segments import read_correspondences, read_edges, read_flow, read_noise, read_segments
from training_ggi.trained import find_trained, load_trained

HEIGHT, WIDTH, NUM_FRAMES = 32, 48, 9
FRAMES = NUM_FRAMES - 3  # the last 3 are stills
LATENTS = 3, 16, 4, 6
MODES = ("lora", "full", "base_lora")
FEW = [
    "--num_inference_steps",
    "2",
    "--device",
    "cpu",
    "--mixed_precision",
    "no",
    "--flow_scale",
    "4",
]
CLIP_FILES = ["clip.json", "clip.mp4", "last.png"]


@pytest.fixture(autouse=True)
def on_cpu(clean_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cpu` hides the GPUs: from this test alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoints.make_ggi_checkpoint(
        tmp_path_factory.mktemp("ggi") / "tiny", num_frames=NUM_FRAMES, height_px=HEIGHT, width_px=WIDTH
    )


@pytest.fixture(scope="module")
def base_lora(base: Path) -> Path:
    return base / make_tiny_checkpoints.GGI_BASE_LORA


def settings(base: Path, base_lora: Path, mode: str) -> GGIConfig:
    model = {"pretrained_model_name_or_path": str(base), "base_lora_path": str(base_lora), "train_mode": mode}
    return GGIConfig(
        model=GGIModel(**model, rank=3, lora_alpha=6.0),
        data=GGIData(height=HEIGHT, width=WIDTH, max_num_frames=NUM_FRAMES),
    )


@pytest.fixture(scope="module")
def runs(base: Path, base_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of all train modes: settings, one checkpoint, export."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    for mode in MODES:
        run, config = root / mode, settings(base, base_lora, mode)
        transformer = load_transformer(base, torch_dtype=torch.float32)
        set_up_training(transformer, mode, read_lora_file(base_lora, transformer), rank=3, alpha=6)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        checkpoint = run / "checkpoint-2"
        save_weights(transformer if mode == "full" else TrainedWeights(transformer), checkpoint / "transformer")
        (checkpoint / TRAINER_STATE).write_text(json.dumps({"config": to_dict(config)}))
        seal(checkpoint)
        (run / "config.yaml").write_text(to_yaml(config))
        if mode == "full":
            export_upstream(transformer, run / "export/transformer", dtype=torch.float32)
        else:
            save_result(transformer, run / "export", mode)  # type: ignore[arg-type]
        folders[mode] = run
    return folders


@torch.no_grad()
def velocity(transformer: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(1, *LATENTS, generator=generator) for _ in range(3)]
    prompt = torch.randn(1, 226, 32, generator=generator)
    rotary = rotary_for(transformer, parts[0])  # type: ignore[arg-type]
    return predict_velocity(transformer, model_input(*parts), prompt, torch.tensor([400]), rotary)


def smooth(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def write_correspondences(path: Path, values: np.ndarray) -> None:
    """uint16 (h, w, 3) as .png."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values, np.uint16), format="rgb48le")
    with av.open(str(path), "w", format="image2") as container:
        stream: Any = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = *values.shape[:2], "rgb48be"
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def correspondences(dx: float, dy: float, height: int = HEIGHT // 2, width: int = WIDTH // 2) -> np.ndarray:
    """uint16 (h, w, 3) of a shift, unknown where it leaves the frame."""
    x, y = np.arange(width) + dx, np.arange(height)[:, None] + dy
    known = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    values = np.stack(
        np.broadcast_arrays(x / width * 65536, 65535 - y / height * 65536, np.where(known, 65535, 0)), axis=-1
    )
    return np.where(known[..., None], values, 0).round().clip(0, 65535)  # (h, w, 3)


def make_segments(root: Path, arcs: int = 2) -> Path:
    for number in range(arcs + 1):
        smooth(number).save(root / f"image_{number}.png")
    for number in range(arcs):
        arc = root / f"arc{number}"
        (arc / "hed").mkdir(parents=True)
        for key in range(4):
            write_correspondences(arc / f"{key:02d}.png", correspondences(1 + number, 0.5 * key))
        for frame in range(FRAMES):
            smooth(frame, (80, 88)).convert("L").save(arc / f"hed/{frame}.png")
    return root


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arcs and three anchors beside them."""
    return make_segments(tmp_path_factory.mktemp("scene"))


# The sampler ----------------------------------------------------------------------------------------------------------


class StockPipeline(CogVideoXImageToVideoPipeline):
    """Diffusers' own loop, with our noise and conditions in the place of what it would prepare."""

    given: tuple[torch.Tensor, torch.Tensor]

    def prepare_latents(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.given


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_sampler_is_that_of_diffusers(kind, base, runs):
    transformer = load_trained(find_trained(str(runs["lora"])), torch.float32)
    vae, tokenizer, text_encoder = load_vae(str(base)), load_tokenizer(str(base)), load_text_encoder(str(base))
    prompts = encode_prompts(tokenizer, text_encoder, ["a cat", ""])
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(1, 2, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1
    cond = video_moments(vae, torch.rand(1, NUM_FRAMES, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1)
    noise = torch.randn(1, *LATENTS, generator=generator)
    config = load_scheduler_config(str(base)) | {"_class_name": kind.__name__}
    clip = generate_clip(
        transformer,
        vae,
        ends,
        cond,
        prompts[:1],
        prompts[1:],
        noise,
        num_inference_steps=3,
        guidance_scale=3.0,
        scheduler_config=config,
        generators=[torch.Generator().manual_seed(7)],
    )
    assert clip.shape == (1, FRAMES, 3, HEIGHT, WIDTH)

    draws = torch.Generator().manual_seed(7)
    first, last, edges = (
        sample_posterior(moments, torch.randn(1, moments.shape[2], *LATENTS[1:], generator=draws), 0.7)
        for moments in (video_moments(vae, ends[:, :1]), video_moments(vae, ends[:, 1:]), cond)
    )
    pipeline = StockPipeline(tokenizer, text_encoder, vae, transformer, kind.from_config(config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.given = noise, torch.cat([end_image_latents(first, last, 3), edges], dim=2)
    latents = pipeline(
        image=Image.new("RGB", (WIDTH, HEIGHT)),
        prompt="a cat",
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=draws,
        output_type="latent",
    ).frames
    assert torch.allclose(clip, decode_video(vae, latents)[:, :FRAMES], atol=1e-4)


def test_guidance(base, runs, monkeypatch):
    """A scale of 1 or an empty prompt needs one call a step; the dynamic scale rises from 1 to 1 + scale."""
    vae, config = load_vae(str(base)), load_scheduler_config(str(base))
    transformer = load_trained(find_trained(str(runs["lora"])), torch.float32)
    arguments = (
        torch.zeros(1, 2, 3, HEIGHT, WIDTH),
        torch.zeros(1, 32, 3, 4, 6),
        torch.zeros(1, 226, 32),
        torch.ones(1, 226, 32),
        torch.zeros(1, *LATENTS),
    )
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    for scale, dynamic in ((1.0, False), (2.0, False), (1.0, True)):
        options = {"guidance_scale": scale, "use_dynamic_cfg": dynamic, "num_inference_steps": 2}
        generate_clip(transformer, vae, *arguments, **options, scheduler_config=config)
    assert len(calls) == 2 + 4 + 4
    calls.clear()
    empty = arguments[3]
    both = (*arguments[:2], empty, *arguments[3:])
    options = {"guidance_scale": 2.0, "num_inference_steps": 2}
    assert generate_clip(transformer, vae, *both, **options, scheduler_config=config).shape[1] == FRAMES
    assert len(calls) == 2
    assert [round(_dynamic(6.0, step, 10), 3) for step in (0, 5, 8, 10)] == [1.0, 1.014, 2.454, 7.0]
    expected = "the base model's scheduler is PNDM: expected CogVideoXDDIMScheduler or CogVideoXDPMScheduler"
    with pytest.raises(ValueError, match=expected):
        generate_clip(transformer, vae, *arguments, scheduler_config={"_class_name": "PNDM"})


# Segments on disk -----------------------------------------------------------------------------------------------------


def test_segments_of_scenes(segments, tmp_path):
    (chain,) = read_segments(segments, tmp_path)
    assert [each.name for each in chain] == ["arc0", "arc1"]
    assert (chain[0].first, chain[0].last) == (segments / "image_0.png", segments / "image_1.png")
    assert (chain[1].first, chain[1].before) == (None, tmp_path / "arc0")
    assert (chain[1].last, chain[1].flow, chain[1].noise) == (segments / "image_2.png", segments / "arc1", None)
    apart = read_segments(segments, tmp_path, chain=False)
    assert [[each.name for each in group] for group in apart] == [["arc0"], ["arc1"]]
    assert (apart[1][0].first, apart[1][0].before) == (segments / "image_1.png", None)
    ((one,),) = read_segments(segments / "arc1", tmp_path)
    assert (one.name, one.first, one.output) == ("arc1", segments / "image_1.png", tmp_path / "arc1")

    scenes = tmp_path / "scenes"
    for name in ("b", "a"):
        shutil.copytree(segments, scenes / name)
    (scenes / "a/arc1/noises.npy").touch()
    for number in (9, 10):  # of an arc's own images the first and last count, 10 being after 9
        smooth(number).save(scenes / f"b/arc0/image_{number}.png")
    chains = read_segments(scenes, tmp_path)
    assert [[each.name for each in chain] for chain in chains] == [["a/arc0", "a/arc1"], ["b/arc0", "b/arc1"]]
    assert (chains[0][1].flow, chains[0][1].noise) == (None, scenes / "a/arc1/noises.npy")
    assert [p.name for p in (chains[1][0].first, chains[1][0].last)] == ["image_9.png", "image_10.png"]


def test_what_segments_lack_is_named(segments, tmp_path):
    with pytest.raises(ValueError, match="holds no segments: folders arc0, arc1, ..., or folders that hold those"):
        read_segments(tmp_path, tmp_path)
    scene = tmp_path / "scene"
    shutil.copytree(segments, scene)
    (scene / "image_2.png").unlink()
    expected = r"arc0 holds 0 end images \(image_\*\) and .* 2 for 2 arcs: expected 2 in each arc, or 3 beside the arcs"
    with pytest.raises(ValueError, match=expected):
        read_segments(scene, tmp_path)
    for image in (scene / "arc0").glob("*.png"):
        image.unlink()
    with pytest.raises(FileNotFoundError, match="arc0 has no motion: neither 16-bit .png images of correspondences"):
        read_segments(scene, tmp_path)
    shutil.rmtree(scene / "arc0/hed")
    with pytest.raises(FileNotFoundError, match="arc0 has no edge images: they are looked for in hed/"):
        read_segments(scene, tmp_path)


def test_correspondences(tmp_path):
    values = np.zeros((2, 4, 3))
    values[0, 1] = 32768, 65535, 100  # (1, 0) moves to x = 2, y = 0
    values[1, 3] = 0, 65535 - 32768, 65535  # (3, 1) moves to x = 0, y = 1
    values[1, 0] = 32768, 0, 99
    write_correspondences(tmp_path / "a.png", values)
    unknown = -10000.0
    expected = [
        [[unknown, 1, unknown, unknown], [unknown, unknown, unknown, -3]],
        [[unknown, 0, unknown, unknown], [unknown, unknown, unknown, 0]],
    ]
    assert read_correspondences(tmp_path / "a.png").tolist() == expected
    assert read_correspondences(tmp_path / "a.png", 0.5)[:, 0, 1].tolist() == [0.5, -0.5]
    smooth(0).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: is an image of type rgb24: correspondences are 16-bit RGB"):
        read_correspondences(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="c.png: cannot be read as an image"):
        read_correspondences(tmp_path / "c.png")


def test_flow_is_brought_to_half_the_clip(tmp_path):
    flow = np.zeros((2, 2, 16, 48), np.float32)
    flow[1] = [[[4.0]], [[1.0]]]
    np.save(tmp_path / "flow.npy", flow)
    read = read_flow(tmp_path / "flow.npy", 64, 96)
    assert read.shape == (1, 2, 2, 32, 48)
    assert read[0, 1, :, 5, 7].tolist() == [4.0, 2.0] and not read[0, 0].any()
    (tmp_path / "flows").mkdir()
    for number, each in zip((9, 10), flow, strict=True):
        np.save(tmp_path / f"flows/{number}.npy", each)
    assert torch.equal(read_flow(tmp_path / "flows", 64, 96), read)
    np.save(tmp_path / "last.npy", flow.transpose(0, 2, 3, 1))
    expected = r"last.npy holds float32 of shape \(2, 16, 48, 2\): expected floating-point \(T, 2, h, w\)"
    with pytest.raises(ValueError, match=expected):
        read_flow(tmp_path / "last.npy", 64, 96)
    flow[0, 0, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", flow)
    with pytest.raises(ValueError, match="nan.npy holds values that are not finite; mark unknown motion by -10000"):
        read_flow(tmp_path / "nan.npy", 64, 96)
    (tmp_path / "text.npy").write_text("no")
    with pytest.raises(ValueError, match="text.npy cannot be read as an .npy file"):
        read_flow(tmp_path / "text.npy", 64, 96)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no motion: neither .npy files nor 16-bit .png images"):
        read_flow(tmp_path / "none", 64, 96)


def test_noise_and_edges_take_the_nearest_frames(tmp_path):
    noise = np.random.default_rng(0).normal(size=(9, 8, 12, 16)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    read = read_noise(tmp_path / "noise.npy", (5, 8, 12))
    assert np.array_equal(read[0].permute(0, 2, 3, 1), noise[::2])
    expected = r"holds float32 of shape \(9, 8, 12, 16\): expected floating-point \(frames, 60, 90, 16\)"
    with pytest.raises(ValueError, match=expected):
        read_noise(tmp_path / "noise.npy", (13, 60, 90))
    (tmp_path / "edges").mkdir()
    for number in range(11):
        Image.new("L", (WIDTH, HEIGHT), 10 * number).save(tmp_path / f"edges/{number}.png")
    edges = read_edges(tmp_path / "edges", 3, HEIGHT, WIDTH)
    assert edges.shape == (3, HEIGHT, WIDTH) and edges[:, 0, 0].tolist() == [0, 50, 100]
    with pytest.raises(ValueError, match="holds no edge images: files ending in .png"):
        read_edges(tmp_path, 3, HEIGHT, WIDTH)


# The command ----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def run(result: Path, *arguments: object, num_processes: int = 1) -> dict[str, str]:
    """Why segments went wrong, of all processes, by name."""
    config, _ = PARSER.parse(["--model", str(result), *map(str, arguments), *FEW])
    done = on_ranks(num_processes, lambda rank: infer.infer(config, rank, torch.float32))
    return {name: reason for each in done for name, reason in each.items()}


def test_a_chain_of_segments(runs, segments, tmp_path, capsys):
    output = tmp_path / "clips"
    arguments = ["--model", str(runs["lora"]), "--input", str(segments), "--output_dir", str(output), *FEW]
    arguments += ["--frames", "true", "--write_noise", "true"]
    main(arguments)
    printed = capsys.readouterr()
    assert "2 of 2 segments are there" in printed.out
    assert "2 of 2 segments have no prompt, so that guidance changes nothing and is left out: describe" in printed.err
    frames = [f"frames/{number:03d}.png" for number in range(FRAMES)]
    for name in ("arc0", "arc1"):
        assert files(output / name) == sorted([*CLIP_FILES, *frames, "noises.npy"])
        info = probe_video(output / name / "clip.mp4")
        assert (info.num_frames, info.fps, info.width_px, info.height_px) == (FRAMES, 8, WIDTH, HEIGHT)
        last = np.asarray(load_image(output / name / "last.png"))
        assert np.array_equal(last, np.asarray(load_image(output / name / frames[-1])))
    noise = np.load(output / "arc0/noises.npy")
    assert (noise.shape, noise.dtype) == ((3, 4, 6, 16), np.float32) and abs(noise.std() - 1) < 0.1
    records = [json.loads((output / name / "clip.json").read_text()) for name in ("arc0", "arc1")]
    assert [each["first"] for each in records] == [str(segments / "image_0.png"), str(output / "arc0/last.png")]
    assert records[0]["result"] == str(runs["lora"])
    assert records[0]["degradation"] == 0.5 and records[0]["prompt"] == ""

    # What is missing is made again, and is the same; the rest is left alone.
    made = {name: (output / name).read_bytes() for name in ("arc0/clip.mp4", "arc1/clip.mp4")}
    (output / "arc1/clip.json").unlink()
    kept = (output / "arc0/clip.mp4").stat().st_mtime_ns
    main(arguments)
    assert "1 of 2 segments exist and are kept" in capsys.readouterr().out
    assert (output / "arc0/clip.mp4").stat().st_mtime_ns == kept
    assert {name: (output / name).read_bytes() for name in made} == made
    with pytest.raises(SystemExit):
        main([*arguments, "--seed", "1"])
    expected = "clip.json was made with another seed: give another --output_dir, or --overwrite true"
    assert expected in capsys.readouterr().err


def test_older_spellings_hold():
    rest = ["--input", "i", "--output_dir", "o"]
    assert PARSER.parse(["--result", "log", *rest]) == PARSER.parse(["--model", "log", *rest])
    old = "--run log --output o --format upstream export.use_ema=true export.dtype=fp32".split()
    new = "--model log --output_dir o --format upstream --use_ema true --dtype fp32".split()
    assert export.PARSER.parse(old) == export.PARSER.parse(new)


def test_results_do_not_depend_on_processes(runs, segments, tmp_path):
    arguments = ["--input", segments, "--chain", "false"]
    assert run(runs["lora"], *arguments, "--output_dir", tmp_path / "one") == {}
    assert run(runs["lora"], *arguments, "--output_dir", tmp_path / "two", num_processes=2) == {}
    assert files(tmp_path / "one") == [f"{arc}/{name}" for arc in ("arc0", "arc1") for name in CLIP_FILES]
    for name in ("arc0/last.png", "arc1/last.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_one_segment_by_flags(runs, segments, tmp_path):
    """From a clip of edges, and from warped noise that was written before."""
    arc, output = segments / "arc0", tmp_path / "clips"
    ends = ["--first", segments / "image_0.png", "--last", segments / "image_1.png", "--edges", arc / "hed"]
    assert run(runs["lora"], *ends, "--flow", arc, "--output_dir", output, "--write_noise", "true") == {}
    assert files(output) == [f"clip/{name}" for name in [*CLIP_FILES, "noises.npy"]]
    noise = ["--noise", output / "clip/noises.npy"]
    assert run(runs["lora"], *ends, *noise, "--output_dir", tmp_path / "same") == {}
    assert (tmp_path / "same/clip/clip.mp4").read_bytes() == (output / "clip/clip.mp4").read_bytes()
    ends[-1] = output / "clip/clip.mp4"
    assert run(runs["lora"], *ends, *noise, "--output_dir", tmp_path / "other", "--degradation", 0) == {}
    clips = [read_frames(tmp_path / name / "clip/clip.mp4", range(FRAMES)) for name in ("same", "other")]
    assert not np.array_equal(*clips)


def test_prompts_by_segment(runs, segments, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"arc1": "a mill"}))
    arguments = ["--input", segments, "--output_dir", tmp_path / "a", "--prompt", "a house", "--prompts", prompts]
    assert run(runs["lora"], *arguments) == {}
    records = [json.loads((tmp_path / f"a/arc{number}/clip.json").read_text()) for number in range(2)]
    assert [each["prompt"] for each in records] == ["a house", "a mill"]
    prompts.write_text(json.dumps({"arc7": "a mill"}))
    with pytest.raises(ValueError, match=r"prompts.json names arc7, but the segments are arc0, arc1$"):
        run(runs["lora"], *arguments)
    prompts.write_text("[]")
    with pytest.raises(ValueError, match=r"prompts.json must be an object of texts by segment$"):
        run(runs["lora"], *arguments)


def test_a_broken_segment_takes_those_after_it_along_and_no_others(runs, segments, tmp_path, capsys):
    scenes = tmp_path / "scenes"
    for name in ("a", "b"):
        shutil.copytree(segments, scenes / name)
    (scenes / "a/arc0/hed/0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1"):
        main(["--model", str(runs["lora"]), "--input", str(scenes), "--output_dir", str(tmp_path / "out"), *FEW])
    printed = capsys.readouterr()
    assert "2 of 4 segments are there" in printed.out and "2 segments went wrong:" in printed.err
    assert "hed/0.png: cannot be read as an image" in printed.err
    assert "a/arc1: it goes on from arc0, which was not made" in printed.err
    assert files(tmp_path / "out") == [f"b/{arc}/{name}" for arc in ("arc0", "arc1") for name in CLIP_FILES]


def test_problems_of_settings_are_named_together(capsys, runs, segments, tmp_path):
    with pytest.raises(SystemExit):
        main(["--first", "a.png"])
    printed = capsys.readouterr().err
    assert "either --input (a folder of segments), or --first, --last, --edges and one of --flow and" in printed
    assert "given are --first" in printed
    assert "--output_dir is required" in printed and "--model is required" in printed
    with pytest.raises(SystemExit):
        main(["--input", "a", "--flow", "b", "--output_dir", "c", "--model", "d"])
    assert "--input names the files of its segments: leave --flow out" in capsys.readouterr().err
    arguments = ["--input", segments, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=r"the learned position table is for 9 frames of 32x48 px .*, not 13 of 32x48"):
        run(runs["lora"], *arguments, "--max_num_frames", 13)
    with pytest.raises(FileNotFoundError, match="nothing was not found"):
        run(Path("nothing"), *arguments)
    with pytest.raises(ValueError, match="image_0.png, image_1.png, image_2.png, but no trained weights: give a run's"):
        run(segments, *arguments)


# Formats of weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_all_forms_of_a_result_are_one_transformer(mode, runs, tmp_path):
    folder = runs[mode]
    expected = velocity(load_trained(find_trained(str(folder)), torch.float32))
    assert find_trained(str(folder)).folder.is_relative_to(folder / "export")
    for path in (folder / "export", folder / "checkpoint-2", folder / "checkpoint-2/transformer"):
        trained = find_trained(str(path))
        assert trained.data["height"] == HEIGHT
        assert torch.allclose(velocity(load_trained(trained, torch.float32, fuse_lora=True)), expected, atol=1e-4)

    # The original's form, from the export and from the checkpoint.
    for source in (folder, folder / "checkpoint-2"):
        output = tmp_path / source.name / "transformer"
        arguments = ["--format", "upstream", "--model", source, "--output_dir", output, "--dtype", "fp32"]
        export.main([*map(str, arguments)])
        (path,) = output.glob("*.safetensors")
        weights = load_file(path)
        keys = sum(".lora_" in key for key in weights), sum(".base_layer." in key for key in weights)
        assert keys == (4 * 4 * 2, 4 * 4 * 2) and weights["patch_embed.proj.weight"].shape[1] == 48
        trained = find_trained(str(output.parent))
        assert trained.kind == "whole"
        assert torch.allclose(velocity(load_trained(trained, torch.float32, fuse_lora=True)), expected, atol=1e-4)
        assert sorted(p.name for p in output.iterdir()) == ["config.json", path.name]


@pytest.mark.parametrize("mode", ["lora", "base_lora"])
def test_the_small_form(mode, runs, tmp_path):
    for source in (runs[mode], runs[mode] / "checkpoint-2"):
        output = tmp_path / source.name
        export.main(["--format", "diffusers", "--model", str(source), "--output_dir", str(output)])
        exported = runs[mode] / "export"
        assert files(output) == files(exported)
        for name in files(output):
            weights, expected = load_file(output / name), load_file(exported / name)
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_what_cannot_be_exported(runs, base, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit):
            export.main([*map(str, arguments)])
        return capsys.readouterr().err

    to = ["--output_dir", tmp_path / "out"]
    printed = refused("--format", "diffusers", "--model", runs["full"], *to)
    assert (
        "holds all weights of the transformer, as train_mode full changes them: that is no LoRA. Use --form" in printed
    )
    assert "--format is required" in refused("--model", runs["full"], *to)
    printed = refused("--format", "upstream", "--model", runs["lora"], *to, "--use_ema", "true")
    assert "holds no averaged weights (transformer_ema): leave use_ema out" in printed
    printed = refused("--format", "upstream", "--model", runs["lora"], *to, "--base_lora", "none.safetensors")
    assert "none.safetensors was not found" in printed
    printed = refused("--format", "upstream", "--model", runs["lora"], *to, "--base", tmp_path / "none")
    assert f"the folder {tmp_path}/none of the base model does not exist" in printed

    small = ["--format", "diffusers", "--model", runs["lora"], *to]
    export.main([*map(str, small)])
    assert "out holds weights already: give another --output_dir, or --overwrite true" in refused(*small)
    (tmp_path / "out/notes.txt").touch()
    export.main([*map(str, small), "--overwrite", "true"])
    assert files(tmp_path / "out") == sorted([*files(runs["lora"] / "export"), "notes.txt"])


def test_the_original_reads_one_rank_alone(runs, tmp_path, capsys):
    export.main(["--format", "upstream", "--model", str(runs["lora"]), "--output_dir", str(tmp_path)])
    assert "the base LoRA has rank 8: the original's inference reads rank 2048 alone" in capsys.readouterr().err
    path = next(tmp_path.glob("*.safetensors"))
    assert {weight.dtype for weight in load_file(path).values()} == {torch.bfloat16}
