"""Order of the UNet's rows, the same everywhere: domain first, then object, then view.

Row (d, b, v) of D = 2 domains, B objects and V views is d * B * V + b * V + v. The network pairs the two halves of a
batch and groups consecutive runs of V rows; it never learns B or D.
"""

import torch

DOMAINS = ("normal", "colour")  # d = 0, 1; the original trains with the halves swapped, to which the network is blind


def to_rows(normal: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Both domains' (B, V, ...) as rows (2BV, ...).

    Raises:
        ValueError: the two shapes differ.
    """
    if normal.shape != colour.shape:
        raise ValueError(
            f"normal {tuple(normal.shape)} and colour {tuple(colour.shape)} must have one shape (B, V, ...)"
        )
    return torch.stack([normal, colour]).flatten(0, 2)  # (2BV, ...)


def from_rows(rows: torch.Tensor, num_views: int) -> dict[str, torch.Tensor]:
    """Rows (2BV, ...) as {"normal": (B, V, ...), "colour": (B, V, ...)}; views, not copies.

    Raises:
        ValueError: the number of rows is no multiple of 2 V.
    """
    if num_views < 1 or rows.shape[0] % (len(DOMAINS) * num_views):
        raise ValueError(f"{rows.shape[0]} rows are no multiple of {len(DOMAINS)} domains x num_views={num_views}")
    halves = rows.unflatten(0, (len(DOMAINS), -1, num_views))  # (2, B, V, ...)
    return dict(zip(DOMAINS, halves, strict=True))


def repeat_for_rows(per_object: torch.Tensor, num_views: int, num_domains: int = len(DOMAINS)) -> torch.Tensor:
    """What all views and domains of an object share, (B, ...), as rows (D * B * V, ...)."""
    per_view = per_object.repeat_interleave(num_views, dim=0)  # (BV, ...)
    return torch.cat([per_view] * num_domains)  # (DBV, ...)
