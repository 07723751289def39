"""The Heun sampler against the closed form of a Gaussian.

For data N(0, s^2) the denoiser is D(x, sigma) = s^2 / (s^2 + sigma^2) x, and the probability-flow ODE carries
x at sigma_max to x sqrt(s^2 / (s^2 + sigma_max^2)) at 0.
"""

import math

import pytest
import torch

from dgutils import sampler
from dgutils.errors import UserError
from dgutils.noise import PerSampleNoise, karras_sigmas

S = 0.7


def gaussian_denoiser(x, sigma, step, order):
    return S**2 / (S**2 + sigma[:, None, None, None] ** 2) * x


def error(num_steps):
    noise = PerSampleNoise(range(20), (1, 4, 4))
    x = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(num_steps))
    exact = 80 * noise.draw(0) * S / math.sqrt(S**2 + 80**2)
    return (x - exact).abs().max().item()


def test_converges_to_the_ode_solution_at_second_order():
    errors = [error(n) for n in (20, 40, 80, 160, 320)]
    assert errors[-1] < 3e-4
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.8 < order < 2.4 for order in orders), orders


def test_churn_keeps_the_distribution():
    """Noise added and removed again leaves the variance of the data."""
    noise = PerSampleNoise(range(150), (1, 8, 8))
    x = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(150), s_churn=20.0)
    assert abs(x.std().item() - S) < 4 * S / math.sqrt(2 * x.numel())


def test_churn_outside_its_window_is_no_churn():
    noise = PerSampleNoise(range(3), (1, 4, 4))
    plain = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(18))
    windowed = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(18), s_churn=40.0, s_min=100.0)
    inside = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(18), s_churn=40.0, s_min=0.05, s_max=50)
    assert torch.equal(plain, windowed)
    assert (plain - inside).abs().max() > 1e-3 and torch.isfinite(inside).all()


def test_churn_per_image_touches_only_that_image():
    noise = PerSampleNoise(range(3), (1, 4, 4))
    plain = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(18))
    one = sampler.edm_sampler(
        gaussian_denoiser, noise, karras_sigmas(18), lambda step: torch.tensor([0.0, 4.0 * (step % 5 == 0), 0.0])
    )
    assert torch.equal(plain[[0, 2]], one[[0, 2]]) and not torch.equal(plain[1], one[1])


def test_counts_its_evaluations():
    calls = []

    def counting(x, sigma, step, order):
        calls.append((step, order))
        return gaussian_denoiser(x, sigma, step, order)

    sampler.edm_sampler(counting, PerSampleNoise([0], (1, 2, 2)), karras_sigmas(18))
    assert len(calls) == sampler.nfe(18) == 35
    assert calls[:3] == [(0, 1), (0, 2), (1, 1)] and calls[-1] == (17, 1)


def test_batch_makeup_does_not_matter():
    sigmas = karras_sigmas(10)
    whole = sampler.edm_sampler(gaussian_denoiser, PerSampleNoise(range(64), (1, 4, 4)), sigmas, s_churn=5.0)
    for size in (1, 7):
        parts = [
            sampler.edm_sampler(gaussian_denoiser, PerSampleNoise(range(64)[i : i + size], (1, 4, 4)), sigmas, 5.0)
            for i in range(0, 64, size)
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_not_finite_names_step_sigma_and_seeds():
    def broken(x, sigma, step, order):
        bad = x.clone()
        if step == 3:
            bad[1] = math.nan
        return bad

    with pytest.raises(UserError, match=r"step 3 \(sigma .*seeds \[11\]"):
        sampler.edm_sampler(broken, PerSampleNoise([10, 11, 12], (1, 2, 2)), karras_sigmas(8))
