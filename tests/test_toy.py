"""The 2-D world's closed forms, and through them the sampler and the guidance: the wrong model, put right."""

import numpy as np
import pytest
import torch

from dgutils import toy
from dgutils.discriminator import RULES
from dgutils.guidance import GuidedDenoiser
from dgutils.noise import sigma_to_vp_time, vp_scale
from dgutils.toy import DATA, MODEL, EnergyReference, ExactDiscriminator, Mixture


def random_points(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-1.5, 1.9, n, dtype=torch.float64)
    x = torch.randn(n, 2, 1, 1, dtype=torch.float64, generator=generator)
    return x * (0.5 + sigma)[:, None, None, None], sigma


def score(mixture, x, sigma):
    return (mixture.denoise(x, sigma) - x) / sigma[:, None, None, None] ** 2


def test_one_component_is_a_gaussian():
    mixture = Mixture((1.0,), ((0.3, -0.2),), (0.5,))
    x, sigma = random_points(50)
    variance = 0.25 + sigma**2
    offset = x.flatten(1) - torch.tensor([0.3, -0.2], dtype=torch.float64)
    expected = -offset.square().sum(1) / (2 * variance) - torch.log(2 * torch.pi * variance)
    assert (mixture.log_density(x, sigma) - expected).abs().max() < 1e-10
    assert (score(mixture, x, sigma) + (offset / variance[:, None])[..., None, None]).abs().max() < 1e-10


def test_density_integrates_to_one():
    grid = torch.linspace(-3, 3, 301, dtype=torch.float64)
    plane = torch.cartesian_prod(grid, grid)[:, :, None, None]
    for mixture in (DATA, MODEL):
        density = mixture.log_density(plane, torch.full((len(plane),), 0.2, dtype=torch.float64)).exp()
        assert abs(density.sum() * (grid[1] - grid[0]) ** 2 - 1) < 1e-8


def test_gradient_of_the_log_ratio_is_the_difference_of_scores():
    x, sigma = random_points(60)
    x.requires_grad_()
    (grad,) = torch.autograd.grad((DATA.log_density(x, sigma) - MODEL.log_density(x, sigma)).sum(), x)
    with torch.no_grad():
        assert (grad - score(DATA, x, sigma) + score(MODEL, x, sigma)).abs().max() < 1e-10


def test_the_discriminator_answers_at_vp_inputs_under_its_rule():
    x, sigma = random_points(40)
    vp_time = sigma_to_vp_time(sigma)
    exact = DATA.log_density(x, sigma) - MODEL.log_density(x, sigma)
    x_vp = x * vp_scale(sigma)[:, None, None, None]
    for rule in RULES:
        said = ExactDiscriminator(DATA, MODEL, rule).log_density_ratio(x_vp, vp_time)
        expected = RULES["raw_logits_as_probabilities"](exact[None]) if rule.startswith("raw") else exact
        assert (said - expected).abs().max() < 1e-5  # the clock costs digits, and the fault magnifies them


def test_samples_have_the_mixtures_moments():
    xy = DATA.sample(40000, seed=3)
    mean = np.array(DATA.weights) @ np.array(DATA.means)
    assert np.abs(xy.mean(0) - mean).max() < 0.015
    upper_right = (xy > 0).all(1).mean()
    assert abs(upper_right - 0.4) < 0.01
    assert np.array_equal(xy, DATA.sample(40000, seed=3)) and not np.array_equal(xy, DATA.sample(40000, seed=4))


def test_energy_distance_of_known_laws():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1500, 2))
    reference = EnergyReference(a)
    assert abs(reference(b)) < 0.005  # same law
    # Far apart, 2 E|X-Y| is twice the distance d + 1/d (two normals in the plane); E|X-X'| = sqrt(pi).
    assert reference(b + [50, 0]) == pytest.approx(2 * (50 + 1 / 50) - 2 * np.sqrt(np.pi), abs=0.25)


def test_energy_distance_leaves_out_pairs_of_copies():
    points, reference = np.array([[0.0, 0], [3, 4], [9, 9]]), np.array([[0.0, 0], [0, 2]])
    across = (2 * (0 + 2) / 2 + (5 + 13**0.5) / 2) / 3  # of points 0, 0, 1, whose only distinct pair is 5 apart
    expected = 2 * across - 5 - 2
    assert EnergyReference(reference).bootstrap_distances(points, [[0, 0, 1]])[0] == pytest.approx(expected)


def guided(w1, w2, rule="mean_logit"):
    return GuidedDenoiser(MODEL.denoise, ExactDiscriminator(DATA, MODEL, rule), w1, w2, time_min=0.0)


def test_guidance_brings_the_wrong_mixture_to_the_right_one():
    reference = EnergyReference(DATA.sample(2000, seed=1))
    distance = {
        name: reference(toy.sample(denoise, 500, 18))
        for name, denoise in {"unguided": MODEL.denoise, "exact": guided(1, 1), "first order": guided(2, 0),
                              "fault": guided(2, 0, "raw_logits_as_probabilities")}.items()
    }  # fmt: skip
    bound = 0.02  # the data itself scores 0 +- 0.005 at this n
    assert distance["exact"] < bound < distance["unguided"] / 3
    assert distance["exact"] < distance["first order"] < distance["unguided"] / 2
    assert distance["fault"] > bound


def test_exact_guidance_follows_the_right_denoiser_seed_by_seed():
    right = toy.sample(DATA.denoise, 50, 18)
    assert np.abs(toy.sample(guided(1, 1), 50, 18) - right).max() < 1e-6
    assert np.abs(toy.sample(MODEL.denoise, 50, 18) - right).max() > 0.1


def test_guidance_on_the_first_order_only_converges_more_slowly():
    truth = toy.sample(DATA.denoise, 100, 400)
    both, first = ([np.abs(toy.sample(guided(*w), 100, n) - truth).mean() for n in (36, 144)] for w in ((1, 1), (2, 0)))
    assert both[1] < both[0] / 8  # four times the steps: second order
    assert first[0] / 8 < first[1] < first[0] / 2  # first order
