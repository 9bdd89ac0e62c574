"""Autoencoders and posteriors against vectors recorded from the original."""

import json
import re
from typing import Any

import pytest
import torch
import vectors as golden
from vectors import KEYS_DIR, Vectors

from diffnext.models.autoencoders import CLASSES
from diffnext.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffnext.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffnext.models.autoencoders.autoencoder_kl_ltx_video import AutoencoderKLLTXVideo
from diffnext.models.autoencoders.autoencoder_kl_opensora import AutoencoderKLOpenSora
from diffnext.models.posterior import DiagonalGaussianDistribution

TRAINER = "diffnext"


def build(vectors: Vectors, model_class: Any) -> Any:
    """The model of a file's config with its stored weights, or with those that its rule makes."""
    model = model_class.from_config(vectors.config)
    state = vectors.under("sd.") or golden.rule_weights(model, vectors.header["weights_seed"])
    for name, total in vectors.header.get("weights_check", {}).items():
        assert float(state[name].double().sum()) == pytest.approx(total, abs=1e-9), name
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


@pytest.mark.parametrize("path", [*sorted(KEYS_DIR.glob("vae_*AutoencoderKL*.json"))] or [None], ids=str)
def test_names_and_shapes(path: Any) -> None:
    if path is None:
        pytest.skip(f"no lists of keys in {KEYS_DIR}")
    name = next(part for part in path.stem.split("_") if part.startswith("Autoencoder"))
    meta = json.loads((KEYS_DIR / "diffnext_keys_meta.json").read_text())[path.stem]
    with torch.device("meta"):
        model = CLASSES[name].from_config(meta["config"])
    expected = {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(each.numel() for each in model.parameters()) == meta["num_params"]


@torch.no_grad()
@golden.by_file(TRAINER, "gaussian*.safetensors")
def test_gaussian(vectors: Vectors) -> None:
    posterior = DiagonalGaussianDistribution(vectors["z"])
    assert posterior.parameters is vectors["z"]
    for name in ("mean", "logvar", "std", "var"):
        vectors.check(name, getattr(posterior, name))
    odd = DiagonalGaussianDistribution(vectors["odd.z"])
    vectors.check("odd.mean", odd.mean)
    vectors.check("odd.logvar", odd.logvar)
    sample = DiagonalGaussianDistribution(vectors["bf16.z"]).sample(noise=vectors["bf16.noise"])
    vectors.check("bf16.sample", sample)
    stated = re.search(r"scaling by ([\d.]+)", vectors.header["function"])
    with torch.device("meta"):
        vae = AutoencoderKL.from_config({"scaling_factor": float(stated[1])})
    assert vae.scale_(sample) is sample
    vectors.check("bf16.scaled", sample)


@torch.no_grad()
@golden.by_file(TRAINER, "vae_kl*.safetensors")
def test_kl(vectors: Vectors) -> None:
    vae = build(vectors, AutoencoderKL)
    posterior = vae.encode(vectors["x"]).latent_dist
    for name in ("parameters", "mean", "logvar", "std"):
        vectors.check(name, getattr(posterior, name))
    sample = posterior.sample(noise=vectors["noise"])
    vectors.check("sample", sample)
    vectors.check("scaled", vae.scale_(sample.clone()))
    vectors.check("unscaled", vae.unscale_(vae.scale_(sample.clone())))
    vectors.check("decoded", vae.decode(vectors["z"]).sample)
    z5d = vectors["z5d"].clone()
    vectors.check("decoded_5d", vae.decode(z5d).sample)
    assert z5d.shape == vectors["z5d"].shape, "the caller's tensor has changed its shape"


def check_codings(vectors: Vectors, vae: Any) -> None:
    """Every NAME.x is encoded, every NAME.z decoded, with the results that the file has."""
    for name in vectors.tensors:
        case, _, kind = name.rpartition(".")
        if kind == "x":
            posterior = vae.encode(vectors[name].float()).latent_dist
            for output in ("parameters", "mean", "logvar"):
                if f"{case}.{output}" in vectors:
                    vectors.check(f"{case}.{output}", getattr(posterior, output))
        elif kind == "z" and f"{case}.sample" in vectors:
            vectors.check(f"{case}.sample", vae.decode(vectors[name].float()).sample)


@torch.no_grad()
@golden.by_file(TRAINER, "vae_opensora*.safetensors")
def test_opensora(vectors: Vectors) -> None:
    check_codings(vectors, build(vectors, AutoencoderKLOpenSora))


@torch.no_grad()
@golden.by_file(TRAINER, "vae_cogvideox*.safetensors")
def test_cogvideox(vectors: Vectors) -> None:
    check_codings(vectors, build(vectors, AutoencoderKLCogVideoX))


@torch.no_grad()
@golden.by_file(TRAINER, "vae_ltx*.safetensors")
def test_ltx(vectors: Vectors) -> None:
    vae = build(vectors, AutoencoderKLLTXVideo)
    check_codings(vectors, vae)
    vectors.check("decoded_untiled", vae.decode(vectors["z"].float(), timestep=vectors["temb"]).sample)
