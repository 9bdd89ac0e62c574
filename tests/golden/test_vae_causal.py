"""CausalVAE and WFVAE2 against recorded vectors: whole, and CausalVAE in overlapping pieces."""

import torch
from torch import Tensor
from vae_cases import Case, by_case

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
def test_causalvae_in_tiles(case: Case) -> None:
    model = case.load_weights(build_model(case.config["model"], case.config["config"])).eval()
    tile = case.config["tile"]
    model.enable_tiling(tile["tile_sample_min_size"], tile["tile_sample_min_size_t"], tile["tile_overlap_factor"])
    x, z = case.inputs["x"], case.inputs["z"]
    check_all(case, {"moments": model.encode(x).moments, "dec": model.decode(z)})
    assert model(x).sample.shape == x.shape
