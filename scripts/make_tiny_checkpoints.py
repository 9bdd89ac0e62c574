"""Writes miniature pretrained checkpoints, for the tests and for the demo on a CPU.

A miniature has the folder layout, file formats and state-dict keys of the public checkpoint, and some 100,000 random
weights. It shows that training, saving, resuming and inference work; it knows nothing about images.

    python scripts/make_tiny_checkpoints.py
    python scripts/make_tiny_checkpoints.py --output runs/demo/checkpoints --only gaussian_refiner --vae_fit_steps 300
"""

import argparse
import json
import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from torchvision.models.optical_flow import raft_large
from transformers import (
    BitConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    PhiConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out the same on every machine, and threads do not wait for each other where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random CPU weights made inside follow from `seed`; the generator of the caller is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        yield


def save_random(make: Callable[[], Any], directory: Path, seed: int, **settings: Any) -> Any:
    """Saves the network that `make` builds, with weights that follow from `seed`, and returns it."""
    with seeded(seed):
        network = make()
    network.save_pretrained(directory, **settings)
    return network


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model_index(directory: Path, pipeline: str, parts: dict[str, Any]) -> None:
    """`model_index.json`: the class of the pipeline, and library and class of each part."""
    index = dict(_class_name=pipeline, _diffusers_version=diffusers.__version__, **parts)
    write_json(directory / "model_index.json", dict(sorted(index.items())))


# What Stable Diffusion and its relatives have in common. Neighbouring levels must differ in width, or the keys of the
# residual blocks' 1x1 shortcuts would be missing.
SD_UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
)
SD_SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TWO_LAYERS = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
CLIP_VISION = TWO_LAYERS | dict(image_size=224, patch_size=32)

# ----------------------------------------------------------------------------------------------------------------------
# gaussian_refiner: stabilityai/stable-diffusion-2-1-unclip

UNCLIP_UNET = SD_UNET | dict(
    block_out_channels=(8, 12, 16, 16),
    cross_attention_dim=16,
    attention_head_dim=(1, 2, 2, 2),  # despite its name the number of heads per level
    use_linear_projection=True,
    class_embed_type="projection",
    projection_class_embeddings_input_dim=24,  # image embedding and noise level embedding, 12 each
    upcast_attention=True,
)
UNCLIP_VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(4, 8, 12, 12),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=64,
    scaling_factor=0.18215,
)
# A VAE that is fitted must be able to tell the colour of an image as a whole. The last normalisation of the decoder
# subtracts an image's mean over a group of channels and divides by the deviation: with the groups of one channel above
# nothing is left of an image of one colour. One group of eight channels keeps the three colours. The keys are the same.
UNCLIP_FITTED_VAE = UNCLIP_VAE | dict(block_out_channels=(8, 12, 16, 16), norm_num_groups=1)
UNCLIP_TEXT_ENCODER = TWO_LAYERS | dict(
    vocab_size=520,
    hidden_size=16,
    projection_dim=16,
    max_position_embeddings=77,
    hidden_act="gelu",
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
UNCLIP_IMAGE_ENCODER = CLIP_VISION | dict(hidden_size=16, projection_dim=12, hidden_act="gelu")
UNCLIP_SCHEDULER = SD_SCHEDULE | dict(
    skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
)
UNCLIP_IMAGE_NOISING_SCHEDULER = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
CLIP_FEATURE_EXTRACTOR = dict(
    image_processor_type="CLIPImageProcessor",
    do_convert_rgb=True,
    do_resize=True,
    size={"shortest_edge": 224},
    resample=3,
    do_center_crop=True,
    crop_size={"height": 224, "width": 224},
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
)
UNCLIP_PARTS = dict(
    feature_extractor=["transformers", "CLIPImageProcessor"],
    image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    image_noising_scheduler=["diffusers", "DDPMScheduler"],
    image_normalizer=["stable_diffusion", "StableUnCLIPImageNormalizer"],
    scheduler=["diffusers", "PNDMScheduler"],
    text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"],
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)


def make_refiner_checkpoint(directory: Path, seed: int = 0, vae_fit_steps: int = 0) -> Path:
    """A miniature of stable-diffusion-2-1-unclip that `StableUnCLIPImg2ImgPipeline.from_pretrained` loads.

    The same seed gives the same bytes; files already in `directory` are overwritten. With `vae_fit_steps` > 0 the VAE
    is a little wider and fitted on photographs (`fit_vae`), so that the effect of training can be seen in images.
    Returns `directory`.
    """
    directory = Path(directory)
    write_model_index(directory, "StableUnCLIPImg2ImgPipeline", UNCLIP_PARTS)
    write_clip_tokenizer(directory / "tokenizer")
    write_json(directory / "feature_extractor" / "preprocessor_config.json", CLIP_FEATURE_EXTRACTOR)
    PNDMScheduler(**UNCLIP_SCHEDULER).save_pretrained(directory / "scheduler")
    DDPMScheduler(**UNCLIP_IMAGE_NOISING_SCHEDULER).save_pretrained(directory / "image_noising_scheduler")
    with seeded(seed):
        text_encoder = CLIPTextModel(CLIPTextConfig(**UNCLIP_TEXT_ENCODER))
    save_clip_text_encoder(text_encoder, directory / "text_encoder")
    save_image_encoder(directory / "image_encoder", UNCLIP_IMAGE_ENCODER, seed)
    with seeded(seed):
        image_normalizer = StableUnCLIPImageNormalizer(UNCLIP_IMAGE_ENCODER["projection_dim"])
        nn.init.normal_(image_normalizer.mean, std=0.25)
        nn.init.uniform_(image_normalizer.std, 0.5, 1.5)
    image_normalizer.save_pretrained(directory / "image_normalizer")
    save_random(lambda: UNet2DConditionModel(**UNCLIP_UNET), directory / "unet", seed)
    save_unclip_vae(directory / "vae", seed, vae_fit_steps)
    return directory


def save_image_encoder(directory: Path, settings: dict[str, Any], seed: int) -> None:
    save_random(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**settings)), directory, seed)


