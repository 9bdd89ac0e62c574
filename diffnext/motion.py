"""How much moves in a clip: the mean length of a dense optical flow."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE_PX = 128  # frames are reduced to this short side
NUM_LEVELS = 5  # of the pyramid
NUM_ITERATIONS = 3  # per level
WINDOW_PX = 7
# Added to squared gradients of grey values in [0, 1]: noise of about 2 of 255 levels does not move.
NOISE = 1e-4


@torch.no_grad()
def motion_score(frames: Tensor) -> float:
    """Mean displacement between neighbouring frames, in pixels of the frames as given.

    The flow is Lucas and Kanade's (IJCAI 1981) at every pixel, from coarse to fine, at a short side of at most 128 px.
    The outer eighth of each side does not count, because what leaves the frame cannot be followed. Featureless areas
    count as still. Movements beyond about an eighth of the short side are underestimated.

    Args:
        frames: uint8 (T, H, W, 3); a single one has score 0.
    """
    if len(frames) < 2:
        return 0.0
    grey = frames.float().mean(-1)[:, None] / 255  # (T, 1, H, W)
    height, width = grey.shape[2:]
    scale = max(1.0, min(height, width) / SIDE_PX)
    if scale > 1:
        size = (round(height / scale), round(width / scale))
        grey = F.interpolate(grey, size=size, mode="bilinear", antialias=True)  # (T, 1, h, w)
    levels = [grey]
    while len(levels) < NUM_LEVELS and min(levels[-1].shape[2:]) >= 4 * WINDOW_PX:
        levels.append(F.avg_pool2d(levels[-1], 2))  # (T, 1, h / 2, w / 2)
    flow = torch.zeros(len(grey) - 1, 2, *levels[-1].shape[2:], device=grey.device)  # (T - 1, 2, h, w): x, y
    for level in reversed(levels):
        if flow.shape[2:] != level.shape[2:]:
            flow = 2 * F.interpolate(flow, size=level.shape[2:], mode="bilinear")
        for _ in range(NUM_ITERATIONS):
            flow = flow + _step(level[:-1], _warped(level[1:], flow))
    margins = [size // 8 for size in flow.shape[2:]]
    inner = flow[:, :, margins[0] : -margins[0] or None, margins[1] : -margins[1] or None]
    return float(inner.norm(dim=1).mean() * scale)


def _step(first: Tensor, second: Tensor) -> Tensor:
    """What the flow from `first` to `second` (N, 1, h, w) is in first order: (N, 2, h, w) within a pixel."""
    padded = F.pad((first + second) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2  # (N, 1, h, w)
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    dt = second - first
    products = torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt], dim=1)
    means = F.avg_pool2d(products, WINDOW_PX, 1, WINDOW_PX // 2, count_include_pad=False)  # (N, 5, h, w)
    xx, xy, yy, xt, yt = means.unbind(1)
    xx, yy = xx + NOISE, yy + NOISE
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / determinant[:, None]
    return step.clamp(-1, 1)


def _warped(image: Tensor, flow: Tensor) -> Tensor:
    """`image` (N, 1, h, w) at the positions that `flow` leads to."""
    height, width = image.shape[2:]
    ys, xs = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    x = (xs + flow[:, 0] + 0.5) * 2 / width - 1
    y = (ys + flow[:, 1] + 0.5) * 2 / height - 1
    return F.grid_sample(image, torch.stack([x, y], dim=-1), padding_mode="border", align_corners=False)
