"""Tiles of frames and overlapping runs of frames: geometry, cross-fades, what is refused."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae.models.posterior import DiagonalGaussian
from vae.models.tiling import Tiles, decode_tiles, encode_tiles, tiled_decode, tiled_encode, time_chunks
from vae.models.wfvae import WFVAE, WFVAEConfig


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


def test_any_model_in_tiles() -> None:
    model = SimpleNamespace(
        spatial_factor=8, encode=lambda x: DiagonalGaussian(pooled(x.repeat(1, 2, 1, 1, 1))), decode=enlarged
    )
    x = torch.randn(1, 2, 3, 72, 40)
    z = tiled_encode(model, x, tile_px=32).mean
    torch.testing.assert_close(z, pooled(x))
    torch.testing.assert_close(tiled_decode(model, z, tile_px=32), enlarged(z))


@torch.no_grad()
def test_wfvae_in_tiles_and_chunks() -> None:
    torch.manual_seed(0)
    config = WFVAEConfig(
        latent_dim=4,
        base_channels=4,
        encoder_energy_flow_hidden_size=4,
        decoder_energy_flow_hidden_size=4,
        norm_type="layernorm",
        t_interpolation="trilinear",
    )
    model = WFVAE(config).eval()
    x = torch.rand(1, 3, 13, 32, 48) * 2 - 1
    z = model.encode(x).mode()
    assert torch.equal(tiled_encode(model, x, tile_px=64).mode(), z)  # one tile holds the frame
    assert torch.equal(tiled_decode(model, z, tile_px=64), model.decode(z))
    in_tiles = tiled_encode(model, x, tile_px=32), tiled_decode(model, z, tile_px=32)
    assert in_tiles[0].moments.shape == (1, 8, 4, 4, 6) and in_tiles[1].shape == x.shape
    model.enable_tiling()
    torch.testing.assert_close(tiled_encode(model, x, tile_px=32).moments, in_tiles[0].moments, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiled_decode(model, z, tile_px=32), in_tiles[1], atol=1e-4, rtol=0)
