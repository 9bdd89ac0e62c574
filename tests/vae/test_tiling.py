"""Tiles of frames and overlapping runs of frames: geometry, cross-fades, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae.models.tiling import Tiles, decode_tiles, encode_tiles, time_chunks


def pooled(x: Tensor) -> Tensor:
    """An encoder without context: means of 8 x 8 px."""
    return F.avg_pool3d(x, (1, 8, 8))


def enlarged(z: Tensor) -> Tensor:
    return z.repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.mark.parametrize("size_px", [(24, 32), (40, 40), (56, 48), (8, 104)])
def test_models_without_context_do_not_see_tiles(size_px: tuple[int, int]) -> None:
    tiles = Tiles(tile_px=32, overlap=0.25)
    x = torch.randn(2, 3, 2, *size_px, dtype=torch.float64)
    torch.testing.assert_close(encode_tiles(pooled, x, tiles), pooled(x))
    torch.testing.assert_close(decode_tiles(enlarged, pooled(x), tiles), enlarged(pooled(x)))


def test_a_tile_fades_in_over_the_one_before() -> None:
    values = iter([1.0, 5.0])
    z = torch.zeros(1, 1, 1, 1, 5)
    out = decode_tiles(lambda tile: torch.full((1, 1, 1, 8, 8 * tile.shape[-1]), next(values)), z, Tiles(32, 0.25))
    # The first tile ends at 32 px, the second begins at 24 px.
    assert out[0, 0, 0, 0].tolist() == [1.0] * 24 + [1.0 + 4 * i / 8 for i in range(8)] + [5.0] * 8


def test_an_overlap_of_nothing() -> None:
    seen = []

    def encode(tile: Tensor) -> Tensor:
        seen.append(tuple(tile.shape[-2:]))
        return pooled(tile)

    x = torch.randn(1, 3, 1, 16, 40)
    assert torch.equal(encode_tiles(encode, x, Tiles(16, 0.0)), pooled(x))
    assert seen == [(16, 16), (16, 16), (16, 8)]


def test_tiles_that_are_not_whole_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="tile_px is 100, but must be a multiple of 8: use 96"):
        Tiles(100)
    with pytest.raises(
        ValueError, match=r"overlap is 0\.2, .*a multiple of 1/32, .*256 px has 32 latents: use 0\.1875"
    ):
        Tiles(256, 0.2)
    with pytest.raises(ValueError, match=r"overlap is 1\.0, but must be below 1.*use 0\.75"):
        Tiles(32, 1.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((5, 8, 5), [(0, 5)]),
        ((13, 8, 5), [(0, 13)]),
        ((17, 8, 5), [(0, 13), (8, 17)]),
        ((21, 8, 5), [(0, 13), (8, 21)]),
        ((25, 8, 5), [(0, 13), (8, 21), (16, 25)]),
        ((21, 8, 1), [(0, 9), (8, 17), (16, 21)]),  # the tail is a run of its own
        ((7, 2, 2), [(0, 4), (2, 6), (4, 7)]),
    ],
)
def test_runs_of_frames(arguments: tuple[int, int, int], expected: list[tuple[int, int]]) -> None:
    assert [(chunk.start, chunk.stop) for chunk in time_chunks(*arguments)] == expected
