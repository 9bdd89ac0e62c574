"""Patch discriminators of clips (3-D) and of frames (2-D), Isola et al. 2017, under the original's state-dict names."""

import torch
from torch import Tensor, nn


class NLayerDiscriminator3D(nn.Module):
    """Logits of overlapping space-time patches: (B, C, T, H, W) -> (B, 1, ~T/4, ~H/2^n, ~W/2^n), n = n_layers.

    Args:
        input_nc: C.
        ndf: width of the first layer; it doubles per layer, up to 8 ndf.
        n_layers: convolutions before the one that gives logits; time is halved by the first two that have stride 2.
        dropout: probability after each normalised layer, in train mode.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 4, dropout: float = 0.30) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(input_nc, ndf, 3, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for n in range(1, n_layers + 1):
            previous, width = width, ndf * min(2**n, 8)
            stride = 1 if n == n_layers else (2 if n == 1 else 1, 2, 2)
            layers += [
                nn.Conv3d(previous, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(width),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Dropout(dropout),
            ]
        self.main = nn.Sequential(*layers, nn.Conv3d(width, 1, 3, padding=1))
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) in [-1, 1] -> logits (B, 1, t, h, w), high for real."""
        return self.main(x)


class NLayerDiscriminator(nn.Module):
    """Logits of overlapping patches of images: (N, C, H, W) -> (N, 1, ~H/2^n, ~W/2^n), n = n_layers.

    Of a clip (B, C, T, H, W) each frame is an image, N = B T.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for n in range(1, n_layers + 1):
            previous, width = width, ndf * min(2**n, 8)
            stride = 1 if n == n_layers else 2
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (B, C, T, H, W) in [-1, 1] -> logits (N, 1, h, w), high for real."""
        return self.main(x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1))


class RealAndFake(nn.Module):
    """Both passes of a discriminator step as one forward, which is what DistributedDataParallel can wrap.

    Computes in float32 under autocast too, as the generator's loss does.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) twice -> logits of the real clips, logits of the fake ones.

        Two passes, real clips first: each has its own batch statistics.
        """
        dtype = next(self.discriminator.parameters()).dtype
        with torch.autocast(real.device.type, enabled=False):
            return self.discriminator(real.to(dtype)), self.discriminator(fake.to(dtype))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
