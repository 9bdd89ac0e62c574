"""Quality against a reference: PSNR, SSIM, LPIPS of images, flicker of clips.

Inputs are RGB in [0, 1], results are one value per image or clip.
"""

import hashlib
import logging
import os
import urllib.request
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.pretrained import read_tensors
from common.runtime import Processes

logger = logging.getLogger(__name__)

PSNR_CAP_DB = 100.0
SSIM_WINDOW_PX, SSIM_SIGMA_PX, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03
DOWNLOAD_TIMEOUT_SECONDS = 10.0


def _check_pair(pred: Tensor, target: Tensor) -> None:
    if pred.ndim != 4 or pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have one shape (B, C, H, W), got {tuple(pred.shape)} and {tuple(target.shape)}"
        )


def psnr(pred: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE) with the MSE over C, H, W: (B, C, H, W) in [0, 1] -> (B,).

    Values are capped at 100 dB, so that identical images give 100 and a mean over a set stays finite.
    """
    _check_pair(pred, target)
    mse = (pred.double() - target.double()).square().mean(dim=(1, 2, 3))  # (B,)
    return (-10 * torch.log10(mse)).clamp(max=PSNR_CAP_DB)


def ssim(pred: Tensor, target: Tensor) -> Tensor:
    """Structural similarity: (B, C, H, W) in [0, 1] -> (B,), 1 for identical images.

    Wang et al. 2004, "Image quality assessment", eq. 13: Gaussian window of 11 x 11 px and sigma 1.5 px, K1 = 0.01,
    K2 = 0.03, data range 1, population covariance; mean over the channels and the windows that lie inside the image.
    Computed in float64: on a GPU float32 convolutions may run in TF32, which the differences of moments do not survive.
    Raises ValueError for images smaller than the window.
    """
    _check_pair(pred, target)
    if min(pred.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW_PX} px, got {tuple(pred.shape[-2:])} (H, W)")
    x, y = pred.double().flatten(0, 1)[:, None], target.double().flatten(0, 1)[:, None]  # (B C, 1, H, W)
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=x.dtype, device=x.device) - SSIM_WINDOW_PX // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA_PX**2))
    window = window / window.sum()  # (11,)

    def local_mean(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))  # (B C, 1, H - 10, W - 10)

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x.square(), local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    contrast_structure = (2 * covariance + c2) / (var_x + var_y + c2)
    per_channel = (luminance * contrast_structure).mean(dim=(1, 2, 3))  # (B C,)
    return per_channel.view(len(pred), -1).mean(dim=1)  # (B,)


def flicker(pred: Tensor, target: Tensor) -> Tensor:
    """Temporal flicker: mean |(p[t + 1] - p[t]) - (x[t + 1] - x[t])|: (B, C, T, H, W) in [0, 1] -> (B,).

    0 where every change in time is that of the target, whatever the error of single frames, and for one frame.
    """
    if pred.ndim != 5 or pred.shape != target.shape:
        raise ValueError(
            f"pred and target must have one shape (B, C, T, H, W), got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
    if pred.shape[2] == 1:
        return torch.zeros(len(pred), dtype=torch.float64, device=pred.device)
    changes = (pred.double() - target.double()).diff(dim=2)  # (B, C, T - 1, H, W)
    return changes.abs().mean(dim=(1, 2, 3, 4))  # (B,)


class LpipsUnavailable(RuntimeError):
    """LPIPS cannot be computed here; the message says which file to get and where to put it."""


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018), version 0.1: linear heads of `lpips` on an ImageNet classifier.

    Build it with `Lpips.load`; lower values are closer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    @classmethod
    def load(
        cls,
        net: str = "alex",
        backbone_weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        spatial: bool = False,
    ) -> "Lpips":
        """Build the metric on the torchvision net "alex" or "vgg".

        Args:
            backbone_weights: state dict of torchvision's AlexNet or VGG16 (.pth or .safetensors); None takes the file
                in the cache of torch.hub and, unless HF_HUB_OFFLINE is set, tries to download it there.
            spatial: each layer's map is resized to the image's size before the mean is taken, as video autoencoders are
                evaluated; it differs in the third digit.

        Raises:
            LpipsUnavailable: there are no such weights, and why.
            ValueError: unknown `net`.
        """
        if net not in ("alex", "vgg"):
            raise ValueError(f"net is {net!r}, but LPIPS is known for 'alex' and 'vgg'")
        try:
            import lpips
        except ImportError as error:
            raise LpipsUnavailable(f"LPIPS needs the package lpips, which does not load: {error}") from error
        path = find_backbone_weights(net, backbone_weights)
        try:
            weights = read_tensors(path)
        except ValueError as error:
            raise LpipsUnavailable(f"LPIPS: {error}; check validation.lpips_weights.") from error
        # The random initial weights are overwritten; they must not shift the random numbers of the run.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips names torchvision's arguments in a way that torchvision deprecates
            model = lpips.LPIPS(net=net, version="0.1", pnet_rand=True, spatial=spatial, verbose=False)
        _load_backbone(model.net, weights, net)
        return cls(model.eval().requires_grad_(False).to(device))

    @torch.no_grad()
    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], rescaled to [-1, 1] -> (B,) float32, computed in float32 on the model's device."""
        _check_pair(pred, target)
        device = next(self.model.parameters()).device
        pred, target = (x.to(device, torch.float32) * 2 - 1 for x in (pred, target))
        with torch.autocast(device.type, enabled=False):
            return self.model(pred, target).flatten(1).mean(dim=1)  # (B, 1, 1 or H, 1 or W) -> (B,)