def save_unclip_vae(
    directory: Path, seed: int, fit_steps: int, pictures: Callable[[], list[torch.Tensor]] | None = None
) -> None:
    """UNCLIP_VAE, or with `fit_steps` > 0 UNCLIP_FITTED_VAE after `fit_vae` on the photographs or `pictures`."""
    with seeded(seed):
        vae = AutoencoderKL(**(UNCLIP_FITTED_VAE if fit_steps else UNCLIP_VAE))
    if fit_steps:
        fit_and_tell(vae, fit_steps, seed, pictures=pictures() if pictures else None)
    vae.save_pretrained(directory)


def save_clip_text_encoder(text_encoder: CLIPTextModel, directory: Path) -> None:
    """Saves with the keys of the public files, which begin with `text_model.`; transformers 5 writes them without."""
    text_encoder.save_pretrained(directory)
    weights = {
        f"text_model.{key.removeprefix('text_model.')}": value for key, value in text_encoder.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_clip_tokenizer(directory: Path) -> None:
    """CLIP's byte-pair tokenizer with six merges, as the four files of the public checkpoint.

    special_tokens_map.json names another padding token than tokenizer_config.json, and wins: text is padded with `!`,
    id 0.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = range(256, 256 + 256 - len(printable))  # for the other bytes, as in GPT-2
    symbols = [chr(code) for code in (*printable, *stand_ins)]
    merges = ["l o", "lo w</w>", "b e", "be s", "bes t</w>", "q u"]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]

    def special(content: str) -> dict:
        return dict(content=content, lstrip=False, normalized=True, rstrip=False, single_word=False)

    begin, end = special("<|startoftext|>"), special("<|endoftext|>")
    tokenizer_config = dict(
        add_prefix_space=False,
        bos_token={"__type": "AddedToken", **begin},
        do_lower_case=True,
        eos_token={"__type": "AddedToken", **end},
        errors="replace",
        model_max_length=77,
        pad_token="<|endoftext|>",
        special_tokens_map_file="./special_tokens_map.json",
        tokenizer_class="CLIPTokenizer",
        unk_token={"__type": "AddedToken", **end},
    )
    write_json(directory / "vocab.json", {word: index for index, word in enumerate(words)})
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    special_tokens_map = dict(bos_token=begin, eos_token=end, pad_token="!", unk_token=end)
    write_json(directory / "special_tokens_map.json", special_tokens_map)


# ----------------------------------------------------------------------------------------------------------------------
# A VAE that reconstructs: starts as "average 8x8 pixels, then interpolate" and is fitted on photographs from there


def fit_and_tell(vae: Any, steps: int, seed: int, **settings: Any) -> None:
    """`fit_vae` on one thread; prints what came of it."""
    with one_thread():
        psnr_db = fit_vae(vae, steps, seed, **settings)
    shown = "pictures" if settings.get("pictures") else "photographs"
    print(f"VAE after {steps} steps: {psnr_db:.1f} dB mean PSNR on the {shown}")


def fit_vae(
    vae: Any,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    crop_px: int = 64,
    short_side_px: int | None = None,
    learning_rate: float = 1e-3,
    pictures: list[torch.Tensor] | None = None,
) -> float:
    """Fits `vae`, in place, to decode the mean of its posterior to the input.

    L1 loss on random crops of the scikit-image photographs, Adam, cosine learning rate. Afterwards each latent channel
    of the photographs has mean 0 and deviation 1/scaling_factor, and sampling the posterior changes a latent by 0.3 %
    of that. Expects UNCLIP_FITTED_VAE or something wider, or NOVA_FITTED_VAE. With `short_side_px` the photographs are
    made that small. With `pictures`, each (1, 3, H, W) in [-1, 1] with sides that are multiples of 8, these take the
    photographs' place. Returns the mean PSNR over them, in dB.
    """
    photographs = pictures or _photographs(short_side_px)
    generator = torch.Generator().manual_seed(seed)
    _start_as_average_pooling(vae)
    vae.train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        pixels = _random_crops(photographs, batch_size, crop_px, generator)  # (B, 3, crop, crop)
        loss = (_reconstruct(vae, pixels) - pixels).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval()
    with torch.no_grad():
        _scale_latents(vae, photographs)
        squared_errors = [(_reconstruct(vae, x).clamp(-1, 1) - x).square().mean() for x in photographs]
    return sum(-10 * math.log10(error.item() / 4) for error in squared_errors) / len(
        squared_errors
    )  # peak to peak is 2


def _photographs(short_side_px: int | None = None) -> list[torch.Tensor]:
    """Photographs in [-1, 1], each (1, 3, H, W) with sides that are multiples of 8."""
    from make_demo_data import PHOTOGRAPHS, STEREO_PAIR, read_photograph  # needs scikit-image

    photographs = []
    for name in (*PHOTOGRAPHS, *STEREO_PAIR):
        photograph = read_photograph(name)
        if short_side_px:
            photograph = photograph.reduce(min(photograph.size) // short_side_px)
        pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        height_px, width_px = (side // 8 * 8 for side in pixels.shape[2:])
        photographs.append(pixels[:, :, :height_px, :width_px] / 127.5 - 1)
    return photographs


def _random_crops(
    photographs: list[torch.Tensor], count: int, size_px: int, generator: torch.Generator
) -> torch.Tensor:
    crops = []
    for _ in range(count):
        image = photographs[torch.randint(len(photographs), (), generator=generator)]
        top, left = (int(torch.randint(side - size_px + 1, (), generator=generator)) for side in image.shape[2:])
        crops.append(image[:, :, top : top + size_px, left : left + size_px])
    return torch.cat(crops)  # (count, 3, size, size)


def _reconstruct(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(pixels).latent_dist.mean).sample


@torch.no_grad()
def _start_as_average_pooling(vae: Any) -> None:
    """Lets three channels carry R, G, B from end to end; the other weights stay random. From there a fit takes seconds.

    The residual branches start at zero. The normalisation at either end would subtract an image's mean colour: two
    constant, large and opposite channels in a colour's group set its scale and tell what it subtracted. Three colours
    share those of a single group; of several, which have three channels each, every colour has its own. A convolution
    over frames looks at the last of them.
    """
    carrier = 8.0
    is_one_group = vae.encoder.conv_norm_out.num_groups == 1
    colours, carriers = ((0, 1, 2), ((3, 4),) * 3) if is_one_group else ((0, 3, 6), ((1, 2), (4, 5), (7, 8)))
    rgb = (0, 1, 2)
    empty = [] if is_one_group else [channel for pair in carriers for channel in pair]
    centre = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    average = torch.tensor(
        [[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]
    )  # stride 2, padded at the right and the bottom
    smooth = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16  # after nearest-neighbour doubling
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_in"):
            _carry_colours(module, centre, rgb, colours)
        elif name.endswith("conv_shortcut") and not isinstance(module, nn.Identity):
            _carry_colours(module, torch.ones(1, 1), colours, colours)
            module.weight[empty], module.bias[empty] = 0, 0
        elif name.endswith("downsamplers.0.conv"):
            _carry_colours(module, average, colours, colours)
        elif name.endswith("upsamplers.0.conv"):
            _carry_colours(module, smooth, colours, colours)
    for half, last_block in (
        (vae.encoder, vae.encoder.mid_block.resnets[-1]),
        (vae.decoder, vae.decoder.up_blocks[-1].resnets[-1]),
    ):
        for plus, minus in carriers:
            last_block.conv2.bias[plus], last_block.conv2.bias[minus] = carrier, -carrier
        nn.init.ones_(half.conv_norm_out.weight)
        used = slice(None) if is_one_group else slice(9)  # every step shifts the sum over all biases
        nn.init.zeros_(half.conv_norm_out.bias)
        half.conv_norm_out.bias[used] = 8.0  # where SiLU is nearly the identity
        norm = half.conv_norm_out
        scale = carrier * math.sqrt(2 * norm.num_groups / norm.num_channels)  # what the normalisation divided by
        _carry_colours(half.conv_out, centre * scale, colours, rgb)
        for colour, pair in zip(rgb, carriers, strict=True):
            _last_taps(half.conv_out)[colour, pair, 1, 1] = -scale / 2
    latent_channels = vae.config.latent_channels
    nn.init.dirac_(vae.post_quant_conv.weight)
    nn.init.zeros_(vae.post_quant_conv.bias)
    nn.init.dirac_(vae.quant_conv.weight)
    vae.quant_conv.weight[latent_channels:] = 0
    vae.quant_conv.bias[:latent_channels] = 0
    vae.quant_conv.bias[latent_channels:] = -8.0  # log-variance, constant


def _carry_colours(
    conv: nn.Conv2d | nn.Conv3d, taps: torch.Tensor, inputs: Sequence[int], outputs: Sequence[int]
) -> None:
    """Some output channels become those input channels filtered with `taps`, (kernel, kernel)."""
    for source, target in zip(inputs, outputs, strict=True):
        conv.weight[target] = 0
        conv.bias[target] = 0
        _last_taps(conv)[target, source] = taps


def _last_taps(conv: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """The weights (out, in, kernel, kernel), in 3D those of the last frame."""
    return conv.weight if conv.weight.dim() == 4 else conv.weight[:, :, -1]


def _scale_latents(vae: Any, photographs: list[torch.Tensor]) -> None:
    """Brings the latents to mean 0 and deviation 1/scaling_factor per channel; decoded images stay the same.

    Both convolutions next to the latents are 1x1, so they take up the change exactly.
    """
    latents = torch.cat([vae.encode(pixels).latent_dist.mean.flatten(2) for pixels in photographs], dim=2)  # (1, C, N)
    mean = latents.mean((0, 2))  # (C,)
    gain = 1 / (vae.config.scaling_factor * latents.std((0, 2)))  # (C,)
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    _last_taps(encode)[:channels] *= gain[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) * gain
    decode.bias += _last_taps(decode)[:, :, 0, 0] @ mean
    _last_taps(decode).div_(gain[None, :, None, None])


# ----------------------------------------------------------------------------------------------------------------------
# vae: a WFVAE is trained from scratch, so its json is all that is needed

TINY_WFVAE = {
    "_class_name": "WFVAEModel",
    "latent_dim": 8,
    "base_channels": 16,
    "encoder_num_resblocks": 1,
    "encoder_energy_flow_hidden_size": 8,
    "decoder_num_resblocks": 1,
    "decoder_energy_flow_hidden_size": 8,
    "norm_type": "layernorm",
    "t_interpolation": "trilinear",
}


def make_vae_config(directory: Path) -> Path:
    """Writes `wfvae-tiny.json`, the configuration of a WFVAE of 1.9 million weights; returns its folder."""
    write_json(directory / "wfvae-tiny.json", TINY_WFVAE)
    return directory


# ----------------------------------------------------------------------------------------------------------------------
# diffnext: BAAI/nova-d48w1024-sdxl1024 (images, flow matching) and BAAI/nova-d48w1024-osp480 (videos, DDPM)

# Multiples of the 32 groups; the last differs, or the keys of the residual blocks' 1x1 shortcuts would be missing.
NOVA_VAE = dict(block_out_channels=(32, 32, 32, 64), layers_per_block=1, latent_channels=4)
# One that is fitted has three channels per group at either end: see `_start_as_average_pooling`.
NOVA_FITTED_VAE = NOVA_VAE | dict(block_out_channels=(96, 32, 32, 96))
NOVA_VAE_FIT: dict[str, Any] = dict(batch_size=4, short_side_px=96, learning_rate=2e-4)
NOVA_TRANSFORMER = dict(
    image_dim=4,
    image_stride=8,
    text_token_dim=32,
    text_token_len=16,
    arch=(
        dict(depth=2, embed_dim=64, num_heads=2),
        dict(depth=4, embed_dim=64, num_heads=2),
        dict(depth=2, embed_dim=48),
    ),
)
NOVA_TEXT_ENCODER = TWO_LAYERS | dict(
    vocab_size=257,
    hidden_size=32,
    hidden_act="gelu_pytorch_tanh",
    max_position_embeddings=64,
    partial_rotary_factor=0.4,
    bos_token_id=256,
    eos_token_id=256,
    pad_token_id=256,
)


def make_nova_checkpoint(directory: Path, kind: str, seed: int = 0, vae_fit_steps: int = 0) -> Path:
    """A miniature NOVA that `diffnext.pipelines.NOVAPipeline.from_pretrained` loads.

    The same seed gives the same bytes; files already in `directory` are overwritten. Returns `directory`.

    Args:
        kind: `t2i`, 64 x 64 px, 16 tokens, flow matching; or `t2v`, 64 x 96 px, up to 16 latent frames of 24 tokens,
            DDPM.
        vae_fit_steps: with some, the VAE is wider at its ends, and fitted on photographs (`fit_vae`).
    """
    # Here, because the other miniatures need nothing of this repository.
    from diffnext.models.autoencoders import autoencoder_kl as images
    from diffnext.models.autoencoders import autoencoder_kl_opensora as videos
    from diffnext.models.text_encoders.phi import PhiEncoderModel
    from diffnext.models.transformers.transformer_nova import NOVATransformer3DModel

    directory = Path(directory)
    is_video = kind == "t2v"
    if is_video:
        size = dict(image_size=(64, 96), image_base_size=(4, 6), video_base_size=(16, 2, 3))
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    else:
        size = dict(image_size=(64, 64), image_base_size=(4, 4), video_base_size=(1, 2, 2))
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    with seeded(seed):
        text_encoder = PhiEncoderModel(PhiConfig(**NOVA_TEXT_ENCODER))
        transformer = NOVATransformer3DModel.from_config({**NOVA_TRANSFORMER, **size})
        vae_size = NOVA_FITTED_VAE if vae_fit_steps else NOVA_VAE
        if is_video:
            vae = videos.AutoencoderKLOpenSora(videos.AutoencoderKLOpenSoraConfig(**vae_size))
        else:
            vae = images.AutoencoderKL(images.AutoencoderKLConfig(**vae_size, scaling_factor=0.13025))
    if vae_fit_steps:
        fit_and_tell(vae, vae_fit_steps, seed, **NOVA_VAE_FIT)
    scheduler.save_pretrained(directory / "scheduler")
    write_phi_tokenizer(directory / "tokenizer")
    text_encoder.half().save_pretrained(directory / "text_encoder", max_shard_size="64KB")  # two shards
    transformer.half().save_pretrained(directory / "transformer")
    vae.save_pretrained(directory / "vae")
    parts = dict(scheduler=["diffusers", type(scheduler).__name__], tokenizer=["transformers", "CodeGenTokenizerFast"])
    # Modules in the folders, which the original's pipeline imports; ours reads the names of the classes alone.
    for name, part in dict(text_encoder=text_encoder, transformer=transformer, vae=vae).items():
        class_name = type(part).__name__
        parts[name] = [f"__{name}__", class_name]
        line = f"from {type(part).__module__} import {class_name}  # noqa: F401\n"
        (directory / name / f"__{name}__.py").write_text(line, encoding="utf-8")
    write_model_index(directory, "NOVAPipeline", parts)
    return directory


def write_phi_tokenizer(directory: Path) -> None:
    """Phi-2's byte-level tokenizer without merges: every byte of a text is a token; the empty text has none."""
    symbols = sorted(ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*symbols, "<|endoftext|>"])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer_config = dict(**special, model_max_length=2048, tokenizer_class="CodeGenTokenizer")
    write_json(directory / "tokenizer_config.json", tokenizer_config)


