"""Which tokens of a frame are given and which are to be predicted, in training."""

import torch
from torch import Tensor, nn

RATIO_MEAN, RATIO_STD, RATIO_MIN, RATIO_MAX = 1.0, 0.25, 0.7, 1.0


def mask_ratio(uniform: float) -> float:
    """The share of tokens to predict: a normal number truncated to [0.7, 1], as the inverse CDF of one in [0, 1)."""
    bounds = torch.tensor([RATIO_MIN, RATIO_MAX], dtype=torch.float64)
    low, high = torch.special.ndtr((bounds - RATIO_MEAN) / RATIO_STD)
    ratio = RATIO_MEAN + RATIO_STD * torch.special.ndtri(low + uniform * (high - low)).item()
    return min(max(ratio, RATIO_MIN), RATIO_MAX)


def split_tokens(token_order: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Choose each frame's visible tokens; all frames have equally many.

    Args:
        token_order: (n, N, 1) numbers whose order is that of the tokens; the first ones are visible.
        ratio: share of masked tokens.

    Returns:
        visible_ids (n, N - M) and masked_ids (n, M), int64.
    """
    num_tokens = token_order.shape[1]
    order = token_order[..., 0].argsort(dim=1)  # (n, N)
    num_visible = round((1 - ratio) * num_tokens)  # ties to even
    return order[:, :num_visible], order[:, num_visible:]


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens (n, N, ...) at ids (n, k): (n, k, ...)."""
    index = ids.reshape(*ids.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


class MaskEmbed(nn.Module):
    """What stands for a masked token, and for the frame before the first."""

    def __init__(self, dim: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, dim) * 0.02)

    def forward(self, tokens: Tensor, visible_ids: Tensor) -> Tensor:
        """Tokens (n, N, D) with all but those at visible_ids (n, k) replaced."""
        visible = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)  # (n, N)
        return torch.where(visible.scatter(1, visible_ids, True)[..., None], tokens, self.mask_token)
