"""The Heun sampler against the closed form of a Gaussian.

For data N(0, s^2) the denoiser is D(x, sigma) = s^2 / (s^2 + sigma^2) x, and the probability-flow ODE carries
x at sigma_max to x sqrt(s^2 / (s^2 + sigma_max^2)) at 0.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgutils import sampler
from dgutils.errors import UserError
from dgutils.noise import PerSampleNoise, karras_sigmas, vp_sigmas

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

    def churn(step, base):
        return torch.tensor([0.0, 4.0 * (step % 5 == 0), 0.0]), base[1]

    one = sampler.edm_sampler(gaussian_denoiser, noise, karras_sigmas(18), churn=churn)
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

    with pytest.raises(UserError, match=r"the denoised image is not finite at step 3 \(sigma .*seeds \[11\]"):
        sampler.edm_sampler(broken, PerSampleNoise([10, 11, 12], (1, 2, 2)), karras_sigmas(8))


def test_ancestral_sampling_draws_from_the_data():
    """For Gaussian data the posterior mean is exact, and many small steps end in the data's law."""
    noise = PerSampleNoise(range(200), (1, 8, 8))
    x = sampler.ancestral_sampler(gaussian_denoiser, noise, vp_sigmas(400))
    assert abs(x.std().item() - S) < 4 * S / math.sqrt(2 * x.numel()) + 3e-3
    assert abs(x.mean().item()) < 4 * S / math.sqrt(x.numel())


def test_one_ancestral_step_is_the_ddpm_posterior():
    """Ho et al. 2020, eqs. 6-7, at the VP scale: x_vp' = mean(x_vp, x_0) + sqrt(beta-tilde) z."""
    noise, sigmas = PerSampleNoise([5], (1, 2, 2)), torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    seen = []

    def denoise(x, sigma, step, order):
        seen.append(x)
        return torch.full_like(x, 0.3)

    sampler.ancestral_sampler(denoise, noise, sigmas)
    bar, bar_next = 1 / (1 + sigmas[0] ** 2), 1 / (1 + sigmas[1] ** 2)  # alpha-bar at either end
    alpha = bar / bar_next
    mean = (bar_next.sqrt() * (1 - alpha) * 0.3 + alpha.sqrt() * (1 - bar_next) * seen[0] * bar.sqrt()) / (1 - bar)
    variance = (1 - bar_next) / (1 - bar) * (1 - alpha)
    expected = (mean + variance.sqrt() * noise.draw(1)) / bar_next.sqrt()
    assert (seen[1] - expected).abs().max() < 1e-12


def test_classifier_free_guidance_of_gaussians():
    """With linear denoisers the guided one is their extrapolation: weight 0, 1 give either network, 2 goes beyond."""
    x, sigma = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def conditional(x, sigma, step, order):
        return 0.5 * x

    for weight in (0.0, 1.0, 2.0):
        guided = sampler.extrapolated_denoiser(conditional, gaussian_denoiser, weight)
        expected = gaussian_denoiser(x, sigma, 0, 1) * (1 - weight) + weight * 0.5 * x
        assert (guided(x, sigma, 0, 1) - expected).abs().max() < 1e-15


def test_sigmas_fit_the_network():
    class Network:
        sigma_min, sigma_max = 0.01, 50.0

        def round_sigma(self, sigma):
            return (sigma * 100).round() / 100

    fitted = sampler.fitted_sigmas(Network(), 18, 0.002, 80.0, 7.0)
    assert fitted[0] == 50 and fitted[-2] == 0.01 and fitted[-1] == 0
    assert (fitted - karras_sigmas(18, 0.01, 50.0)).abs().max() < 0.0051  # the ramp is laid between the limits
    assert (fitted * 100 - (fitted * 100).round()).abs().max() < 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.integers(2, 30), low=st.floats(0.001, 0.1), high=st.floats(5, 500), rho=st.floats(1, 12),
       churn=st.floats(0, 80), size=st.integers(1, 4))  # fmt: skip
def test_any_schedule_gives_finite_images_that_do_not_depend_on_the_batch(steps, low, high, rho, churn, size):
    sigmas = karras_sigmas(steps, low, high, rho)
    assert (sigmas.diff() < 0).all() and sigmas[0] == pytest.approx(high) and sigmas[-2] == pytest.approx(low)
    whole = sampler.edm_sampler(gaussian_denoiser, PerSampleNoise(range(4), (1, 2, 2)), sigmas, churn)
    part = sampler.edm_sampler(gaussian_denoiser, PerSampleNoise(range(size), (1, 2, 2)), sigmas, churn)
    assert torch.isfinite(whole).all() and torch.equal(whole[:size], part)