# ----------------------------------------------------------------------------------------------------------------------
# mvdiffusion: lambdalabs/sd-image-variations-diffusers; its VAE is that of gaussian_refiner

VARIATIONS_UNET = SD_UNET | dict(
    block_out_channels=(12, 16, 24, 24),
    cross_attention_dim=32,
    attention_head_dim=2,  # despite its name the number of heads
)
VARIATIONS_IMAGE_ENCODER = CLIP_VISION | dict(
    hidden_size=32,
    projection_dim=32,  # one token for the cross attention
    hidden_act="quick_gelu",
)
# Written as it stands: a DDIM scheduler that reads it would clip samples without `clip_sample`, which PNDM leaves out.
VARIATIONS_SCHEDULER = dict(
    _class_name="PNDMScheduler",
    _diffusers_version=diffusers.__version__,
    **SD_SCHEDULE,
    clip_sample=False,
    prediction_type="epsilon",
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    timestep_spacing="leading",
    trained_betas=None,
)
VARIATIONS_PARTS = dict(
    feature_extractor=["transformers", "CLIPImageProcessor"],
    image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    requires_safety_checker=False,
    safety_checker=[None, None],
    scheduler=["diffusers", "PNDMScheduler"],
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
)


def make_mvdiffusion_checkpoint(directory: Path, seed: int = 0, vae_fit_steps: int = 0) -> Path:
    """A miniature of sd-image-variations-diffusers that `StableDiffusionImageVariationPipeline.from_pretrained` loads.

    The same seed gives the same bytes; files already in `directory` are overwritten. With `vae_fit_steps` > 0 the VAE
    is a little wider and fitted on `object_pictures`. Returns `directory`.
    """
    directory = Path(directory)
    write_model_index(directory, "StableDiffusionImageVariationPipeline", VARIATIONS_PARTS)
    write_json(directory / "feature_extractor" / "preprocessor_config.json", CLIP_FEATURE_EXTRACTOR)
    write_json(directory / "scheduler" / "scheduler_config.json", VARIATIONS_SCHEDULER)
    save_image_encoder(directory / "image_encoder", VARIATIONS_IMAGE_ENCODER, seed)
    save_random(lambda: UNet2DConditionModel(**VARIATIONS_UNET), directory / "unet", seed)
    save_unclip_vae(directory / "vae", seed, vae_fit_steps, object_pictures)
    return directory


