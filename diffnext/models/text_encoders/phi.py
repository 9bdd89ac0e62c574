"""Phi-2 as text encoder: the hidden states of its last layer, and how prompts become rows of the text embedding."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PhiForCausalLM

from common.pretrained import CONFIG_FILE, check_keys
from diffnext.models.embeddings import TextEmbed

Prompt = str | np.ndarray | Tensor  # an array holds precomputed embeddings (l, token_dim)


class PhiEncoderModel(PhiForCausalLM):
    """Causal transformer of tokens. The language-model head is there for its keys alone; it is not run.

    There is no padding mask: a token sees those before it, so what follows a prompt does not change its states.
    """

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Token ids (B, L) to an output whose `last_hidden_state` is (B, L, token_dim), after the final layer norm."""
        return self.model(input_ids, use_cache=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, **_: Any) -> Self:
        """The encoder in a folder, in eval mode; `dtype` None keeps that of the files (fp16 as released).

        `partial_rotary_factor` and `rope_theta` may stand in config.json itself or in its `rope_parameters`.

        Raises:
            FileNotFoundError: no configuration or no weights there.
            ValueError: weights that are not exactly those of the configuration.
        """
        folder = Path(folder)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"no {folder / CONFIG_FILE}: give the folder of a Phi text encoder")
        try:
            model, report = super().from_pretrained(
                folder,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below with the rest
                local_files_only=True,
            )
        except OSError as error:
            raise FileNotFoundError(f"the text encoder in {folder} cannot be loaded: {error}") from error
        check_keys(
            f"the weights in {folder} do not fit its config.json",
            report["missing_keys"],
            report["unexpected_keys"],
            map(str, report["mismatched_keys"]),
        )
        return model.eval()


@torch.no_grad()
def text_rows(
    prompts: Sequence[Prompt],
    text_embed: TextEmbed,
    text_encoder: nn.Module | None = None,
    tokenizer: Callable[..., Any] | None = None,
    dropped: Sequence[bool] | None = None,
) -> Tensor:
    """What `text_embed` takes for each prompt: its embeddings, then null embeddings.

    Args:
        prompts: strings, which need the encoder and the tokenizer and are cut at the embedding's number of tokens L, or
            embeddings (l, token_dim) with l <= L. Equal strings are encoded once. The empty string has no tokens.
        dropped: prompts to replace by the empty one, for classifier-free guidance.

    Returns:
        (B, L, token_dim) in precision and on the device of `text_embed.weight`.

    Raises:
        ValueError: strings without a text encoder, or embeddings that do not fit.
    """
    dropped = dropped or [False] * len(prompts)
    kept = ["" if is_dropped else prompt for prompt, is_dropped in zip(prompts, dropped, strict=True)]
    texts = list(dict.fromkeys(prompt for prompt in kept if isinstance(prompt, str) and prompt))
    states = dict(zip(texts, _encode(texts, text_embed.num_tokens, text_encoder, tokenizer), strict=True))
    states[""] = text_embed.weight[:0]  # (0, token_dim)
    return text_embed.pad([states[each] if isinstance(each, str) else torch.as_tensor(each) for each in kept])


def _encode(
    texts: Sequence[str], max_tokens: int, text_encoder: nn.Module | None, tokenizer: Callable[..., Any] | None
) -> list[Tensor]:
    """Hidden states (l, token_dim) of every text, l <= max_tokens being its number of tokens; longer ones are cut."""
    if not texts:
        return []
    if text_encoder is None or tokenizer is None:
        raise ValueError(
            f"the prompt {texts[0]!r} needs a text encoder and a tokenizer, which are not loaded: "
            "load them, or give embeddings instead of text"
        )
    ids = tokenizer(list(texts), max_length=max_tokens, truncation=True).input_ids
    lengths = [len(each) for each in ids]
    # Nothing sees the padding, so zeros up to the longest text do as well as padding tokens up to max_tokens.
    padded = torch.zeros(len(texts), max(lengths), dtype=torch.long)  # (B, l)
    for row, each in zip(padded, ids, strict=True):
        row[: len(each)] = torch.as_tensor(each, dtype=torch.long)
    device = next(text_encoder.parameters()).device
    states = text_encoder(padded.to(device)).last_hidden_state  # (B, l, token_dim)
    return [state[:length] for state, length in zip(states, lengths, strict=True)]
