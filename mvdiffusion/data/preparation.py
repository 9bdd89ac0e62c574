"""Images of objects on their way to the networks: masks, backgrounds, normal maps, recentring, VAE and CLIP inputs.

Colours are in [0, 1]. A normal n is encoded as n / 2 + 1/2; the camera frame is x right, y up, z towards the viewer, so
a surface that faces the camera is (127, 127, 255) on disk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.video import MediaError, image_size, to_uint8
from mvdiffusion.views import Colour

READABLE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")


def read_image(path: str | Path, needs_alpha: bool = False) -> Image.Image:
    """A square 8-bit image as RGBA if it has transparency, as RGB otherwise.

    Raises MediaError for a file that is missing, empty, damaged or cut short, not square, or of more than 8 bits, and
    for one without transparency if that is needed.
    """
    width, height = image_size(path)
    if width != height:
        raise MediaError(path, f"is {width}x{height} px, but views must be square")
    try:
        with Image.open(path) as image:
            image.load()
            has_alpha = "A" in image.mode or "transparency" in image.info
            mode, converted = image.mode, image.convert("RGBA" if has_alpha else "RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise MediaError(path, f"cannot be read as an image ({type(error).__name__}: {error})") from error
    if mode not in READABLE_MODES:
        raise MediaError(path, f"has pixels of mode {mode}, but must be of 8 bits per channel")
    if needs_alpha and not has_alpha:
        raise MediaError(path, "has no transparency, and no mask file tells the object from the background")
    return converted


# Masks, colours and normals of training (Wonder3D's, arithmetic included)


def prepare_mask(image: Image.Image, size_wh: tuple[int, int]) -> np.ndarray:
    """float32 (H, W, 1): 1 wherever the resized mask is not 0."""
    resized = np.asarray(image.convert("L").resize(size_wh, Image.Resampling.BICUBIC))
    return (resized > 0).astype(np.float32)[..., None]  # (H, W, 1)


def composite(pixels: np.ndarray, alpha: np.ndarray, background: Colour) -> np.ndarray:
    """pixels (H, W, 3) over a plain background, with straight alpha (H, W, 1) in [0, 1]: (H, W, 3)."""
    return pixels * alpha + np.asarray(background, dtype=pixels.dtype) * (1 - alpha)


def prepare_colour(
    image: Image.Image, size_wh: tuple[int, int], background: Colour, mask: np.ndarray | None = None
) -> np.ndarray:
    """Resized and composited: float32 (H, W, 3) in [0, 1].

    Args:
        image: RGBA; with a mask also RGB.
        mask: (H, W, 1), the alpha; the image's own counts only without a mask.
    """
    pixels, alpha = _resized(image, size_wh, mask)
    rgb = pixels.astype(np.float32) / 255  # (H, W, 3)
    return composite(rgb, alpha.astype(np.float32), background)


def prepare_normals(
    image: Image.Image,
    size_wh: tuple[int, int],
    background: Colour,
    rotation: np.ndarray,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Resized, rotated, encoded and composited: float64 (H, W, 3), about [0, 1]; neither renormalised nor clamped.

    Args:
        image, mask: as in `prepare_colour`.
        rotation: (3, 3), from the camera frame of the file to that of the condition view.
    """
    pixels, alpha = _resized(image, size_wh, mask)
    rotated = rotate_normals(decode_normals(pixels), rotation)  # (H, W, 3)
    return composite(rotated * 0.5 + 0.5, alpha, background)


def _resized(image: Image.Image, size_wh: tuple[int, int], mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3), and alpha (H, W, 1) in [0, 1]."""
    # Pillow premultiplies by alpha here, so the colours of transparent pixels do not bleed in.
    pixels = np.asarray(image.resize(size_wh, Image.Resampling.BICUBIC))  # (H, W, 3 or 4)
    if mask is not None:
        return pixels[..., :3], mask
    if image.mode != "RGBA":
        raise ValueError("an image without transparency needs a mask")
    return pixels[..., :3], pixels[..., 3:] / 255.0


def decode_normals(pixels: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> float64 in [-1, 1]."""
    return pixels / 255.0 * 2 - 1


