"""Frechet video distance (Unterthiner et al. 2018, "Towards Accurate Generative Models of Video"), two variants.

    styleganv   the I3D of StyleGAN-V, a TorchScript file
    videogpt    the I3D of VideoGPT, a state dict of `InceptionI3d`

Their numbers differ, and neither is to be compared with the other. The distance is between two whole sets.
"""

import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.pretrained import read_tensors
from vae.models.i3d import MIN_FRAMES, SIZE_PX, InceptionI3d

FvdMethod = Literal["styleganv", "videogpt"]
Features = Callable[[Tensor], Tensor]
NUM_FEATURES = 400
MIN_VIDEOS, UNBIASED_VIDEOS = 2, 256


class FvdUnavailable(RuntimeError):
    """FVD cannot be computed; the message says what is missing and what to change."""


def preprocess(video: Tensor, method: FvdMethod, size_px: int = SIZE_PX) -> Tensor:
    """(B, 3, T, H, W) in [0, 1] -> (B, 3, T, size_px, size_px) in [-1, 1], as the variant's I3D takes it.

    The short side is resized to `size_px`, bilinear without antialiasing, the long one rounded up; then the centre is
    cut out. "videogpt" truncates to 8 bits first.
    """
    if method == "videogpt":
        video = (video * 255).floor() / 255
    num_clips, height, width = len(video), *video.shape[-2:]
    scale = size_px / min(height, width)
    size = (size_px, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size_px)
    frames = video.transpose(1, 2).flatten(0, 1)  # (B T, 3, H, W)
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)  # (B T, 3, H', W')
    top, left = (size[0] - size_px) // 2, (size[1] - size_px) // 2
    frames = frames[..., top : top + size_px, left : left + size_px]  # (B T, 3, size_px, size_px)
    return frames.unflatten(0, (num_clips, -1)).transpose(1, 2) * 2 - 1  # (B, 3, T, size_px, size_px)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Features (N, D) and (M, D) -> |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), covariances over N - 1.

    With A and B the centred features over sqrt(N - 1), the eigenvalues of C1 C2 are the squared singular values of
    A B^T, so that no square root of a matrix is taken. One row on each side leaves the distance of the means.

    Raises:
        ValueError: not two matrices of one width, or values that are not finite.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or 0 in (*real.shape, *fake.shape):
        raise ValueError(f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(fake.shape)}")
    real, fake = real.double(), fake.double()
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("the features of FVD are not finite: the videos or the weights of I3D hold NaN or infinity")
    means = (real.mean(0) - fake.mean(0)).square().sum()
    if len(real) < 2 or len(fake) < 2:
        return means.item()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (real, fake))
    a, b = (torch.linalg.qr(x, mode="r").R for x in (a, b))  # (min(N, D), D), of the same products x^T x
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return (means + traces).item()


def check_set(num_videos: int, num_frames: int) -> None:
    """Whether there are enough videos and frames to compute FVD at all; below `UNBIASED_VIDEOS` it does not mean much.

    Raises:
        FvdUnavailable: fewer than 2 videos, or fewer than 9 frames.
    """
    if num_frames < MIN_FRAMES:
        raise FvdUnavailable(f"FVD needs at least {MIN_FRAMES} frames, got --num_frames {num_frames}: raise it")
    if num_videos < MIN_VIDEOS:
        raise FvdUnavailable(
            f"FVD is a distance between two sets and needs at least {MIN_VIDEOS} videos, got {num_videos}: raise "
            "--subset_size or leave fvd out of --metric"
        )


def load_features(method: FvdMethod, weights: str | Path | None, device: str | torch.device = "cpu") -> Features:
    """A function from clips (B, 3, T, H, W) in [0, 1] to features (B, 400), both on `device`.

    Args:
        weights: for "videogpt" a state dict of `InceptionI3d` (.pt or .safetensors). For "styleganv" a TorchScript file
            (.torchscript, .pt): loading that runs the code in it, so it must come from a source that is trusted.

    Raises:
        FvdUnavailable: no weights are given, or they cannot be used; says why.
    """
    path = _require_weights(method, weights)
    if method == "videogpt":
        network = _load_videogpt(path).to(device)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated, but the file is what it is
                network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, OSError) as error:
            raise FvdUnavailable(
                f"FVD (styleganv): {path} is no TorchScript file ({_first_line(error)}); give the I3D of StyleGAN-V as "
                "--i3d_weights, or --fvd_method videogpt for a state dict"
            ) from error

    @torch.no_grad()
    def features(video: Tensor) -> Tensor:
        clips = preprocess(video.to(device, torch.float32), method)  # (B, 3, T, 224, 224)
        with torch.autocast(clips.device.type, enabled=False):
            if method == "videogpt":
                return network(clips)  # (B, 400)
            return network(clips, rescale=False, resize=False, return_features=True)  # (B, 400)

    return features


def _require_weights(method: str, weights: str | Path | None) -> Path:
    what = {"styleganv": "the TorchScript I3D of StyleGAN-V", "videogpt": "a state dict of VideoGPT's I3D"}[method]
    remedy = f"give {what} as --i3d_weights, or leave fvd out of --metric"
    if weights is None:
        raise FvdUnavailable(f"FVD ({method}) needs weights, and none are downloaded: {remedy}")
    path = Path(weights)
    if not path.is_file():
        raise FvdUnavailable(f"FVD ({method}): the weights {path} are not a file: {remedy}")
    if path.stat().st_size == 0:
        raise FvdUnavailable(f"FVD ({method}): {path} is empty (0 bytes), as a failed download leaves it: {remedy}")
    return path


def _load_videogpt(path: Path) -> InceptionI3d:
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        raise FvdUnavailable(f"FVD (videogpt): {path} is a TorchScript file; use --fvd_method styleganv for it")
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise FvdUnavailable(f"FVD (videogpt): {error}") from error
    with torch.device("meta"):
        network = InceptionI3d(NUM_FEATURES)
    for name, expected in network.state_dict().items():
        found = state.get(name)
        if found is None and name.endswith("num_batches_tracked"):  # older files lack it; nothing reads it
            state[name] = torch.zeros((), dtype=torch.long)
        elif found is None or found.shape != expected.shape:
            have = "is absent" if found is None else f"has shape {tuple(found.shape)}"
            raise FvdUnavailable(
                f"FVD (videogpt): {path} does not hold VideoGPT's I3D: {name} {have}, expected {tuple(expected.shape)}"
            )
    network.load_state_dict({name: state[name] for name in network.state_dict()}, assign=True)
    return network.eval().requires_grad_(False).float()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
