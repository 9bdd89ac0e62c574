"""NOVA (Deng et al. 2024): frames are predicted one after the other, the tokens of a frame in sets.

A video encoder turns the text and the frames before into conditioning tokens of the next frame; an image encoder, given
these and some tokens of the frame, gives features of the other tokens; a diffusion head denoises each token from its
features.

B samples, T latent frames of C x H x W values, patches of p x p of them: N tokens of a frame in the image encoder. The
video encoder's patches are 2p x 2p: Nv = N / 4 tokens. D is the width of the encoders.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.pretrained import PretrainedModel
from diffnext.models.attention import KVCache, rotary_angles
from diffnext.models.blocks import VisionTransformer
from diffnext.models.diffusion_mlp import AdaLayerNorm, DiffusionMLP
from diffnext.models.embeddings import (
    LabelEmbed,
    MotionEmbed,
    TextEmbed,
    VideoPosEmbed,
    grid_positions,
    patchify,
    position_embedding,
)
from diffnext.models.masking import MaskEmbed, gather_tokens, split_tokens
from diffnext.models.noise import NoiseSchedule
from diffnext.models.objective import NovaDraws, nova_losses, token_losses

VIT_HEADS = {768: 12, 1024: 16, 1536: 16}
ARCH_PARTS = {
    "video encoder": ("vit", "depth", "embed_dim", "num_heads"),
    "image encoder": ("vit", "depth", "embed_dim", "num_heads"),
    "decoder": ("mlp", "depth", "embed_dim"),
}


@dataclass(frozen=True)
class NovaConfig:
    """Sizes of a model.

    Attributes:
        image_dim: C.
        image_size: (height, width) in pixels; a config.json may have one number for both.
        image_stride: pixels per latent pixel, 8 or 16.
        text_token_dim: width of the text encoder; None conditions on one of 1000 class labels.
        text_token_len: text tokens.
        image_base_size: tokens of a frame (rows, columns) in the image encoder.
        video_base_size: frames (1 for a model of images), and tokens of a frame in the video encoder.
        video_mixer_rank: None or 0: none; above 0: low-rank; below 0: full rank.
        rotary_pos_embed: rotary instead of absolute positions; these take other sizes of images too.
        arch: video encoder, image encoder, decoder. Each a name, as vit_d16w1024 and mlp_d6w1024, or a mapping of
            depth, embed_dim and, for the encoders, num_heads.
    """

    image_dim: int = 4
    image_size: tuple[int, ...] = (1024, 1024)
    image_stride: int = 8
    text_token_dim: int | None = None
    text_token_len: int = 256
    image_base_size: tuple[int, ...] = (64, 64)
    video_base_size: tuple[int, ...] = (1, 32, 32)
    video_mixer_rank: int | None = None
    rotary_pos_embed: bool = False
    arch: tuple[Any, ...] = ("vit_d16w1024", "vit_d32w1024", "mlp_d6w1024")

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if len(self.arch) != 3:
            problems.append(f"arch has {len(self.arch)} entries, but must have 3: {', '.join(ARCH_PARTS)}")
        unit_px = 2 * self.patch * self.image_stride
        if len(self.image_size) != 2 or any(length % unit_px for length in self.image_size):
            problems.append(f"image_size {self.image_size} must be two multiples of {unit_px} px, or one for both")
        for name in ("text_token_dim", "video_mixer_rank"):
            if not isinstance(getattr(self, name), int | None):
                problems.append(f"{name} is {getattr(self, name)!r}, but must be a whole number or None")
        if self.rotary_pos_embed or problems:
            return problems
        tokens = {"image_base_size": (self.image_base_size, 1), "video_base_size": (self.video_base_size[1:], 2)}
        for name, (size, patches) in tokens.items():
            expected = tuple(length // (self.image_stride * self.patch * patches) for length in self.image_size)
            if tuple(size) != expected:
                problems.append(
                    f"{name} has {tuple(size)} tokens per frame, but images of {self.image_size} px have {expected}: "
                    "absolute positions fit one size"
                )
        return problems

    @property
    def patch(self) -> int:
        """p, in latent pixels."""
        return 15 // self.image_stride + 1


def arch_definition(arch: str | Mapping[str, int], part: str) -> dict[str, int]:
    """Depth, embed_dim and, for an encoder, num_heads.

    Args:
        arch: name or mapping, see `NovaConfig`.
        part: "video encoder", "image encoder" or "decoder".

    Raises:
        ValueError: another kind of name, or a mapping with other keys.
    """
    kind, *keys = ARCH_PARTS[part]
    if isinstance(arch, Mapping):
        if sorted(arch) != sorted(keys):
            raise ValueError(f"arch of the {part} has keys {sorted(arch)}, but must have {sorted(keys)}")
        return dict(arch)
    match = re.fullmatch(rf"{kind}_d(\d+)w(\d+)", str(arch))
    widths = f" of width {', '.join(map(str, VIT_HEADS))}" if kind == "vit" else ""
    if match is None or (kind == "vit" and int(match[2]) not in VIT_HEADS):
        raise ValueError(
            f"arch {arch!r} of the {part} is unknown: use {kind}_d<depth>w<width>{widths}, or a mapping of "
            f"{', '.join(keys)}"
        )
    depth, width = int(match[1]), int(match[2])
    definition = {"depth": depth, "embed_dim": width}
    return definition | ({"num_heads": VIT_HEADS[width]} if kind == "vit" else {})


class NOVATransformer3DModel(PretrainedModel):
    """The whole network. `forward` is a training step's loss; generation uses the methods that it is made of."""

    config_class = NovaConfig
    config: NovaConfig
    _no_split_modules = ("Block", "DiffusionBlock")  # FSDP gathers one of them at a time

    @classmethod
    def adapt_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        size = config.get("image_size")
        return config | {"image_size": (size, size)} if isinstance(size, int) else config

    def __init__(self, config: NovaConfig):
        super().__init__(config)
        video, image, head = (arch_definition(arch, part) for arch, part in zip(config.arch, ARCH_PARTS, strict=True))
        dim, patch, channels = video["embed_dim"], config.patch, config.image_dim
        if image["embed_dim"] != dim:
            raise ValueError(f"arch: the video encoder is {dim} wide, but the image encoder {image['embed_dim']}")
        self.video_encoder = VisionTransformer(**video, patch=2 * patch, image_dim=channels)
        if config.video_mixer_rank:
            self.video_encoder.mixer = AdaLayerNorm(dim, rank=config.video_mixer_rank, normalize=False)
        self.image_encoder = VisionTransformer(**image, patch=patch, image_dim=channels)
        self.image_decoder = DiffusionMLP(**head, cond_dim=dim, patch=patch, image_dim=channels)
        self.mask_embed = MaskEmbed(dim)
        self.text_embed = self.label_embed = self.video_pos_embed = self.motion_embed = None
        if config.text_token_dim:
            self.text_embed = TextEmbed(config.text_token_dim, dim, config.text_token_len)
        else:
            self.label_embed = LabelEmbed(dim)
        if config.rotary_pos_embed:
            for encoder in (self.video_encoder, self.image_encoder):
                rotary_angles(torch.zeros(3), encoder.head_dim)  # complains about widths that do not fit
        else:
            self.video_pos_embed = VideoPosEmbed(dim, config.video_base_size)
        if config.video_base_size[0] > 1:
            self.motion_embed = MotionEmbed(dim)

    def enable_gradient_checkpointing(self, level: int) -> None:
        """Recompute instead of store: 1 the MLPs of the video encoder, 2 and of the image encoder, 3 and the head."""
        if level not in range(4):
            raise ValueError(f"gradient_checkpointing={level} must be 0, 1, 2 or 3")
        for block in self.video_encoder.blocks:
            block.recompute_mlp = level >= 1
        for block in self.image_encoder.blocks:
            block.recompute_mlp = level >= 2
        for block in self.image_decoder.blocks:
            block.recompute = level >= 3

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of video tokens in frames of height x width latent pixels.

        Raises:
            ValueError: the positions are absolute and made for another size, or the size is not whole patches.
        """
        own = tuple(length // self.config.image_stride for length in self.config.image_size)
        unit = self.video_encoder.patch_embed.patch
        if not self.config.rotary_pos_embed and (height, width) != own:
            raise ValueError(f"latents of {height} x {width} do not fit this model's {own[0]} x {own[1]}")
        if height % unit or width % unit:
            raise ValueError(f"latents of {height} x {width} are not whole patches of {unit} x {unit}")
        return height // unit, width // unit

    def prefix(
        self,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        flow: Tensor | None = None,
        fps: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """What comes before the frames in the video encoder: (B, P, D).

        Args:
            text: (B, L, text_token_dim) of `text_embed.pad`, for a model of text.
            labels: (B,) integers, for a model of labels.
            flow, fps: (B,) motion score and frame rate. A model of videos puts two tokens for them behind the text if
                it gets `flow`; without `fps`, that is 12.
            dropped: (B,) bool, samples without their text or label.

        Raises:
            ValueError: text or labels are missing.
        """
        embed, value = (self.label_embed, labels) if self.text_embed is None else (self.text_embed, text)
        if embed is None or value is None:
            raise ValueError(f"this model needs {'labels' if self.text_embed is None else 'text'}, which is None")
        tokens = embed(value, dropped)  # (B, L or 1, D)
        if self.motion_embed is None or flow is None:
            return tokens
        return torch.cat([tokens, self.motion_embed(flow, fps)], dim=1)  # (B, L + 2, D)

    def embed_frames(self, frames: Tensor) -> Tensor:
        """Latents (B, t, C, H, W) to tokens (B, t, Nv, D) for the video encoder, without positions; t may be 0."""
        return self.video_encoder.patch_embed(frames)

    def bos_frames(self, batch: int, num_tokens: int) -> Tensor:
        """Tokens that stand for what is before the first frame: (B, 1, Nv, D)."""
        return self.mask_embed.bos_token.expand(batch, 1, num_tokens, -1)

    def encode_frames(
        self,
        tokens: Tensor,
        prefix: Tensor | None,
        size: tuple[int, int],
        num_frames: int | None = None,
        first_frame: int = 0,
        caches: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """Conditioning tokens of frames first_frame, ..., from the frames before each.

        Args:
            tokens: (B, t, Nv, D) of `bos_frames` and `embed_frames`: first_frame - 1, ...
            prefix: (B, P, D) of `prefix`; None after the first call with caches.
            size: of `frame_size`.
            num_frames: length of the whole video, by default t.
            caches: of `new_caches`, to go on from the calls before.

        Returns:
            (B, t, Nv, D), before `mix`.
        """
        num_tokens = tokens.shape[2]
        angles = None
        if self.video_pos_embed is None:
            positions = grid_positions(tokens.shape[1], size, first_frame, tokens.device)  # (t * Nv, 3)
            angles = rotary_angles(positions, self.video_encoder.head_dim)[None]  # (1, t * Nv, head_dim / 2)
        else:
            tokens = self.video_pos_embed(tokens, num_frames, first_frame)  # (B, t, Nv, D)
        lengths = [num_tokens] * tokens.shape[1]
        lengths[0] += 0 if prefix is None else prefix.shape[1]
        features = self.video_encoder(
            tokens.flatten(1, 2), prefix, angles=angles, frame_lengths=lengths, caches=caches
        )  # (B, t * Nv, D)
        return features.unflatten(1, (-1, num_tokens))  # (B, t, Nv, D)

    def new_caches(self) -> list[KVCache]:
        """For `encode_frames`: one frame per call, starting with the first."""
        return [KVCache() for _ in self.video_encoder.blocks]

    def mix(self, first: Tensor, later: Tensor) -> Tensor:
        """Scale and shift the first frame's features (B, 1, Nv, D) by those of later frames (B, t, Nv, D).

        A model without mixer takes the later ones as they are.
        """
        mixer = getattr(self.video_encoder, "mixer", None)
        return later if mixer is None else mixer(first, later)[0]

    def conditions(self, latents: Tensor, prefix: Tensor) -> Tensor:
        """Conditioning tokens of all frames in one pass: latents (B, C, T, H, W) to (B * T, Nv, D)."""
        size = self.frame_size(*latents.shape[-2:])
        bos = self.bos_frames(len(latents), size[0] * size[1])  # (B, 1, Nv, D)
        # Of a single frame nothing is embedded; the empty tensor keeps all parameters in the graph, as DDP wants it.
        frames = self.embed_frames(latents[:, :, :-1].transpose(1, 2))  # (B, T - 1, Nv, D)
        features = self.encode_frames(torch.cat([bos, frames], dim=1), prefix, size)  # (B, T, Nv, D)
        first, later = features.split([1, features.shape[1] - 1], dim=1)
        return torch.cat([first, self.mix(first, later)], dim=1).flatten(0, 1)  # (B * T, Nv, D)

    def image_features(self, frames: Tensor, conditions: Tensor, visible_ids: Tensor) -> Tensor:
        """Features of all tokens of frames of which some are known.

        Args:
            frames: (n, C, H, W) latents; what is not visible has no effect.
            conditions: (n, Nv, D) of `conditions`, or of `encode_frames` and `mix`.
            visible_ids: (n, k) int64.

        Returns:
            (n, N, D).
        """
        tokens = self.mask_embed(self.image_encoder.patch_embed(frames), visible_ids)  # (n, N, D)
        rows, columns = (length // self.config.patch for length in frames.shape[-2:])
        angles = None
        if self.config.rotary_pos_embed:
            positions = grid_positions(1, (rows, columns), device=tokens.device)  # (N, 3)
            angles = rotary_angles(positions, self.image_encoder.head_dim)[None]  # (1, N, head_dim / 2)
        else:
            tokens = tokens + position_embedding((rows, columns), tokens.shape[-1], tokens.device).to(tokens.dtype)
        return self.image_encoder(tokens, conditions, visible_ids, angles)

    def forward(
        self,
        latents: Tensor,
        draws: NovaDraws,
        noise: NoiseSchedule,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        flow: Tensor | None = None,
        fps: Tensor | None = None,
        loss_repeat: int = 4,
        text_dropout: float = 0.1,
        masked_only: bool = True,
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            latents: (B, C, H, W) or (B, C, T, H, W) of `nova_inputs`.
            text, labels, flow, fps: as in `prefix`.
            loss_repeat: R, noises per token.
            text_dropout: share of samples that lose their text, for guidance.
            masked_only: evaluate the head on masked tokens only. The others have no weight: the numbers are the same.

        Returns:
            those of `nova_losses`, float32 scalars.

        Raises:
            ValueError: shapes that do not fit each other or the model.
        """
        latents = latents[:, :, None] if latents.ndim == 4 else latents  # (B, C, T, H, W)
        self._check_draws(latents, draws, loss_repeat)
        num_frames = latents.shape[2]
        frames = latents.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        prefix = self.prefix(text, labels, flow, fps, draws.text_dropout < text_dropout)  # (B, P, D)
        conditions = self.conditions(latents, prefix)  # (B * T, Nv, D)
        visible_ids, masked_ids = split_tokens(draws.token_order, draws.mask_ratio)
        z = self.image_features(frames, conditions, visible_ids)  # (B * T, N, D)

        clean, noises, timesteps = patchify(frames, self.config.patch), draws.noise, draws.timesteps
        if masked_only:
            z, clean = gather_tokens(z, masked_ids), gather_tokens(clean, masked_ids)  # (B * T, M, ...)
            repeated_ids = masked_ids.repeat(loss_repeat, 1)  # (R * B * T, M)
            noises, timesteps = gather_tokens(noises, repeated_ids), gather_tokens(timesteps, repeated_ids)
            weights = torch.ones_like(repeated_ids, dtype=torch.float32)
        else:
            weights = torch.ones(z.shape[:2], device=z.device).scatter(1, visible_ids, 0.0).repeat(loss_repeat, 1)
        corrupted = noise.corrupt(clean.repeat(loss_repeat, 1, 1), noises, timesteps)
        pred = self.image_decoder(corrupted.noisy, corrupted.timestep, z)  # (R * B * T, M or N, p * p * C)
        return nova_losses(token_losses(pred, corrupted.target), weights, num_frames)

    def _check_draws(self, latents: Tensor, draws: NovaDraws, loss_repeat: int) -> None:
        """ValueError unless the draws are those of such a batch."""
        batch, channels, num_frames, height, width = latents.shape
        self.frame_size(height, width)
        num_tokens, values = height * width // self.config.patch**2, channels * self.config.patch**2
        expected = {
            "text_dropout": (batch,),
            "token_order": (batch * num_frames, num_tokens, 1),
            "noise": (loss_repeat * batch * num_frames, num_tokens, values),
            "timesteps": (loss_repeat * batch * num_frames, num_tokens),
        }
        problems = [
            f"draws.{name} is {tuple(getattr(draws, name).shape)}, expected {shape}"
            for name, shape in expected.items()
            if getattr(draws, name).shape != shape
        ]
        if problems:
            raise ValueError(f"latents {tuple(latents.shape)} and loss_repeat={loss_repeat}: " + "; ".join(problems))
