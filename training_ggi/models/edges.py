"""The edge condition: HED edges of MiDaS depth maps ("depth_hed", as the original has it) or of the frames ("hed").

The chain is that of the original's annotators: each works at a size of its own, and its result returns to the size of
the frames. Their resizing is OpenCV's, computed here from its rules.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import DPTForDepthEstimation

from common.pretrained import check_keys, first_line
from training_ggi.models.frames import Size
from training_ggi.models.raft import load_frozen

EdgeSource = Literal["depth_hed", "hed"]
DepthRange = Literal["frame", "clip"]

HED_ID, HED_FILE = "lllyasviel/Annotators", "ControlNetHED.pth"  # on the Hub
HED_WIDTHS, HED_CONVS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
MIDAS_ID = "Intel/dpt-hybrid-midas"
# The fusion starts at one map alone, so the branch for a second one is never used, and a file may lack its weights.
MIDAS_UNUSED = "neck.fusion_stage.layers.0.residual_layer1."
SIDE_MULTIPLE_PX = 64
FIXED_POINT = 2048  # OpenCV rounds interpolation weights of 8-bit images to multiples of 1 / 2048


# Sizes and resizing of the annotators


def annotator_size(size: Size, resolution: int) -> Size:
    """Height and width at which an annotator works: the shorter side near `resolution`, both multiples of 64.

    Raises:
        ValueError: a side would become 0.
    """
    ratio = resolution / min(size)
    height, width = (round(side * ratio / SIDE_MULTIPLE_PX) * SIDE_MULTIPLE_PX for side in size)
    if height <= 0 or width <= 0:
        raise ValueError(f"the annotators cannot work at a resolution of {resolution} pixels: take 64 or more")
    return height, width


def annotator_resize(images: Tensor, resolution: int) -> Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, *annotator_size), whole numbers from 0 to 255.

    The shorter side grows: Lanczos4; else by area. Equal to OpenCV but for single levels, where its float32 weights
    round otherwise, or where one side shrinks and the other grows, which it computes with fewer bits.
    """
    source: Size = (images.shape[1], images.shape[2])
    target = annotator_size(source, resolution)
    pixels = images.movedim(-1, 1)  # (N, 3, H, W)
    if source == target:
        return pixels.float()
    weights = _interpolation(source, target, resolution)
    rows, columns = (weights(*sides).to(images.device) for sides in zip(source, target, strict=True))
    values = rows @ pixels.double() @ columns.T  # (N, 3, H', W'), float64: sums of whole numbers stay exact
    return (values + 0.5).floor().clamp(0, 255).float()


def _interpolation(source: Size, target: Size, resolution: int) -> Callable[[int, int], Tensor]:
    """The rule of OpenCV, whose INTER_AREA means two points where any side grows."""
    if resolution > min(source):
        return lanczos4_weights
    return area_weights if target[0] <= source[0] and target[1] <= source[1] else two_point_weights


def lanczos4_weights(num_in: int, num_out: int) -> Tensor:
    """(num_out, num_in), float64: OpenCV's INTER_LANCZOS4 along one side, 8 points, the border pixel repeated."""
    centre = (torch.arange(num_out, dtype=torch.float64) + 0.5) * (num_in / num_out) - 0.5
    taps = torch.arange(-3, 5)
    distance = (centre - centre.floor())[:, None] - taps  # (num_out, 8)
    kernel = torch.sinc(distance) * torch.sinc(distance / 4)
    return _placed(centre.floor().long()[:, None] + taps, kernel / kernel.sum(1, keepdim=True), num_in)


def two_point_weights(num_in: int, num_out: int) -> Tensor:
    """(num_out, num_in), float64: OpenCV's INTER_AREA along one side if the image grows along any of its sides."""
    position = torch.arange(num_out, dtype=torch.float64)
    index = (position * (num_in / num_out)).floor()
    share = (position + 1 - (index + 1) * (num_out / num_in)).clamp(min=0) % 1
    return _placed(index.long()[:, None] + torch.arange(2), torch.stack([1 - share, share], dim=1), num_in)


def area_weights(num_in: int, num_out: int) -> Tensor:
    """(num_out, num_in), float64: the mean over the area that an output pixel covers, along one side."""
    edges = torch.arange(num_out + 1, dtype=torch.float64)[:, None] * (num_in / num_out)  # (num_out + 1, 1)
    pixels = torch.arange(num_in)
    overlap = (torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)).clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)


