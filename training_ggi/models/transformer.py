"""The CogVideoX-5B-I2V transformer with 16 more input channels for the edge condition, and how it is called.

Channels of its input: [0, 16) noisy latents, [16, 32) latents of the two end frames, [32, 48) latents of the condition.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from common.pretrained import check_keys, first_line, is_local, parameter_dtype, widen_conv

LATENT_CHANNELS = 16
STOCK_IN_CHANNELS = 32  # noisy latents, then latents of the images
GGI_IN_CHANNELS = 48  # the same, then latents of the condition
LATENT_PX = 8  # image pixels per latent pixel
LATENT_FRAMES = 4  # frames per latent frame, the first latent frame being one frame alone

RotaryTables = tuple[torch.Tensor, torch.Tensor]


def load_transformer(
    folder_or_id: str | Path,
    subfolder: str | None = "transformer",
    *,
    torch_dtype: torch.dtype = torch.bfloat16,
    ignore_learned_positional_embeddings: bool = False,
    **hub_options: Any,
) -> CogVideoXTransformer3DModel:
    """Load CogVideoX-5B-I2V's transformer, stock or already widened, and widen it to 48 input channels.

    Args:
        folder_or_id: a folder in diffusers layout, or a model id on the Hub.
        subfolder: where the transformer lies in it; None for the folder itself.
        torch_dtype: dtype of the weights.
        ignore_learned_positional_embeddings: see `drop_position_table`.
        hub_options: for a model id (`revision`, `variant`, `cache_dir`, ...); a local folder uses `variant` alone.

    Returns:
        the model in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder, or the model id cannot be had.
        ValueError: weights are missing, left over or of another shape, or the model is another one.
    """
    load = CogVideoXTransformer3DModel.from_pretrained
    options = {"torch_dtype": torch_dtype, "output_loading_info": True, **hub_options}
    transformer, info = _loaded(load, folder_or_id, subfolder, **options)
    check_keys(f"{folder_or_id} does not fit its transformer's config", info["missing_keys"], info["unexpected_keys"])
    return _adapted(transformer, ignore_learned_positional_embeddings).eval()


def blank_transformer(
    folder_or_id: str | Path,
    *,
    ignore_learned_positional_embeddings: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> CogVideoXTransformer3DModel:
    """What `load_transformer` loads, on the meta device: all shapes, of which `config.json` alone is read.

    Raises:
        FileNotFoundError, ValueError: as of `load_transformer`, but for weights.
    """
    load = CogVideoXTransformer3DModel.load_config
    config = _loaded(load, folder_or_id, "transformer", revision=revision, cache_dir=cache_dir)
    with torch.device("meta"):
        return _adapted(CogVideoXTransformer3DModel.from_config(config), ignore_learned_positional_embeddings)


def _loaded(load: Callable[..., Any], folder_or_id: str | Path, subfolder: str | None, **options: Any) -> Any:
    """The answer of a loader of diffusers, with errors that say what is looked for."""
    name = str(folder_or_id)
    if is_local(name) and not Path(name).is_dir():
        raise FileNotFoundError(f"the folder {name} of the base model does not exist")
    try:
        return load(name, subfolder=subfolder, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"no transformer at {name}{f'/{subfolder}' if subfolder else ''}: {first_line(error).rstrip('.')}. Give "
            "the folder of CogVideoX-5b-I2V in diffusers layout, or its id on the Hub"
        ) from error


def _adapted(transformer: CogVideoXTransformer3DModel, without_position_table: bool) -> CogVideoXTransformer3DModel:
    widen_patch_embed(transformer)
    if without_position_table:
        drop_position_table(transformer)
    return transformer


def widen_patch_embed(
    transformer: CogVideoXTransformer3DModel, in_channels: int = GGI_IN_CHANNELS
) -> CogVideoXTransformer3DModel:
    """Widen the patch embedding from 32 to `in_channels` inputs, in place; the new weights start at zero.

    Right after widening, the output does not depend on the added channels; their gradient is not zero. A model that
    already has them keeps its weights. The config follows, so that a saved folder reloads with `from_pretrained`.

    Args:
        transformer: a CogVideoX-5B-I2V transformer on any device (meta included), in any dtype.

    Returns:
        the same object.

    Raises:
        ValueError: it is CogVideoX 1.5, or takes neither 32 nor `in_channels` channels.
    """
    narrow = transformer.patch_embed.proj
    if not isinstance(narrow, torch.nn.Conv2d):
        raise ValueError(
            f"the transformer's patch_size_t is {transformer.config.patch_size_t}: this is CogVideoX 1.5, whose "
            "patches span frames; use CogVideoX-5b-I2V"
        )
    old_channels = narrow.in_channels
    if old_channels not in (STOCK_IN_CHANNELS, in_channels) or old_channels > in_channels:
        raise ValueError(
            f"the transformer takes {old_channels} channels; expected {STOCK_IN_CHANNELS} (CogVideoX-5b-I2V; the "
            f"text-to-video models have 16) or {in_channels} (already widened)"
        )
    if old_channels != in_channels:
        transformer.patch_embed.proj = widen_conv(narrow, in_channels)
    transformer.register_to_config(in_channels=in_channels)
    return transformer


def drop_position_table(transformer: CogVideoXTransformer3DModel) -> None:
    """Do without the learned position table: any size can then be trained, from a model that never saw it missing.

    Positions come from the rotary tables alone. The config follows; the original's inference expects the table, and
    cannot read what is exported without it.
    """
    if transformer.config.use_learned_positional_embeddings:
        del transformer.patch_embed.pos_embedding
        transformer.patch_embed.use_learned_positional_embeddings = False
        transformer.register_to_config(use_learned_positional_embeddings=False)


def check_video_size(
    transformer: CogVideoXTransformer3DModel, num_frames: int, height_px: int, width_px: int
) -> tuple[int, int, int]:
    """Whether clips of this size can go through the model, asked before anything is encoded.

    The learned position table belongs to one size. At another height or width diffusers refuses the first batch; at
    another number of frames it takes a fixed sine table instead without a word.

    Returns:
        frames, height and width of the latents.

    Raises:
        ValueError: all that does not fit, and what to change.
    """
    config = transformer.config
    side_px = LATENT_PX * config.patch_size
    problems = [
        f"{name}={value} must be a positive multiple of {side_px}"
        for name, value in (("height", height_px), ("width", width_px))
        if value <= 0 or value % side_px
    ]
    if num_frames <= LATENT_FRAMES or num_frames % LATENT_FRAMES != 1:
        problems.append(f"max_num_frames={num_frames} must be 4k + 1 and at least {LATENT_FRAMES + 1}")
    table = config.sample_frames, config.sample_height * LATENT_PX, config.sample_width * LATENT_PX
    if not problems and config.use_learned_positional_embeddings and table != (num_frames, height_px, width_px):
        problems.append(
            f"the learned position table is for {table[0]} frames of {table[1]}x{table[2]} px (height x width), not "
            f"{num_frames} of {height_px}x{width_px}: take that size, or set ignore_learned_positional_embeddings"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return (num_frames - 1) // LATENT_FRAMES + 1, height_px // LATENT_PX, width_px // LATENT_PX


def rotary_tables(
    head_dim: int,
    num_frames: int,
    grid: tuple[int, int],
    base_grid: tuple[int, int],
    device: torch.device | str | None = None,
) -> RotaryTables:
    """Rotary position tables of the video tokens, in the order time, height, width.

    Time counts latent frames. Height and width are the coordinates of the grid fitted, with its aspect ratio, into the
    middle of the base grid, on which the model was trained.

    Args:
        head_dim: a multiple of 16; a quarter of it encodes time, three eighths height and three eighths width.
        num_frames: latent frames.
        grid: tokens along height and width.
        base_grid: the same of the size that the model was trained for.

    Returns:
        cosines and sines, each (num_frames * grid height * grid width, head_dim) float32, repeated pairwise.
    """
    (height, width), (base_height, base_width) = grid, base_grid
    if height * base_width > width * base_height:
        fitted = base_height, round(base_height / height * width)
    else:
        fitted = round(base_width / width * height), base_width
    top, left = round((base_height - fitted[0]) / 2), round((base_width - fitted[1]) / 2)
    crop = (top, left), (top + fitted[0], left + fitted[1])
    return get_3d_rotary_pos_embed(head_dim, crop, grid, num_frames, device=device)


def rotary_for(transformer: CogVideoXTransformer3DModel, latents: torch.Tensor) -> RotaryTables:
    """The rotary tables for latents (B, F, C, h, w) of the transformer, on their device: each (F h w / 4, head_dim)."""
    config = transformer.config
    patch = config.patch_size
    return rotary_tables(
        config.attention_head_dim,
        latents.shape[1],
        (latents.shape[3] // patch, latents.shape[4] // patch),
        (config.sample_height // patch, config.sample_width // patch),
        latents.device,
    )


def model_input(noisy: torch.Tensor, image_latents: torch.Tensor, cond_latents: torch.Tensor) -> torch.Tensor:
    """Lay the three latents, each (B, F, 16, h, w), side by side: (B, F, 48, h, w).

    Raises:
        ValueError: their shapes differ.
    """
    parts = {"noisy": noisy, "image_latents": image_latents, "cond_latents": cond_latents}
    if len({part.shape for part in parts.values()}) > 1:
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise ValueError(f"the latents of one call must share one shape (B, F, C, h, w); got {shapes}")
    return torch.cat(list(parts.values()), dim=2)  # (B, F, 48, h, w)


def predict_velocity(
    transformer: torch.nn.Module,
    inputs: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timesteps: torch.Tensor,
    rotary: RotaryTables,
) -> torch.Tensor:
    """One call of the transformer, in the dtype of its patch embedding.

    Where trained parameters are float32 beside a bfloat16 base, the call must run under autocast.

    Args:
        transformer: the widened model, wrapped or not.
        inputs: (B, F, 48, h, w), see `model_input`.
        prompt_embeds: (B, tokens, C).
        timesteps: (B,) integers.
        rotary: see `rotary_for`.

    Returns:
        (B, F, 16, h, w) float32.
    """
    dtype = parameter_dtype(transformer)
    return transformer(
        hidden_states=inputs.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timesteps,
        image_rotary_emb=rotary,
        return_dict=False,
    )[0].float()  # (B, F, 16, h, w)
