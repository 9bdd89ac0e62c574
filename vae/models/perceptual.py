"""LPIPS (Zhang et al. 2018) on VGG16 as a training loss, under the original's state-dict names."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Indices of torchvision's `vgg16().features`: convolution k maps WIDTHS[k] to WIDTHS[k + 1]; a pooling ends each block.
BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
TAP_CHANNELS = (64, 128, 256, 512, 512)
NORM_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """LPIPS distance, frozen: gradients reach the images only. Build it with `PerceptualLoss.load`.

    It has no layer that train mode changes, and computes in its weights' precision (float32) under autocast too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = nn.ModuleDict({f"slice{k + 1}": _vgg_block(k) for k in range(len(BLOCKS))})
        for k, channels in enumerate(TAP_CHANNELS):
            self.add_module(f"lin{k}", _Head(channels))
        self.requires_grad_(False)

    @classmethod
    def load(cls, backbone: Mapping[str, Tensor], device: str | torch.device = "cpu") -> "PerceptualLoss":
        """The loss on torchvision's VGG16 state dict, with the heads of the installed package `lpips`.

        Raises:
            ValueError: `backbone` is not VGG16's.
            FileNotFoundError: the package has no heads here.
        """
        with torch.device("meta"):  # random initial weights would shift the random numbers of the run
            loss = cls()
        state = perceptual_state(backbone, lpips_heads())
        loss.load_state_dict({name: value.to(device, torch.float32) for name, value in state.items()}, assign=True)
        return loss.requires_grad_(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Target x and x_hat, (N, 3, H, W) in [-1, 1] -> distance (N, 1, 1, 1), 0 for equal images.

        Raises:
            ValueError: images smaller than 16 px, which VGG16's poolings reduce to nothing.
        """
        if min(x.shape[-2:]) < 16:
            raise ValueError(f"LPIPS needs images of at least 16 px, got {tuple(x.shape[-2:])} (H, W)")
        distance = x.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            x, x_hat = self.scaling_layer(x), self.scaling_layer(x_hat)
            for k, block in enumerate(self.net.values()):
                with torch.no_grad():
                    x = block(x)  # (N, C_k, H / 2^k, W / 2^k)
                x_hat = block(x_hat)
                difference = (_unit(x) - _unit(x_hat)).square()
                distance = distance + getattr(self, f"lin{k}")(difference).mean((2, 3), keepdim=True)  # (N, 1, 1, 1)
        return distance


class _Scaling(nn.Module):
    """From [-1, 1] to what VGG16 was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.shift.dtype) - self.shift) / self.scale


class _Head(nn.Module):
    """Weighted sum over channels; the original's dropout at index 0 never acts, because its module is in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _vgg_block(k: int) -> nn.Sequential:
    """Pooling (but for the first block) and the convolutions of block k, named by torchvision's indices."""
    block = nn.Sequential()
    if k > 0:
        block.add_module(str(BLOCKS[k][0] - 1), nn.MaxPool2d(2))
    channels = TAP_CHANNELS[k - 1] if k > 0 else 3
    for index in BLOCKS[k]:
        block.add_module(str(index), nn.Conv2d(channels, TAP_CHANNELS[k], 3, padding=1))
        block.add_module(str(index + 1), nn.ReLU(inplace=True))
        channels = TAP_CHANNELS[k]
    return block


def _unit(features: Tensor) -> Tensor:
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + NORM_EPS)


def perceptual_state(backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `PerceptualLoss`.

    Args:
        backbone: torchvision's VGG16, `features.0.weight`, ...; its classifier is not needed.
        heads: `lin0.model.1.weight`, ...

    Raises:
        ValueError: a tensor is absent or has another shape.
    """
    with torch.device("meta"):
        expected = PerceptualLoss().state_dict()
    state = {"scaling_layer.shift": torch.tensor(SHIFT), "scaling_layer.scale": torch.tensor(SCALE)}
    state = {name: value.view(1, 3, 1, 1) for name, value in state.items()}
    for name in expected.keys() - state.keys():
        is_head = name.startswith("lin")
        source = name if is_head else "features." + name.split(".", 2)[2]  # net.slice2.5.weight -> features.5.weight
        found = (heads if is_head else backbone).get(source)
        if found is None or found.shape != expected[name].shape:
            what = "LPIPS' heads for VGG16" if is_head else "torchvision's VGG16"
            have = "is absent" if found is None else f"has shape {tuple(found.shape)}"
            raise ValueError(
                f"The perceptual loss needs the weights of {what}, but {source} {have},"
                f" expected {tuple(expected[name].shape)}; give the right file, or set the perceptual weight to 0."
            )
        state[name] = found
    return state


def lpips_heads() -> dict[str, Tensor]:
    """The linear heads for VGG16, version 0.1, that the package `lpips` brings; FileNotFoundError without it."""
    package = find_spec("lpips")  # found, not imported: the import would load torchvision's models too
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else "lpips", "weights", "v0.1", "vgg.pth")
    if not path.is_file():
        raise FileNotFoundError(f"the perceptual loss needs {path} of the package lpips; install it: pip install lpips")
    return torch.load(path, map_location="cpu", weights_only=True)