def _placed(indices: Tensor, kernel: Tensor, num_in: int) -> Tensor:
    """Kernels (num_out, taps) in fixed point as a matrix (num_out, num_in)."""
    matrix = torch.zeros(len(indices), num_in, dtype=torch.float64)
    return matrix.scatter_add_(1, indices.clamp(0, num_in - 1), (kernel * FIXED_POINT).round() / FIXED_POINT)


def resize_bicubic(maps: Tensor, size: Size) -> Tensor:
    """PIL's bicubic resizing of grey images: uint8 (N, h, w) to (N, *size), on the CPU."""
    images = [Image.fromarray(each).resize(size[::-1], Image.Resampling.BICUBIC) for each in maps.cpu().numpy()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


# HED


class HEDBlock(nn.Module):
    """Convolutions of one scale, and the projection to its edge map."""

    def __init__(self, in_channels: int, out_channels: int, num_convs: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_convs
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:], strict=False))
        self.projection = nn.Conv2d(out_channels, 1, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            features = F.relu(conv(features))
        return features, self.projection(features)


class HED(nn.Module):
    """Edges at five scales, with the keys of `ControlNetHED.pth`.

    Source: Xie & Tu 2015, "Holistically-Nested Edge Detection".
    """

    def __init__(self, widths: Sequence[int] = HED_WIDTHS):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        shapes = zip((3, *widths), widths, HED_CONVS, strict=False)
        self.block1, self.block2, self.block3, self.block4, self.block5 = (HEDBlock(*shape) for shape in shapes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """float (N, 3, H, W) from 0 to 255 to five maps of logits (N, 1, H / 2^k, W / 2^k), k = 0 to 4."""
        features, maps = images - self.norm, []
        for block in (self.block1, self.block2, self.block3, self.block4, self.block5):
            if maps:
                features = F.max_pool2d(features, 2)
            features, projection = block(features)
            maps.append(projection)
        return maps


def fetch_hed(cache_dir: str | None = None) -> Path:
    """`ControlNetHED.pth` in the cache of the Hub, downloaded if it is not there.

    Raises:
        FileNotFoundError: it is not there, and cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(HED_ID, HED_FILE, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the weights of the edge network cannot be downloaded ({first_line(error)}): put {HED_FILE} of {HED_ID} "
            "into training_ggi/annotators/, or name its path by hed_weights; cond=precomputed does without"
        ) from error


def load_hed(path: str | Path) -> HED:
    """HED for inference, on the CPU, in float32, from `ControlNetHED.pth` or a .safetensors file with the same keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold the weights of HED.
    """
    hed = HED()
    load_frozen(hed, Path(path), "HED (ControlNetHED)")
    return hed


def fuse_maps(maps: list[Tensor], size: Size) -> Tensor:
    """Five maps of logits (N, 1, h, w) to edges, uint8 (N, *size): the sigmoid of their mean, truncated to 8 bit."""
    resized = [F.interpolate(each.float(), size=size, mode="bilinear", align_corners=False) for each in maps]
    mean = torch.cat(resized, dim=1).mean(1)  # (N, H, W)
    return (torch.sigmoid(mean.double()) * 255).to(torch.uint8)


@torch.no_grad()
def hed_edges(hed: HED, images: Tensor, detect_resolution: int = 512, batch_size: int = 8) -> Tensor:
    """White edges on black at the annotator's size, on `hed`'s device.

    Args:
        images: uint8 (N, H, W, 3), RGB.
        detect_resolution: shorter side in pixels at which the network works.
        batch_size: images at a time.

    Returns:
        uint8 (N, *annotator_size). The original's annotator resizes once more, which changes nothing for resolutions
        that are multiples of 64.
    """
    edges = []
    for part in images.split(batch_size):
        values = annotator_resize(part.to(hed.norm.device), detect_resolution)  # (n, 3, H', W')
        edges.append(fuse_maps(hed(values), (values.shape[2], values.shape[3])))
    return torch.cat(edges)


# Depth


def load_midas(source: str | Path = MIDAS_ID) -> DPTForDepthEstimation:
    """MiDaS' DPT-hybrid for inference, on the CPU, in float32.

    Args:
        source: a folder, or an id on the Hub, of DPT-hybrid in the format of `transformers`. It has the weights of the
            original's `dpt_hybrid-midas-501f0c75.pt`, which itself cannot be read.

    Raises:
        FileNotFoundError: there is neither such a folder nor such an id in the cache or on the Hub.
        ValueError: it is another network, or lacks weights.
    """
    try:
        midas, info = DPTForDepthEstimation.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of the depth network, {source}, are neither here nor to be downloaded "
            f"({first_line(error)}): give a folder with a copy of {MIDAS_ID} from the Hub"
        ) from error
    if not midas.config.is_hybrid:
        raise ValueError(f"{source} is not DPT-hybrid but another DPT: take {MIDAS_ID}")
    missing = [key for key in info["missing_keys"] if not key.startswith(MIDAS_UNUSED)]
    check_keys(f"{source} does not hold the weights of DPT-hybrid", missing, ())
    return midas.eval().requires_grad_(False)


def inverse_depth(midas: DPTForDepthEstimation, images: Tensor) -> Tensor:
    """Relative inverse depth, larger when nearer: float (N, 3, H, W) in [-1, 1], sides multiples of 32, to (N, H, W).

    `midas(images)` itself takes square images of one size alone, although the network is made for any.
    """
    patch_px, height, width = midas.config.patch_size, *images.shape[-2:]
    embedded = midas.dpt.embeddings(images, interpolate_pos_encoding=True)
    tokens = embedded.last_hidden_states  # (N, 1 + h * w, D)
    features = list(embedded.intermediate_activations)  # two maps of the convolutional stem
    for index, layer in enumerate(midas.dpt.encoder.layer):
        tokens = layer(tokens)
        if index in midas.config.backbone_out_indices[2:]:
            features.append(tokens)
    return midas.head(midas.neck(features, height // patch_px, width // patch_px))


@torch.no_grad()
def depth_maps(
    midas: DPTForDepthEstimation,
    frames: Tensor,
    depth_range: DepthRange = "frame",
    detect_resolution: int = 512,
    batch_size: int = 8,
) -> Tensor:
    """Depth as grey images, near is white: uint8 (F, H, W, 3) to uint8 (F, *annotator_size), on `midas`' device.

    Args:
        depth_range: what is stretched to 0..255: each "frame" by itself, as in the original, whose brightness therefore
            flickers, or the "clip" as a whole.
    """
    depths = []
    for part in frames.split(batch_size):
        values = annotator_resize(part.to(midas.device), detect_resolution)  # (n, 3, H', W')
        depths.append(inverse_depth(midas, values / 127.5 - 1))
    depth = torch.cat(depths)  # (F, H', W')
    over = (0, 1, 2) if depth_range == "clip" else (1, 2)
    depth = depth - depth.amin(over, keepdim=True)
    depth = depth / depth.amax(over, keepdim=True).clamp(min=torch.finfo(depth.dtype).tiny)  # a constant map is black
    return (depth * 255).to(torch.uint8)


def edge_clip(
    cond: EdgeSource,
    frames: np.ndarray | Tensor,
    hed: HED,
    midas: DPTForDepthEstimation | None = None,
    *,
    depth_range: DepthRange = "frame",
    detect_resolution: int = 512,
    batch_size: int = 8,
) -> Tensor:
    """The edge condition of a clip.

    Args:
        cond: "depth_hed", edges of the depth; "hed", edges of the frames.
        frames: uint8 (F, H, W, 3), cropped.
        hed, midas: the networks, each on the device it works on; `midas` for "depth_hed" only.
        depth_range: see `depth_maps`.
        detect_resolution: shorter side in pixels at which both networks work.
        batch_size: frames at a time.

    Returns:
        uint8 (F, H, W), on the CPU.

    Raises:
        ValueError: an unknown `cond` or `depth_range`, no depth network, or frames that are not uint8 (F, H, W, 3).
    """
    for name, value, known in (("cond", cond, EdgeSource), ("depth_range", depth_range, DepthRange)):
        if value not in get_args(known):
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(get_args(known))}")
    images = torch.as_tensor(frames)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"frames are {images.dtype} of shape {tuple(images.shape)}: expected uint8 (F, H, W, 3)")
    size: Size = (images.shape[1], images.shape[2])
    if cond == "depth_hed":
        if midas is None:
            raise ValueError('cond "depth_hed" needs the depth network: load it, or choose cond "hed"')
        depth = depth_maps(midas, images, depth_range, detect_resolution, batch_size)  # (F, H', W')
        images = resize_bicubic(depth, size)[..., None].expand(-1, -1, -1, 3)  # (F, H, W, 3)
    edges = hed_edges(hed, images, detect_resolution, batch_size)  # (F, H', W')
    return resize_bicubic(edges, size)  # (F, H, W)
