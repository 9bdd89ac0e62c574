"""Optical flow of clips with RAFT (Teed & Deng 2020, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow")."""

from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torchvision.models.optical_flow import RAFT, Raft_Large_Weights, raft_large

from common.pretrained import first_line, load_exactly, read_tensors
from training_ggi.models.frames import resize_antialiased

RAFT_URL = Raft_Large_Weights.C_T_SKHT_V2.url
SIDE_MULTIPLE_PX, MIN_SIDE_PX = 8, 128


def load_frozen(network: nn.Module, path: Path, name: str) -> None:
    """Fill a network with the weights of a .safetensors file or one of `torch.save`, for inference alone.

    Raises:
        ValueError: the file cannot be read, or is not of this network.
    """
    load_exactly(network, read_tensors(path), path, name)
    network.eval().requires_grad_(False)


def fetch_raft() -> Path:
    """The file of the weights `C_T_SKHT_V2` in the cache of `torch.hub`, downloaded if it is not there.

    Raises:
        FileNotFoundError: it is not there, and cannot be downloaded.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / RAFT_URL.rsplit("/", 1)[1]
    if cached.is_file():
        return cached
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE forbids it")
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(RAFT_URL, str(cached), cached.stem.rsplit("-", 1)[1], progress=False)
    except (OSError, RuntimeError) as error:  # the latter for content that the hash in the name contradicts
        raise FileNotFoundError(
            f"the weights of the optical flow, {cached}, do not exist and cannot be downloaded ({first_line(error)}): "
            f"download {RAFT_URL} to there, or name its path by raft_weights"
        ) from error
    return cached


def load_raft(path: str | Path) -> RAFT:
    """torchvision's `raft_large` for inference, on the CPU, in float32.

    Args:
        path: weights `C_T_SKHT_V2`, .pth or .safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold the weights of `raft_large`.
    """
    raft = raft_large(weights=None)
    load_frozen(raft, Path(path), "RAFT (raft_large)")
    return raft


def half_size(clip: Tensor) -> Tensor:
    """The frames that RAFT sees: (..., 3, H, W) to float32 (..., 3, H // 2, W // 2)."""
    height, width = clip.shape[-2:]
    images = clip.float().reshape(-1, *clip.shape[-3:])  # (N, 3, H, W)
    halves = resize_antialiased(images, (height // 2, width // 2))  # (N, 3, H / 2, W / 2)
    return halves.reshape(*clip.shape[:-2], height // 2, width // 2)


@torch.no_grad()
def clip_flow(raft: RAFT, clip: Tensor, batch_size: int = 8) -> Tensor:
    """The flow from each frame to the next one, the last of RAFT's 12 estimates.

    Args:
        raft: in evaluation mode; the work is done on its device.
        clip: (B, F, 3, H, W) in [-1, 1], F >= 2. Repeated last frames are frames like others: the flow between them is
            almost zero, but not quite.
        batch_size: pairs of frames at a time.

    Returns:
        float32 (B, F - 1, 2, H // 2, W // 2): (dx, dy) in pixels of this half-size grid.

    Raises:
        ValueError: half the height or width is no multiple of 8 or below 128, or there is one frame only.
    """
    num_clips, num_frames, _, height, width = clip.shape
    if num_frames < 2:
        raise ValueError(f"a clip of {num_frames} frame has no flow: give 2 frames or more")
    for name, side in (("height", height // 2), ("width", width // 2)):
        if side % SIDE_MULTIPLE_PX or side < MIN_SIDE_PX:
            raise ValueError(
                f"RAFT cannot take frames of {height // 2}x{width // 2} (half of {height}x{width}, height x width): "
                f"half the {name} must be a multiple of {SIDE_MULTIPLE_PX} and at least {MIN_SIDE_PX}; "
                f"choose a {name} that is a multiple of {2 * SIDE_MULTIPLE_PX} and at least {2 * MIN_SIDE_PX}"
            )
    device = next(raft.parameters()).device
    frames = half_size(clip.to(device))  # (B, F, 3, H / 2, W / 2)
    first, second = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)  # (B * (F - 1), 3, H / 2, W / 2)
    with torch.autocast(device.type, enabled=False):  # in float32, as the original does
        pairs = zip(first.split(batch_size), second.split(batch_size), strict=True)
        flows = [raft(*pair)[-1].float() for pair in pairs]
    return torch.cat(flows).unflatten(0, (num_clips, num_frames - 1))  # (B, F - 1, 2, H / 2, W / 2)