def lpips_for_all(
    net: str,
    backbone_weights: str | Path | None,
    processes: Processes,
    spatial: bool = False,
    *,
    place: str = "validation",
    required: bool = False,
) -> Lpips | None:
    """LPIPS on every process, or None on every process with the reason in the log; called on all of them.

    Args:
        place: what goes without, for the log.
        required: there is no going without.

    Raises:
        LpipsUnavailable: `backbone_weights` is given or the metric required, but cannot be had.
    """
    metric, reason = None, ""
    for turn in (True, False):  # the main process downloads first
        if processes.is_main_process is turn:
            try:
                metric = Lpips.load(net, backbone_weights, processes.device, spatial)
            except LpipsUnavailable as error:
                if required or backbone_weights is not None:
                    raise
                reason = str(error)
        processes.wait_for_everyone()
    count = processes.reduce(torch.tensor(float(metric is not None), device=processes.device), "sum")
    if int(count) == processes.num_processes:
        return metric
    if processes.is_main_process:
        logger.warning("no LPIPS in %s: %s", place, reason or "another process has no weights for it")
    return None


def find_backbone_weights(net: str, backbone_weights: str | Path | None, setting: str = "lpips_weights") -> Path:
    """File of the ImageNet weights of "alex" or "vgg": the given one, the cached one, or a new download into the cache.

    Raises:
        LpipsUnavailable: there is none, and why; `setting` is what the message tells to set.
    """
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    url = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[net].IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    remedy = f"download {url} and put it to {cached}, or set {setting} to where it is"
    if backbone_weights is not None:
        if not Path(backbone_weights).is_file():
            raise LpipsUnavailable(f"LPIPS ({net}): the weights {backbone_weights} are not a file: {remedy}.")
        return Path(backbone_weights)
    if cached.is_file():
        return cached
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise LpipsUnavailable(f"LPIPS ({net}) has no weights and HF_HUB_OFFLINE forbids a download: {remedy}.")
    try:
        _download(url, cached)
    except (OSError, ValueError) as error:
        raise LpipsUnavailable(
            f"LPIPS ({net}) has no weights and their download failed ({error}): {remedy}."
        ) from error
    return cached


def _download(url: str, path: Path) -> None:
    """Fetch a file whose name ends in the first digits of its SHA-256, as torchvision's do; OSError, ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as source, open(temporary, "wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        if not digest.hexdigest().startswith(path.stem.rsplit("-", 1)[1]):
            raise ValueError(f"what {url} returned has SHA-256 {digest.hexdigest()}, which its name contradicts")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_backbone(slices: torch.nn.Module, weights: dict[str, Tensor], net: str) -> None:
    """Fill lpips' backbone, whose key `slice2.3.weight` is torchvision's `features.3.weight`."""
    sources = {name: "features." + name.split(".", 1)[1] for name in slices.state_dict()}
    for name, expected in slices.state_dict().items():
        found = weights.get(sources[name])
        if found is None or found.shape != expected.shape:
            have = "is absent" if found is None else f"has shape {tuple(found.shape)}"
            raise LpipsUnavailable(
                f"LPIPS ({net}): the weights are not those of torchvision's {'AlexNet' if net == 'alex' else 'VGG16'}:"
                f" {sources[name]} {have}, expected {tuple(expected.shape)}; check validation.lpips_weights."
            )
    slices.load_state_dict({name: weights[source] for name, source in sources.items()})
