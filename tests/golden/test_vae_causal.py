"""CausalVAE and WFVAE2 against recorded vectors: whole, and CausalVAE in overlapping pieces."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from vae_cases import Case, by_case

from vae.models import causalvae, tiling
from vae.models.load import build_model


def check_all(case: Case, results: dict[str, Tensor]) -> None:
    for name in case.expected:
        case.check(name, results[name])


@torch.no_grad()
def results_of(case: Case) -> dict[str, Tensor]:
    """Every quantity that the vectors may hold of a model, but for its coefficients."""
    model = case.load_weights(build_model(case.config["model"], case.config["config"])).eval()
    x, z, eps = (case.inputs.get(name) for name in ("x", "z", "eps"))
    posterior = model.encode(x)
    results = {name: getattr(posterior, name) for name in ("moments", "mean", "logvar")}
    results |= {"kl": posterior.kl(), "dec": model.decode(z), "recon_mode": model(x).sample}
    if eps is not None:
        results["recon_sample"] = model(x, noise=eps).sample
    return results


@by_case("causalvae_tiny*")
def test_causalvae(case: Case) -> None:
    check_all(case, results_of(case))


@by_case("causalvae_real_config*")
def test_causalvae_at_full_width(case: Case) -> None:
    check_all(case, results_of(case))


@by_case("wfvae2_tiny*")
def test_wfvae2(case: Case) -> None:
    model = case.load_weights(build_model(case.config["model"], case.config["config"])).eval()
    with torch.no_grad():
        _, encoded = model.encoder(case.inputs["x"])
        _, decoded = model.decoder(case.inputs["z"])
    coefficients = {f"enc_coeffs_{index}": value for index, value in enumerate(encoded)}
    coefficients |= {f"dec_coeffs_{index}": value for index, value in enumerate(decoded)}
    check_all(case, results_of(case) | coefficients)


@by_case("causalvae_tiled*")
@torch.no_grad()
def test_causalvae_in_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.load_weights(build_model(case.config["model"], case.config["config"])).eval()
    check_all(case, results_in_tiles(model, ORIGINAL_TILES | case.config["tile"], case.inputs, monkeypatch))


# Pixels and latents, frames and latents in time, of the original's pieces.
ORIGINAL_TILES = {
    "tile_sample_min_size": 256,
    "tile_latent_min_size": 32,
    "tile_sample_min_size_t": 9,
    "tile_latent_min_size_t": 3,
    "tile_overlap_factor": 0.125,
}


def results_in_tiles(
    model: Any, tile: Mapping[str, Any], inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """What the original makes of a clip and of latents with these sizes, also where `Tiles` refuses them."""
    tile_px, latents, tile_frames, latent_frames, overlap = (tile[name] for name in ORIGINAL_TILES)
    is_whole = latents * model.spatial_factor == tile_px and (overlap * latents).is_integer()
    if not is_whole:  # the original rounds all down, so that its pieces do not meet where they should
        encoded = (tile_px, int(tile_px * (1 - overlap)), latents, int(latents * overlap))
        decoded = (latents, int(latents * (1 - overlap)), tile_px, int(tile_px * overlap))
        monkeypatch.setattr(causalvae, "encode_tiles", lambda run, x, _: tiling._by_tiles(run, x, *encoded))
        monkeypatch.setattr(causalvae, "decode_tiles", lambda run, z, _: tiling._by_tiles(run, z, *decoded))
    overlap = overlap if is_whole else 0.0
    model.enable_tiling(tile_px, tile_frames, overlap)
    moments = model.encode(inputs["x"]).moments
    model.enable_tiling(latents * model.spatial_factor, (latent_frames - 1) * model.temporal_factor + 1, overlap)
    return {"moments": moments, "dec": model.decode(inputs["z"])}


@torch.no_grad()
def test_tiles_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the original would: tiles every 28 px, of which none is shared between latents; then every 3 latents."""
    model = build_model("CausalVAE", {"hidden_size": 8, "norm_type": "layernorm", "num_res_blocks": 1}).eval()
    seen = []

    def encode(x: Tensor) -> Tensor:
        seen.append(x.shape[2:])
        return x[:, :2, ::4, ::8, ::8]

    def decode(z: Tensor) -> Tensor:
        seen.append(z.shape[2:])
        return z.repeat_interleave(8, -1).repeat_interleave(8, -2)

    monkeypatch.setattr(model, "_encode", encode)
    monkeypatch.setattr(model, "_decode", decode)
    sizes = ORIGINAL_TILES | {"tile_sample_min_size": 32, "tile_latent_min_size": 4}
    x, z = torch.randn(1, 3, 5, 32, 48), torch.randn(1, 4, 2, 4, 6)
    results = results_in_tiles(model, sizes, {"x": x, "z": z}, monkeypatch)
    assert seen == [(5, 32, 32), (5, 32, 20), (5, 4, 32), (5, 4, 20), (2, 4, 4), (2, 4, 3), (2, 1, 4), (2, 1, 3)]
    assert results["moments"].shape[-2:] == (5, 7) and results["dec"].shape[-2:] == (36, 52)
