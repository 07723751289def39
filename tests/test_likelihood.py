"""Likelihoods by the probability-flow ODE against closed forms: Gaussians, the 2-D world, guided and not."""

import math

import numpy as np
import pytest
import torch

from dgutils import likelihood, toy
from dgutils.datasets import to_uint8
from dgutils.guidance import GuidedDenoiser
from dgutils.noise import LIKELIHOOD, keyed_rng
from dgutils.toy import DATA, MODEL, ExactDiscriminator, Mixture

LEVELS = likelihood.noise_levels(80.0, 24)


def gaussian(std):
    """The denoiser of N(0, std^2 I), in any dimension."""
    return lambda x, sigma, step, order: x * (std**2 / (std**2 + sigma**2))[:, None, None, None]


def exact(x, std):
    variance, dim = std**2 + LEVELS[0].item() ** 2, x[0].numel()
    return -x.flatten(1).square().sum(1) / (2 * variance) - dim / 2 * math.log(2 * math.pi * variance)


@pytest.mark.parametrize("std", [0.05, 0.5, 2.0])
def test_gaussians_in_closed_form(std):
    x = std * torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bits = likelihood.bits_per_dim(likelihood.log_density(gaussian(std), x, range(6), LEVELS), 768)
    # the latent's law is N(0, sigma_max^2), not N(0, sigma_max^2 + std^2): the sampler's, and the model's own error
    assert (bits - likelihood.bits_per_dim(exact(x, std), 768)).abs().max() < 2e-3
    finer = likelihood.log_density(gaussian(std), x, range(6), likelihood.noise_levels(80.0, 96))
    assert (finer - exact(x, std)).abs().max() / 768 < 1e-5 + (std / 80) ** 2


def shifted(mean, std):
    return Mixture((1.0,), (mean,), (std,))


@pytest.mark.parametrize(("data", "model"), [(DATA, MODEL), (shifted((0.4, -0.3), 0.3), shifted((0.0, 0.1), 0.5))])
def test_guidance_by_the_exact_ratio_gives_the_likelihood_of_the_data(data, model):
    n = 1500
    x, low = torch.from_numpy(data.sample(n, 0))[:, :, None, None], torch.full((n,), 0.002, dtype=torch.float64)
    guided = GuidedDenoiser(model.denoise, ExactDiscriminator(data, model), 1.0, 1.0, time_min=0.0)
    plain = likelihood.log_density(model.denoise, x, range(n), LEVELS)
    found = likelihood.log_density(guided, x, range(n), LEVELS)
    for got, law in ((plain, model), (found, data)):
        error = got - law.log_density(x, low)
        assert error.mean().abs() < 3 * error.std() / n**0.5 + 0.01 and error.std() < 0.2  # nats; one probe a level
    assert (found - plain).mean() > 0.3  # the data's own law is the better one
    wrong = GuidedDenoiser(model.denoise, ExactDiscriminator(data, model), 1.0, 1.0, time_min=0.5)
    assert likelihood.log_density(wrong, x, range(n), LEVELS).mean() < found.mean() - 0.1


def test_an_image_has_its_noise_whatever_batch_it_is_in():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    x = likelihood.dequantise(images, range(5))
    whole = likelihood.log_density(gaussian(0.5), x, range(5), LEVELS)
    alone = likelihood.log_density(gaussian(0.5), likelihood.dequantise(images[3:], [3, 4]), [3, 4], LEVELS)
    assert torch.equal(whole[3:], alone)
    assert not torch.equal(x[3:], likelihood.dequantise(images[3:], [0, 1]))


def test_grey_levels_become_a_density():
    images = np.repeat(np.arange(256, dtype=np.uint8), 50).reshape(50, 16, 16, 1)
    x = likelihood.dequantise(images, range(50))
    assert np.array_equal(to_uint8(x), images)
    moved = (x * 127.5 + 127.5).permute(0, 2, 3, 1).numpy() - images
    assert -0.5 <= moved.min() < -0.49 and 0.49 < moved.max() < 0.5 and abs(moved.mean()) < 0.01
    uniform = torch.tensor([-3 * math.log(256 / 127.5)], dtype=torch.float64)  # over all grey levels, 256/127.5 wide
    assert abs(likelihood.bits_per_dim(uniform, 3).item() - 8) < 1e-12


def test_the_divergence_is_the_jacobians_trace():
    """On average over probes, and for a diagonal Jacobian with any."""
    x, sigma = torch.from_numpy(toy.DATA.sample(4, 1))[:, :, None, None], torch.full((4,), 0.3, dtype=torch.float64)
    trace = [torch.autograd.functional.jacobian(lambda y, s=s: DATA.denoise(y[None], s[None])[0], point).reshape(2, 2)
             .trace() for point, s in zip(x, sigma, strict=True)]
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:, None, :, None, None].expand(-1, 4, -1, 1, 1)
    found = torch.stack([likelihood.divergence(DATA.denoise, x, sigma, probe) for probe in signs]).mean(0)
    assert (found - torch.stack(trace)).abs().max() < 1e-3
    probe = torch.from_numpy(keyed_rng(0, 1, LIKELIHOOD).choice((-1.0, 1.0), (4, 2, 1, 1)))
    got = likelihood.divergence(gaussian(0.5), x, sigma, probe)
    assert (got - 2 * 0.25 / (0.25 + 0.09)).abs().max() < 1e-9