def object_pictures(count: int = 128, size_px: int = 64) -> list[torch.Tensor]:
    """Ellipses with a photograph or with the normals of an ellipsoid, on white, grey or black: (1, 3, size, size) each.

    A VAE that is fitted on photographs alone makes little of objects on an even background.
    """
    photographs = [image[0].permute(1, 2, 0).numpy() for image in _photographs(short_side_px=2 * size_px)]  # (H, W, 3)
    pictures = []
    for index in range(count):
        rng = np.random.default_rng(index)
        y, x = (np.indices((size_px, size_px)) + 0.5) / size_px - 0.5  # (S, S), downwards and to the right
        angle, half_axes = rng.uniform(0, np.pi), rng.uniform(0.12, 0.45, 2)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        along = np.stack([x, y], axis=-1) @ turn.T / half_axes  # (S, S, 2)
        squared = (along**2).sum(-1, keepdims=True)  # (S, S, 1)
        if index % 2:
            photograph = photographs[rng.integers(len(photographs))]
            top, left = (rng.integers(side - size_px + 1) for side in photograph.shape[:2])
            content = photograph[top : top + size_px, left : left + size_px]
        else:
            normals = np.concatenate([along / half_axes @ turn * (1, -1), np.sqrt((1 - squared).clip(0))], axis=-1)
            content = normals / np.linalg.norm(normals, axis=-1, keepdims=True).clip(1e-6)  # (S, S, 3)
        pixels = np.where(squared < 1, content, rng.choice((1, 1, 0, -1)))
        pictures.append(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None])
    return pictures


