"""Noise schedules: known values, precisions, shapes."""

import pytest
import torch

from common.diffusion import add_noise, noise_levels, signal_to_noise, velocity

ALPHAS = torch.tensor([0.64, 0.36, 0.0], dtype=torch.float64)  # sqrt: 0.8, 0.6, 0; sqrt of the rest: 0.6, 0.8, 1


def test_known_values() -> None:
    clean, noise, timesteps = torch.full((3, 1, 2), 10.0), torch.ones(3, 1, 2), torch.arange(3)
    assert add_noise(clean, noise, timesteps, ALPHAS)[:, 0, 0].tolist() == pytest.approx([8.6, 6.8, 1.0])
    assert velocity(clean, noise, timesteps, ALPHAS)[:, 0, 0].tolist() == pytest.approx([-5.2, -7.4, -10.0])
    assert signal_to_noise(timesteps, ALPHAS).tolist() == pytest.approx([0.64 / 0.36, 0.36 / 0.64, 0.0])


def test_velocity_gives_the_clean_data_back() -> None:
    """x_0 = sqrt(a_t) x_t - sqrt(1 - a_t) v, which is the velocity's own formula."""
    clean, noise, timesteps = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1, 0])
    noisy, v = add_noise(clean, noise, timesteps, ALPHAS), velocity(clean, noise, timesteps, ALPHAS)
    torch.testing.assert_close(velocity(v, noisy, timesteps, ALPHAS), clean)


def test_one_level_per_row_or_per_token() -> None:
    like = torch.zeros(2, 3, 4)
    assert noise_levels(torch.tensor([0, 1]), ALPHAS, like)[0].shape == (2, 1, 1)
    signal, sigma = noise_levels(torch.tensor([[0, 1, 2], [2, 1, 0]]), ALPHAS, like)
    assert signal.shape == sigma.shape == (2, 3, 1)
    assert signal[..., 0].tolist() == [pytest.approx([0.8, 0.6, 0.0]), pytest.approx([0.0, 0.6, 0.8])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_are_float32_whatever_goes_in(dtype: torch.dtype) -> None:
    clean, noise, timesteps = torch.randn(3, 2).to(dtype), torch.randn(3, 2).to(dtype), torch.arange(3)
    for alphas in (ALPHAS, ALPHAS.to(dtype)):
        results = [function(clean, noise, timesteps, alphas) for function in (add_noise, velocity)]
        results += [signal_to_noise(timesteps, alphas), *noise_levels(timesteps, alphas, clean)]
        assert {each.dtype for each in results} == {torch.float32}


def test_the_schedule_is_rounded_last() -> None:
    """In float32, 1 - a is 0 for this a; in the schedule's own float64 it is not."""
    alphas = torch.tensor([1 - 1e-9], dtype=torch.float64)
    sigma = noise_levels(torch.tensor([0]), alphas, torch.zeros(1, dtype=torch.float16))[1]
    assert sigma.item() == pytest.approx(1e-9**0.5, rel=1e-6)
    halves = torch.tensor([0.999], dtype=torch.bfloat16)  # rounds to 1.0, which float32 cannot mend
    assert noise_levels(torch.tensor([0]), halves, torch.zeros(1))[1].item() == 0
