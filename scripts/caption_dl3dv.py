"""Captions the first frame of every scene of DL3DV-10K with BLIP-2: writes captions.json, which training_ggi reads.

    python scripts/caption_dl3dv.py datasets
    torchrun --nproc_per_node 4 scripts/caption_dl3dv.py datasets --batch_size 32

The second line splits the scenes over four GPUs; the process that ends last writes the file. Captions are kept as they
are made, in `captions.json.partial`, so the same command goes on where it was stopped, with any number of processes.
Captions that the file or that folder already hold are kept: delete both to start over. Exit status: 0 if all scenes
have a caption, 1 if some first frames cannot be read, 2 for wrong usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from common.video import load_image
from training_ggi.data import Scene, find_image_folder, list_scene_names, read_captions

MODEL = "Salesforce/blip2-opt-2.7b"
MAX_NEW_TOKENS = 30
SHOWN_BAD_SCENES = 10

Captioner = tuple[Any, Any]  # processor, model


def load_captioner(model: str, device: torch.device) -> Captioner:
    """BLIP-2 from a folder or the Hub, in half precision on a GPU. Raises OSError if it cannot be had."""
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(model)
    return processor, Blip2ForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()


@torch.inference_mode()
def caption_images(captioner: Captioner, images: Sequence[Image.Image]) -> list[str]:
    """The likeliest caption of each image, word by word, without spaces around it."""
    processor, model = captioner
    inputs = processor(images=list(images), return_tensors="pt").to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # (B, tokens)
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def first_frame(scene_folder: Path) -> Image.Image | str:
    """The first frame of a scene in RGB, or why there is none."""
    images_folder = find_image_folder(scene_folder)
    if isinstance(images_folder, str):
        return f"{scene_folder}: {images_folder}"
    try:
        images = Scene(scene_folder.name, images_folder).images()
        return load_image(images[0]) if images else f"{images_folder}: holds no images"
    except (OSError, ValueError) as error:
        return str(error)


def first_frames(folders: Sequence[Path], batch_size: int) -> Iterator[tuple[list[Path], list[Image.Image | str]]]:
    """Scene folders and their first frames in batches; one batch is read while the one before is in use."""
    batches = [list(folders[start : start + batch_size]) for start in range(0, len(folders), batch_size)]
    with ThreadPoolExecutor(min(batch_size, 8)) as pool:
        reading = [pool.map(first_frame, batch) for batch in batches[:1]]
        for number, batch in enumerate(batches):
            reading += [pool.map(first_frame, following) for following in batches[number + 1 : number + 2]]
            yield batch, list(reading.pop(0))


def read_partial(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Captions, and reasons why there is none, by scene id. Lines that a crash has torn are passed over."""
    captions, reasons = {}, {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                found = captions if "caption" in record else reasons
                found[record["scene"]] = record.get("caption") or record["reason"]
            except (ValueError, KeyError, TypeError):
                continue
    return captions, {scene: reason for scene, reason in reasons.items() if scene not in captions}


def caption_scenes(
    folders: Sequence[Path], captioner: Captioner, batch_size: int, partial: Path, show_progress: bool
) -> None:
    """Appends a line per scene to `partial`, with its caption or the reason why it has none."""
    with open(partial, "a", encoding="utf-8") as file, tqdm(
        total=len(folders), unit="scene", disable=not show_progress
    ) as bar:  # fmt: skip
        file.write("\n")  # ends a line that a crash has torn
        for batch, frames in first_frames(folders, batch_size):
            images = [frame for frame in frames if not isinstance(frame, str)]
            texts = iter(caption_images(captioner, images) if images else [])
            for folder, frame in zip(batch, frames, strict=True):
                text = frame if isinstance(frame, str) else next(texts)
                if isinstance(frame, str) or not text:
                    record = {"scene": folder.name, "reason": text or f"{folder}: the model says nothing"}
                else:
                    record = {"scene": folder.name, "caption": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))


def write_captions(path: Path, captions: dict[str, str]) -> None:
    """One line of JSON; the file appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(captions, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def finish(output: Path, kept: dict[str, str], scene_ids: Sequence[str], partial: Path) -> int:
    """Writes `output` if all processes are done; returns the exit status."""
    captions, reasons = read_partial(partial)
    captions = {**kept, **{scene: captions[scene] for scene in scene_ids if scene in captions}}
    bad = [scene for scene in scene_ids if scene not in captions and scene in reasons]
    left = len(scene_ids) - len(bad) - sum(scene in captions for scene in scene_ids)
    if left:
        print(f"{left} scenes are left to other processes; the last one writes {output}")
        return 0
    write_captions(output, captions)
    print(f"{len(captions)} captions: {output}")
    for scene in bad[:SHOWN_BAD_SCENES]:
        print(f"no caption: {reasons[scene]}", file=sys.stderr)
    if len(bad) > SHOWN_BAD_SCENES:
        print(f"and {len(bad) - SHOWN_BAD_SCENES} more, see {partial}", file=sys.stderr)
    return 1 if bad else 0


def choose_device(local_rank: int) -> torch.device:
    return (
        torch.device("cuda", local_rank % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=Path, nargs="?", default=Path("datasets"), help="what DL3DV-10K is in")
    parser.add_argument(
        "--dataset_file", type=Path, help="list of scenes; unless given seeds.txt, or all scenes where there is none"
    )
    parser.add_argument("--output", type=Path, help="unless given, captions.json in the data root")
    parser.add_argument("--model", default=MODEL, help="BLIP-2: a folder, or a name on the Hub")
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args(argv)
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    root, output = arguments.data_root, arguments.output or arguments.data_root / "captions.json"
    try:
        if arguments.batch_size < 1:
            raise ValueError(f"--batch_size is {arguments.batch_size}, but must be at least 1")
        seeds = "seeds.txt" if (root / "seeds.txt").is_file() else None
        folders = [root / name for name in list_scene_names(root, arguments.dataset_file or seeds)]
        kept = read_captions(root, output.absolute()) if output.is_file() else {}
        partial = output.with_name(f"{output.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        done = kept.keys() | read_partial(partial)[0].keys()
        todo = [folder for folder in folders[rank::world_size] if folder.name not in done]
        captioner = load_captioner(arguments.model, choose_device(local_rank)) if todo else None
    except (ValueError, OSError) as error:
        print(f"caption_dl3dv: {error}", file=sys.stderr)
        return 2
    if captioner is not None:
        caption_scenes(todo, captioner, arguments.batch_size, partial / f"process_{rank}.jsonl", rank == 0)
    return finish(output, kept, [folder.name for folder in folders], partial)


if __name__ == "__main__":
    sys.exit(main())
