"""What a model sees of a record: latents, and one of its texts."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

SHORT_PROBABILITY = 0.5
FIRST_SENTENCE = re.compile(r"(.*?[.!?])\s+")


def parse_latents(inputs: Mapping[str, Any]) -> np.ndarray:
    """`moments` as float16, else `codes` as int32, in the record's `shape`; read-only, not copied.

    Raises:
        ValueError: neither is there, or the bytes do not fill the shape.
    """
    for name, dtype in (("moments", np.float16), ("codes", np.int32)):
        if name in inputs:
            return array_of(inputs[name], inputs["shape"], dtype, name)
    raise ValueError(f"a record needs `moments` or `codes`; it has {', '.join(inputs)}")


def array_of(data: bytes | memoryview, shape: list[int], dtype: type, name: str) -> np.ndarray:
    """The array that `data` holds in C order; ValueError, which calls it `name`, if it does not fill `shape`."""
    num_bytes = np.dtype(dtype).itemsize
    for size in shape:
        num_bytes *= size
    if min(shape, default=0) < 0 or num_bytes != len(data):
        raise ValueError(
            f"{name} has {len(data)} bytes; {np.dtype(dtype).name} of shape {tuple(shape)} has {num_bytes}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def parse_annotation(caption: Any, text: Any, label: int | None, draw: Callable[[], float]) -> str | np.ndarray:
    """The long caption, or with probability 0.5 the short text.

    Args:
        caption, text: strings, or embeddings made before: {"data": bytes, "shape": [l, token_dim]}, float16. Without
            a `text`, the first sentence of a caption string is the short one.
        label: of a class; the caption is then left as it is.
        draw: uniform in [0, 1); called once if there is a short text to choose, else not at all.
    """
    if isinstance(caption, Mapping):
        has_text = isinstance(text, Mapping) and len(text["data"]) > 0
        name, chosen = ("text", text) if has_text and draw() < SHORT_PROBABILITY else ("caption", caption)
        return array_of(chosen["data"], chosen["shape"], np.float16, name)
    if label is not None:
        return caption
    short = text or first_sentence(caption)
    return short if short and draw() < SHORT_PROBABILITY else caption


def first_sentence(caption: str) -> str:
    """What stands before the first white space that follows `.`, `!` or `?` on the first line; else all of it."""
    match = FIRST_SENTENCE.match(caption)
    return match[1] if match else caption
