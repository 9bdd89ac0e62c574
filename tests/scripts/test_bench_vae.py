"""The benchmark's plain WF-VAE and ours give the same numbers: else its ratios would compare different work."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import wfvae as bench

CPU = torch.device("cpu")
SMALLEST = bench.Size(whole=(9, 32), chunked=(21, 32), trained=(5, 32), base_channels=8, trained_base_channels=8)


def test_coding_whole_and_in_chunks() -> None:
    phases = bench.coding_phases(SMALLEST, CPU)
    assert tuple(phases) == bench.CODING
    for variants in phases.values():
        plain, ours = (variants[name]()["result"] for name in ("plain", "ours"))
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-4)


def test_the_plain_model_in_chunks_is_that_of_the_whole() -> None:
    _, plain = bench.build_vae(8, CPU)
    x, z = torch.rand(1, 3, 13, 16, 16) * 2 - 1, torch.randn(1, 16, 6, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_chunks(x), plain.encode(x), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(plain.decode_chunks(z), plain.decode(z), atol=2e-5, rtol=1e-4)


def test_training_steps() -> None:
    bench.check_gradients(SMALLEST, CPU, limit=1e-3)
    phases = bench.training_phases(SMALLEST, CPU)
    assert tuple(phases) == bench.TRAINING
    for name, variants in phases.items():
        plain, ours = (variants[each]() for each in ("plain", "ours"))
        assert set(plain) <= set(ours)
        bench.compare_results(name, plain, ours, limit=1e-3)


def test_other_results_are_errors() -> None:
    one, other = {"result": torch.ones(2)}, {"result": torch.tensor([1.0, 1.1])}
    assert bench.compare_results("encode", one, one, limit=0) == 0
    with pytest.raises(ValueError, match="encode: result of both differs by 0.071 of itself, more than 0.01"):
        bench.compare_results("encode", one, other, limit=0.01)
    with pytest.raises(ValueError, match="encode: ours lacks result"):
        bench.compare_results("encode", one, {}, limit=0.01)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    arguments = argparse.Namespace(size="tiny", threads=1, compile=False)
    activations_mib = 4 * 32 * 5 * 16 * 16 / 2**20  # of the first layer alone: float32, (1, 32, 5, 16, 16)
    assert activations_mib < bench.peak_alone_mib(arguments, "encode", "ours") < 200