# ----------------------------------------------------------------------------------------------------------------------
# training_ggi: THUDM/CogVideoX-5b-I2V, and beside it what else the trainer reads

GGI_TRANSFORMER = dict(
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=32,
    out_channels=16,
    time_embed_dim=32,
    text_embed_dim=32,
    num_layers=4,
    sample_width=12,
    sample_height=8,
    sample_frames=17,
    use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)
GGI_VAE = dict(
    block_out_channels=(8, 16, 16, 32), norm_num_groups=4, sample_height=64, sample_width=96, scaling_factor=0.7
)
GGI_TEXT_ENCODER = dict(
    vocab_size=256,
    d_model=32,
    d_kv=16,
    d_ff=64,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    is_encoder_decoder=False,
)
GGI_SCHEDULER = SD_SCHEDULE | dict(
    clip_sample=False,
    set_alpha_to_one=True,
    steps_offset=0,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    snr_shift_scale=1.0,
)
GGI_PARTS = dict(
    scheduler=["diffusers", "CogVideoXDPMScheduler"],
    text_encoder=["transformers", "T5EncoderModel"],
    tokenizer=["transformers", "T5Tokenizer"],
    transformer=["diffusers", "CogVideoXTransformer3DModel"],
    vae=["diffusers", "AutoencoderKLCogVideoX"],
)
GGI_BASE_LORA = "I2V5B_final_i38800_nearest_lora_weights.safetensors"
GGI_BASE_LORA_RANK = 8
GGI_EDGES, GGI_FLOW, GGI_DEPTH = "ControlNetHED.safetensors", "raft_large.safetensors", "dpt-hybrid-midas"
LATENT_PX = 8
EDGE_GAIN, EDGE_BIAS = 1.3, -4.0  # a step of 30 grey levels gives a bright line, an even area black