def rotate_normals(normals: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """rotation (3, 3) applied to every normal: (..., 3) -> (..., 3)."""
    return normals @ rotation.T


def unit_normals(normals: np.ndarray) -> np.ndarray:
    """n / (|n| + 1e-6): (..., 3) -> (..., 3), zeros stay zeros."""
    return normals / (np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-6)


def encode_normals(normals: np.ndarray) -> np.ndarray:
    """Normals in [-1, 1] as files hold them: uint8 (..., 3), truncated."""
    return ((normals * 0.5 + 0.5) * 255).astype(np.uint8)


# Photographs, for inference


def recentre(image: Image.Image, crop_size: int, size_px: int, exclusive_bound: bool = False) -> Image.Image:
    """A cut-out photograph, centred on a transparent square: RGBA of size_px x size_px.

    Args:
        crop_size: the longer side that the object's bounding box gets, of which the square cuts off what is too much;
            -1 keeps the photograph's own frame, padded to a square.
        exclusive_bound: leave the bounding box's last row and column out, as Wonder3D does.

    Raises:
        ValueError: `crop_size` is no size, or nothing of the photograph is opaque.
    """
    if crop_size != -1 and crop_size < 1:
        raise ValueError(f"crop_size is {crop_size}, but must be -1 or at least 1")
    image = image.convert("RGBA")
    if crop_size == -1:
        side_px = max(image.size)
        return _centred(image, side_px).resize((size_px, size_px), Image.Resampling.BICUBIC)
    rows, columns = np.nonzero(np.asarray(image)[..., 3])
    if not rows.size:
        raise ValueError("the photograph is transparent everywhere: there is no object to centre")
    last = int(not exclusive_bound)
    left, top = int(columns.min()), int(rows.min())
    width, height = max(1, int(columns.max()) - left + last), max(1, int(rows.max()) - top + last)
    scale = crop_size / max(height, width)
    new_wh = max(1, int(scale * width)), max(1, int(scale * height))
    cropped = image.crop((left, top, left + width, top + height)).resize(new_wh, Image.Resampling.BICUBIC)
    return _centred(cropped, size_px)


def _centred(image: Image.Image, side_px: int) -> Image.Image:
    canvas = Image.new("RGBA", (side_px, side_px), (0, 0, 0, 0))
    canvas.paste(image, ((side_px - image.width) // 2, (side_px - image.height) // 2))
    return canvas


def on_background(image: Image.Image, background: Colour) -> np.ndarray:
    """An RGBA image, composited: float32 (H, W, 3) in [0, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 255  # (H, W, 4)
    return composite(pixels[..., :3], pixels[..., 3:], background)


# What the frozen networks take


def vae_pixels(image: Image.Image, resolution_px: int) -> np.ndarray:
    """The shorter side resized to the resolution, the centre cut out: float32 (3, R, R) in [-1, 1]."""
    image = _shorter_side_to(image.convert("RGB"), resolution_px, Image.Resampling.BILINEAR)
    left, top = (round((side - resolution_px) / 2) for side in image.size)
    image = image.crop((left, top, left + resolution_px, top + resolution_px))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)  # (3, R, R)
    return (pixels / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class ClipTransform:
    """What transformers' CLIPImageProcessor computes with Pillow, without its other options."""

    size_px: int = 224
    crop_px: int = 224
    mean: Colour = (0.48145466, 0.4578275, 0.40821073)
    std: Colour = (0.26862954, 0.26130258, 0.27577711)
    resize: Literal["pil", "tensor", "tensor_antialias"] = "pil"  # of `of_pixels` alone

    @classmethod
    def of(cls, processor: Any) -> "ClipTransform":
        """The same as a transformers image processor with a shortest edge and a square crop."""
        size_px, crop_px = processor.size["shortest_edge"], processor.crop_size["height"]
        if size_px is None or crop_px > size_px:
            raise ValueError(
                f"the image processor's size is {processor.size} and its crop {processor.crop_size}, but it must have "
                "a shortest_edge that is at least the crop"
            )
        return cls(size_px, crop_px, tuple(processor.image_mean), tuple(processor.image_std))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 (3, crop_px, crop_px), normalised."""
        image = _shorter_side_to(image.convert("RGB"), self.size_px, Image.Resampling.BICUBIC)
        left, top = ((side - self.crop_px) // 2 for side in image.size)
        image = image.crop((left, top, left + self.crop_px, top + self.crop_px))
        scaled = (np.asarray(image) / 255.0 - np.asarray(self.mean)) / np.asarray(self.std)  # (H, W, 3)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)  # (3, H, W)

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """As of a picture with float32 pixels (3, H, W) in [0, 1], resized as `resize` says.

        "tensor" is Wonder3D's bicubic resize of float32 pixels, whose overshoots stay, without antialiasing as its
        torchvision had it; with "tensor_antialias" it is nearer to Pillow's.
        """
        if self.resize == "pil":
            return self(Image.fromarray(to_uint8(pixels)))
        resized = F.interpolate(
            torch.from_numpy(np.ascontiguousarray(pixels))[None],
            (self.crop_px, self.crop_px),
            mode="bicubic",
            antialias=self.resize == "tensor_antialias",
        )[0]  # (3, crop_px, crop_px)
        mean, std = (resized.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((resized - mean) / std).numpy()


def _shorter_side_to(image: Image.Image, side_px: int, resample: Image.Resampling) -> Image.Image:
    shorter, longer = sorted(image.size)
    if shorter == side_px:
        return image
    new_longer = int(side_px * longer / shorter)
    wide = image.width >= image.height
    return image.resize((new_longer, side_px) if wide else (side_px, new_longer), resample)
