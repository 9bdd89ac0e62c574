"""WF-VAE with its training step written down operation by operation: what `wfvae.py` measures the real one against.

The same maths and the same names of weights; only what wfvae-large-16chn.json needs. Each operation is a call of torch
of its own, autograd records them all, and chunks of time are decoded with one latent of look-ahead that is thrown away.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.models.perceptual import PerceptualLoss
from vae.models.wfvae import WFVAEConfig

LOW, EPS = 3, 1e-6


class Cached(nn.Module):
    """A layer that keeps frames from chunk to chunk.

    Attributes:
        chunked, first: whether there are chunks, and whether this is the first one.
        look_ahead: latents at the end that the next chunk holds again; a layer sees `rate` frames of each.
        kept: frames of the chunk before.
    """

    chunked, first, look_ahead, rate = False, True, 0, 1
    kept: Tensor | None = None

    def keep(self, x: Tensor, num_frames: int) -> None:
        """The last frames of x before those of the look-ahead."""
        if self.chunked:
            stop = x.shape[2] - self.look_ahead * self.rate
            self.kept = x[:, :, stop - num_frames : stop].clone()


class CausalConv3d(Cached):
    def __init__(self, chan_in: int, chan_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__()
        self.num_front, self.num_kept = kernel - 1, (kernel - 1) // stride
        self.conv = nn.Conv3d(chan_in, chan_out, kernel, stride, (0, padding, padding), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.num_front:
            front = x[:, :, :1].repeat(1, 1, self.num_front, 1, 1) if self.first else self.kept
            x = torch.cat([front, x], dim=2)
            self.keep(x, self.num_kept)
        return self.conv(x)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return per_frame(super().forward, x)


def per_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Folds time into the batch: (B, C, T, H, W) as (B*T, C, H, W), and back."""
    folded = function(x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:]))
    return folded.reshape(x.shape[0], x.shape[2], *folded.shape[1:]).transpose(1, 2)


class LayerNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Resnet(nn.Module):
    def __init__(self, before: int, after: int, flat: bool = False):
        super().__init__()
        conv = Conv2d if flat else CausalConv3d
        self.norm1, self.norm2 = LayerNorm(before), LayerNorm(after)
        self.conv1, self.conv2 = conv(before, after, 3, padding=1), conv(after, after, 3, padding=1)
        self.nin_shortcut = conv(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = LayerNorm(channels)
        self.q, self.k, self.v, self.proj_out = (CausalConv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (each(normed).permute(0, 2, 3, 4, 1).flatten(2, 3) for each in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, T, H*W, C)
        return x + self.proj_out(attended.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class TimeDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest")), x)


class TimeUpsample(Cached):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts, rest, left = [], x, None if self.first else self.kept
        if self.first:
            parts, rest = [F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")], x[:, :, 1:]
        if rest.shape[2]:
            rest = rest if left is None else torch.cat([left, rest], dim=2)
            rest = F.interpolate(rest, scale_factor=(2, 1, 1), mode="trilinear")
            rest = F.interpolate(rest, scale_factor=(1, 2, 2), mode="trilinear")
            parts.append(rest if left is None else rest[:, :, 2:])
        self.kept = None
        if not self.first:  # frame 0 is nobody's neighbour
            self.keep(x, 1)
        return self.conv(torch.cat(parts, dim=2))


class Haar3d(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v"):
            self.add_module(f"{name}_conv", CausalConv3d(1, 1, 2, stride=2, bias=False).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        channels = [torch.cat([conv(channel) for conv in self.children()], dim=1) for channel in x.split(1, dim=1)]
        return torch.stack(channels, dim=2).flatten(1, 2)  # (B, 8 C, T', H / 2, W / 2)


class InverseHaar3d(Cached):
    def __init__(self):
        super().__init__()
        for name in ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v"):
            self.register_buffer(name, torch.zeros(1, 1, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        bands = [band.reshape(-1, 1, *x.shape[2:]) for band in x.chunk(8, dim=1)]  # (B*C, 1, T, H, W) each
        filters = list(self.buffers())
        parts = [F.conv_transpose3d(band, kernel, stride=2) for band, kernel in zip(bands, filters, strict=True)]
        out = sum(parts).reshape(x.shape[0], -1, *parts[0].shape[2:])  # (B, C, 2 T, 2 H, 2 W)
        return out[:, :, 1:] if self.first else out


class Haar2d(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("aa", "ad", "da", "dd"):
            self.register_buffer(name, torch.zeros(1, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        def transform(frames: Tensor) -> Tensor:
            single = frames.reshape(-1, 1, *frames.shape[2:])  # (B*T*C, 1, H, W)
            bands = [F.conv2d(single, kernel, stride=2) for kernel in self.buffers()]
            return torch.cat([band.reshape(len(frames), -1, *band.shape[2:]) for band in bands], dim=1)

        return per_frame(transform, x)


class InverseHaar2d(Haar2d):
    def forward(self, x: Tensor) -> Tensor:
        def transform(frames: Tensor) -> Tensor:
            bands = [band.reshape(-1, 1, *band.shape[2:]) for band in frames.chunk(4, dim=1)]
            pairs = zip(bands, self.buffers(), strict=True)
            out = sum(F.conv_transpose2d(band, kernel, stride=2) for band, kernel in pairs)
            return out.reshape(len(frames), -1, *out.shape[2:])

        return per_frame(transform, x)


class Encoder(nn.Module):
    def __init__(self, config: WFVAEConfig):
        super().__init__()
        base, flow, number = (
            config.base_channels,
            config.encoder_energy_flow_hidden_size,
            config.encoder_num_resblocks,
        )
        self.wavelet_transform_in, self.wavelet_transform_l1, self.wavelet_transform_l2 = Haar3d(), Haar2d(), Haar3d()
        blocks = [Resnet(base, base, flat=True) for _ in range(number)]
        self.down1 = nn.Sequential(Conv2d(24, base, 3, padding=1), *blocks, Downsample(base))
        blocks = [Resnet(2 * base, 2 * base) for _ in range(number)]
        self.down2 = nn.Sequential(Conv2d(base + flow, 2 * base, 3, padding=1), *blocks, TimeDownsample(2 * base))
        self.connect_l1, self.connect_l2 = Conv2d(12, flow, 3, padding=1), Conv2d(24, flow, 3, padding=1)
        self.mid = nn.Sequential(Resnet(2 * base + flow, 4 * base), Attention(4 * base), Resnet(4 * base, 4 * base))
        self.norm_out, self.conv_out = LayerNorm(4 * base), CausalConv3d(4 * base, 2 * config.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w1 = self.wavelet_transform_in(x)  # (B, 24, T1, H/2, W/2)
        w2 = self.wavelet_transform_l1(w1[:, :LOW])  # (B, 12, T1, H/4, W/4)
        w3 = self.wavelet_transform_l2(w2[:, :LOW])  # (B, 24, t, H/8, W/8)
        h = self.down2(torch.cat([self.down1(w1), self.connect_l1(w2)], dim=1))  # (B, 2b, t, H/8, W/8)
        h = self.mid(torch.cat([h, self.connect_l2(w3)], dim=1))  # (B, 4b, t, H/8, W/8)
        return self.conv_out(silu(self.norm_out(h))), w2, w3


class Decoder(nn.Module):
    def __init__(self, config: WFVAEConfig):
        super().__init__()
        base, number, depth = config.base_channels, config.decoder_num_resblocks, config.connect_res_layer_num
        self.flow = flow = config.decoder_energy_flow_hidden_size
        wide = 4 * base
        self.conv_in = CausalConv3d(config.latent_dim, wide, 3, padding=1)
        self.mid = nn.Sequential(Resnet(wide, wide), Attention(wide), Resnet(wide, wide + flow))
        blocks = [Resnet(wide, wide) for _ in range(number)]
        self.up2 = nn.Sequential(*blocks, TimeUpsample(wide), Resnet(wide, wide + flow))
        widths = [wide] + [2 * base] * number
        blocks = [Resnet(before, after) for before, after in zip(widths[:-1], widths[1:], strict=True)]
        self.up1 = nn.Sequential(*blocks, Upsample(2 * base), Resnet(2 * base, 2 * base))
        self.layer = nn.Sequential(Resnet(2 * base, base), Resnet(base, base))
        self.connect_l2, self.connect_l1 = (
            nn.Sequential(*(Resnet(flow, flow) for _ in range(depth)), Conv2d(flow, bands, 3, padding=1))
            for bands in (24, 12)
        )
        self.norm_out, self.conv_out = LayerNorm(base), Conv2d(base, 24, 3, padding=1)
        self.inverse_wavelet_transform_out, self.inverse_wavelet_transform_l2 = InverseHaar3d(), InverseHaar3d()
        self.inverse_wavelet_transform_l1 = InverseHaar2d()
        for part in (self.up2[-2].conv, self.up2[-1], self.connect_l1, self.up1, self.layer):
            for module in part.modules():
                module.rate = 2  # behind the upsampling in time

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.mid(self.conv_in(z))
        v3 = self.connect_l2(h[:, -self.flow :])  # (B, 24, t, h, w)
        l2 = self.inverse_wavelet_transform_l2(v3)  # (B, 3, T1, 2h, 2w)
        h = self.up2(h[:, : -self.flow])
        v2 = self.connect_l1(h[:, -self.flow :])  # (B, 12, T1, 2h, 2w)
        v2 = torch.cat([v2[:, :LOW] + l2, v2[:, LOW:]], dim=1)
        l1 = self.inverse_wavelet_transform_l1(v2)  # (B, 3, T1, 4h, 4w)
        h = self.layer(self.up1(h[:, : -self.flow]))  # (B, b, T1, 4h, 4w)
        v1 = self.conv_out(silu(self.norm_out(h)))  # (B, 24, T1, 4h, 4w)
        v1 = torch.cat([v1[:, :LOW] + l1, v1[:, LOW:]], dim=1)
        return self.inverse_wavelet_transform_out(v1), v2, v3  # (B, 3, T, 8h, 8w)


class PlainWFVAE(nn.Module):
    """Loads the state dict of `vae.models.wfvae.WFVAE`."""

    def __init__(self, config: WFVAEConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> moments (B, 2z, t, H/8, W/8)."""
        return self.encoder(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """(B, z, t, h, w) -> (B, 3, T, 8h, 8w)."""
        return self.decoder(z)[0]

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Sample, means and log variances of the posterior, wavelet coefficients."""
        moments, w2, w3 = self.encoder(x)
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        sample, v2, v3 = self.decoder(mean + torch.exp(0.5 * logvar) * noise)
        return sample, mean, logvar, (w2, v2, w3, v3)

    def encode_chunks(self, x: Tensor, num_frames: int = 4) -> Tensor:
        parts = []
        with self._chunked():
            for part in (x[:, :, :1], *x[:, :, 1:].split(num_frames, dim=2)):
                self._set(first=not parts)
                parts.append(self.encode(part))
        return torch.cat(parts, dim=2)

    def decode_chunks(self, z: Tensor, num_latents: int = 2) -> Tensor:
        parts = []
        with self._chunked():
            for start in (0, *range(1, z.shape[2], num_latents)):
                stop = min(start + num_latents, z.shape[2]) if start else 1
                look_ahead = int(start > 0 and stop < z.shape[2])
                self._set(first=not parts, look_ahead=look_ahead)
                out = self.decode(z[:, :, start : stop + look_ahead])
                parts.append(out[:, :, : out.shape[2] - 4 * look_ahead])
        return torch.cat(parts, dim=2)

    @contextmanager
    def _chunked(self) -> Iterator[None]:
        self._set(chunked=True)
        yield
        self._set(chunked=False, first=True, look_ahead=0, kept=None)

    def _set(self, **values: bool | int | None) -> None:
        for module in self.modules():
            if isinstance(module, Cached):
                for name, value in values.items():
                    setattr(module, name, value)


class PlainTraining:
    """Alternating steps: three backward passes for the autoencoder's, average weights in new tensors."""

    def __init__(self, vae: PlainWFVAE, discriminator: nn.Module, perceptual: PerceptualLoss, learning_rate: float):
        self.vae, self.discriminator, self.perceptual = vae, discriminator, perceptual
        self.trained = {name: each for name, each in vae.named_parameters() if each.requires_grad}
        self.average = {name: each.detach().clone() for name, each in self.trained.items()}
        self.vae_optimizer = torch.optim.AdamW(self.trained.values(), lr=learning_rate, weight_decay=1e-4)
        self.disc_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=learning_rate, weight_decay=1e-4)

    def generator_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One update of the autoencoder and of its average; x (B, 3, T, H, W), noise (B, z, t, h, w)."""
        loss, metrics = self.generator_loss(x, noise)
        self.vae_optimizer.zero_grad()
        loss.backward()
        self.vae_optimizer.step()
        for name, each in self.trained.items():
            self.average[name] = 0.999 * self.average[name] + (1 - 0.999) * each.detach()
        return metrics

    def generator_loss(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for each in self.trained.values():
            each.requires_grad_(True)
        x_hat, mean, logvar, coefficients = self.vae(x, noise)
        x_hat = x_hat.float()
        frames, frames_hat = (clip.transpose(1, 2).flatten(0, 1) for clip in (x, x_hat))  # (B*T, 3, H, W)
        nll = ((frames - frames_hat).abs() + self.lpips(frames, frames_hat)).sum() / len(frames)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(x)
        w2, v2, w3, v3 = coefficients
        wl = ((w2 - v2).abs().sum() + (w3 - v3).abs().sum()) / len(x)
        g = -self.discriminator(x_hat).mean()
        last = self.vae.decoder.conv_out.weight
        nll_grad, g_grad = (torch.autograd.grad(each, last, retain_graph=True)[0] for each in (nll, g))
        d_weight = 0.5 * (nll_grad.norm() / (g_grad.norm() + 1e-6)).clamp(0, 1e6).detach()
        loss = nll + 1e-6 * kl + d_weight * g + 0.1 * wl
        values = {"nll_loss": nll, "kl_loss": kl, "wl_loss": wl, "g_loss": g, "d_weight": d_weight, "total_loss": loss}
        return loss, {name: value.detach() for name, value in values.items()}

    def lpips(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Frames (N, 3, H, W) -> (N, 1, 1, 1)."""
        taps = []
        for images in (x, x_hat):
            h, each = self.perceptual.scaling_layer(images), []
            for block in self.perceptual.net.values():
                h = block(h)
                each.append(h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10))
            taps.append(each)
        distances = [
            getattr(self.perceptual, f"lin{k}")((one - other).square()).mean((2, 3), keepdim=True)
            for k, (one, other) in enumerate(zip(*taps, strict=True))
        ]
        return sum(distances)

    def discriminator_step(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator; the autoencoder's weights are frozen, its whole forward pass runs."""
        for each in self.trained.values():
            each.requires_grad_(False)
        x_hat = self.vae(x, noise)[0].float()
        real, fake = self.discriminator(x), self.discriminator(x_hat.detach())
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.disc_optimizer.zero_grad()
        loss.backward()
        self.disc_optimizer.step()
        return {"disc_loss": loss.detach()}