def make_ggi_checkpoint(
    directory: Path, seed: int = 0, *, num_frames: int = 17, height_px: int = 64, width_px: int = 96
) -> Path:
    """A miniature of CogVideoX-5b-I2V that `CogVideoXImageToVideoPipeline.from_pretrained` loads.

    Beside it lie a base LoRA (GGI_BASE_LORA), RAFT and HED in the sizes of the released ones, which have no others
    (GGI_FLOW, GGI_EDGES, in half precision), and a miniature of DPT-hybrid (GGI_DEPTH). RAFT sees next to no motion;
    HED draws the edges of its image. The same seed gives the same bytes; files already in `directory` are overwritten.
    Returns `directory`.

    Args:
        num_frames, height_px, width_px: the clips that the learned position table is for. Sides must be multiples of
            16, frames 8 k + 1: of an even number of latent frames the released VAE, too, decodes three frames more.
    """
    directory = Path(directory)
    write_model_index(directory, "CogVideoXImageToVideoPipeline", GGI_PARTS)
    CogVideoXDPMScheduler(**GGI_SCHEDULER).save_pretrained(directory / "scheduler")
    write_t5_tokenizer(directory / "tokenizer")
    two_shards = dict(max_shard_size="64KB")
    save_random(lambda: T5EncoderModel(T5Config(**GGI_TEXT_ENCODER)), directory / "text_encoder", seed, **two_shards)
    size = dict(sample_frames=num_frames, sample_height=height_px // LATENT_PX, sample_width=width_px // LATENT_PX)
    with seeded(seed):
        transformer = CogVideoXTransformer3DModel(**(GGI_TRANSFORMER | size))
        table = transformer.patch_embed.pos_embedding
        table += 0.02 * torch.randn_like(table)  # as if it were learned: no longer that of sines
    transformer.save_pretrained(directory / "transformer")
    with seeded(seed):
        vae = AutoencoderKLCogVideoX(**(GGI_VAE | dict(sample_height=height_px, sample_width=width_px)))
        _sharpen_latents(vae)
    vae.save_pretrained(directory / "vae")
    save_file(_base_lora(transformer, seed), directory / GGI_BASE_LORA, metadata={"format": "pt"})
    save_annotators(directory, seed)
    return directory


def write_t5_tokenizer(directory: Path) -> None:
    """T5's tokenizer without words: each printable character is a token, after the mark of a word's beginning."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    characters = [(character, -4.0) for character in string.printable if not character.isspace()]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    T5Tokenizer(vocab=[*special, *characters, *sentinels], model_max_length=226).save_pretrained(directory)


@torch.no_grad()
def _sharpen_latents(vae: AutoencoderKLCogVideoX) -> None:
    """Means about as large as those of the released VAE, beside which its deviations are small."""
    conv, channels = vae.encoder.conv_out.conv, vae.config.latent_channels
    conv.weight[:channels] *= 3
    conv.weight[channels:] = 0
    conv.bias[channels:] = -8.0  # log-variance


def _base_lora(transformer: CogVideoXTransformer3DModel, seed: int) -> dict[str, torch.Tensor]:
    weights = {}
    with seeded(seed):
        for name, layer in transformer.named_modules():
            if isinstance(layer, nn.Linear) and ".attn1." in name:
                down = torch.randn(GGI_BASE_LORA_RANK, layer.in_features) / math.sqrt(layer.in_features)
                up = 0.05 * torch.randn(layer.out_features, GGI_BASE_LORA_RANK)
                weights[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
                weights[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    return weights


@torch.no_grad()
def save_annotators(directory: Path, seed: int = 0) -> None:
    """GGI_FLOW, GGI_EDGES and GGI_DEPTH in `directory`."""
    from training_ggi.models.edges import HED

    with seeded(seed):
        raft = raft_large(weights=None)
        hed = HED()
        depth = DPTForDepthEstimation(_dpt_config())
    raft.update_block.flow_head.conv2.weight *= 0.01
    raft.update_block.flow_head.conv2.bias.zero_()
    _draw_edges(hed)
    for name, network in ((GGI_FLOW, raft), (GGI_EDGES, hed)):
        weights = network.state_dict()
        half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        save_file(half, directory / name, metadata={"format": "pt"})
    depth.save_pretrained(directory / GGI_DEPTH)


def _draw_edges(hed: nn.Module) -> None:
    """The finest of the five maps becomes the steepness of the image, the others are even; random weights feed none."""
    steps = torch.zeros(4, 3, 3, 3)
    steps[0, :, 1, 2], steps[0, :, 1, 0] = 1 / 3, -1 / 3
    steps[2, :, 2, 1], steps[2, :, 0, 1] = 1 / 3, -1 / 3
    steps[1], steps[3] = -steps[0], -steps[2]
    blocks = (hed.block1, hed.block2, hed.block3, hed.block4, hed.block5)
    for block in blocks:
        nn.init.zeros_(block.projection.weight)
        nn.init.constant_(block.projection.bias, EDGE_BIAS)
    first, second = hed.block1.convs
    first.weight[:4], first.bias[:4] = steps, 0
    second.weight[:4], second.bias[:4] = 0, 0
    second.weight[range(4), range(4), 1, 1] = 1
    hed.block1.projection.weight[0, :4] = EDGE_GAIN


def _dpt_config() -> DPTConfig:
    stem = BitConfig(
        global_padding="same",
        layer_type="bottleneck",
        depths=[1, 1, 1],
        embedding_size=8,
        hidden_sizes=[16, 16, 32],
        num_groups=4,
        out_features=["stage1", "stage2", "stage3"],
        embedding_dynamic_padding=True,
    )
    return DPTConfig(
        is_hybrid=True,
        backbone_config=stem,
        backbone_featmap_shape=[1, 32, 4, 4],
        image_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        neck_ignore_stages=[0, 1],
        readout_type="project",
        fusion_hidden_size=16,
    )


# ----------------------------------------------------------------------------------------------------------------------

# One row per trainer; `arguments` are those of the command line.
MAKERS: dict[str, Callable[[Path, argparse.Namespace], Path]] = {
    "gaussian_refiner": lambda directory, arguments: make_refiner_checkpoint(
        directory, arguments.seed, arguments.vae_fit_steps
    ),
    "vae": lambda directory, arguments: make_vae_config(directory),
    "diffnext_t2i": lambda directory, arguments: make_nova_checkpoint(
        directory, "t2i", arguments.seed, arguments.vae_fit_steps
    ),
    "diffnext_t2v": lambda directory, arguments: make_nova_checkpoint(
        directory, "t2v", arguments.seed, arguments.vae_fit_steps
    ),
    "mvdiffusion": lambda directory, arguments: make_mvdiffusion_checkpoint(
        directory, arguments.seed, arguments.vae_fit_steps
    ),
    # RAFT takes nothing smaller.
    "training_ggi": lambda directory, arguments: make_ggi_checkpoint(
        directory, arguments.seed, num_frames=9, height_px=256, width_px=384
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo/checkpoints"), help="one folder per trainer in it"
    )
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS), metavar="TRAINER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_fit_steps", type=int, default=0, help="0 = random VAE; 300 = about 23 dB")
    arguments = parser.parse_args(argv)
    if arguments.vae_fit_steps < 0:
        parser.error(f"--vae_fit_steps is {arguments.vae_fit_steps}; it must be 0 (random VAE) or more")
    for trainer in arguments.only:
        print(MAKERS[trainer](arguments.output / trainer, arguments))


if __name__ == "__main__":
    main()
