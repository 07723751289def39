"""What came after, in the 2-D world where the answer is known: each method must correct a wrong model."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from dgutils import toy
from dgutils.guidance import GuidedDenoiser, grad_log_density_ratio, reconstruction_error, rejection_bounds
from dgutils.networks import checkpoints
from dgutils.noise import PerSampleNoise, karras_sigmas, sigma_to_vp_time, vp_scale, vp_time_to_sigma
from dgutils.pipeline.copies import Copy
from dgutils.pipeline.jobs import RealSet
from dgutils.pipeline.store import Store
from dgutils.sampler import edm_sampler, extrapolated_denoiser, extrapolated_weights, rejection_sampler
from dgutils.toy import DATA, MODEL

REFERENCE = toy.EnergyReference(DATA.sample(4000, seed=1))


def distance(denoise, n=1500):
    with torch.no_grad():
        return float(REFERENCE(toy.sample(denoise, n, 18, first_seed=5000)))


def points(law, n, seed):
    return torch.from_numpy(law.sample(n, seed)).float()[:, :, None, None]


def noised(clean, seed):
    draws = torch.Generator().manual_seed(seed)
    sigma = torch.exp(math.log(0.05) + math.log(200) * torch.rand(len(clean), generator=draws))
    return clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=draws), sigma


# --- the objective


class Learner(nn.Module):
    """A discriminator of three inputs: two coordinates and the noise level."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def log_density_ratio(self, x_vp, vp_time):
        level = vp_time_to_sigma(vp_time).log()[:, None] / 4
        return self.net(torch.cat([4 * x_vp.flatten(1), level], 1).float())[:, 0]


def loss_on(learner, clean, seed, weight=1.0):
    x, sigma = noised(clean, seed)
    denoised = MODEL.denoise(x.double(), sigma.double()).float()
    return reconstruction_error(learner.log_density_ratio, denoised, clean, x, sigma, weight).mean()


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_the_objective_and_its_derivative_are_those_of_the_definition(weight):
    """|D + w sigma^2 grad d - y|^2 / sigma^2, differentiated twice by torch."""
    learner, clean = Learner(), points(DATA, 256, 0)
    ours = loss_on(learner, clean, 3, weight)
    ours.backward()
    found = [p.grad.clone() for p in learner.parameters()]
    learner.zero_grad()
    x, sigma = noised(clean, 3)
    level = sigma[:, None, None, None]
    x.requires_grad_()
    logit = learner.log_density_ratio(x * vp_scale(level), sigma_to_vp_time(sigma))
    (grad,) = torch.autograd.grad(logit.sum(), x, create_graph=True)
    residual = MODEL.denoise(x.detach().double(), sigma.double()).float() + weight * level**2 * grad - clean
    by_hand = (residual / level).square().flatten(1).sum(1).mean()
    by_hand.backward()
    assert torch.isclose(ours, by_hand, rtol=1e-5)
    *weights, last = zip(found, (p.grad for p in learner.parameters()), strict=True)
    assert all((ours - exact).norm() < 0.01 * exact.norm() for ours, exact in weights)
    assert last[0].abs().max() < 1e-4 and last[1] is None  # a constant has no gradient


def test_without_gradients_the_objective_is_its_value_alone():
    learner, clean = Learner(), points(DATA, 64, 0)
    with torch.no_grad():
        assert torch.isclose(loss_on(learner, clean, 3), loss_on(copy.deepcopy(learner), clean, 3))


def trained_learner(objective, steps=1200):
    learner, draws = Learner(), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(learner.parameters(), 2e-3)
    real, fake = points(DATA, 20000, 5), points(MODEL, 20000, 6)
    for step in range(steps):
        rows = torch.randint(len(real), (256,), generator=draws)
        if objective == "reconstruction":
            loss = loss_on(learner, real[rows], step)
        else:
            x, sigma = noised(torch.cat([real[rows], fake[rows]]), step)
            logit = learner.log_density_ratio(x * vp_scale(sigma)[:, None, None, None], sigma_to_vp_time(sigma))
            loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.arange(512).lt(256).float())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return learner


def gradient_error(learner):
    """Of sigma times the gradient, relative to its own square, at points of the model."""
    x, sigma = (value.double() for value in noised(points(MODEL, 2000, 8), 9))
    exact = grad_log_density_ratio(toy.ExactDiscriminator(DATA, MODEL), x, sigma)[0]
    found = grad_log_density_ratio(learner, x, sigma)[0]
    level = sigma[:, None, None, None]
    return float((level * (found - exact)).square().sum() / (level * exact).square().sum())


def test_the_reconstruction_objective_learns_the_gradient_and_corrects_the_model():
    learners = {objective: trained_learner(objective) for objective in ("reconstruction", "cross-entropy")}
    errors = {objective: gradient_error(learner) for objective, learner in learners.items()}
    assert errors["reconstruction"] < 0.8 * errors["cross-entropy"] < 1
    for learner in learners.values():
        assert distance(GuidedDenoiser(MODEL.denoise, learner, 1.0, 1.0, time_min=0.0)) < distance(MODEL.denoise) / 3


# --- rejection along the trajectory


def log_ratio(x, sigma):
    return DATA.log_density(x, sigma) - MODEL.log_density(x, sigma)


def rejected(seeds, share, num_steps=18, attempts=64):
    """Points, and steps, where the bounds are a quantile of what log r grows by on other seeds."""
    sigmas, seen = karras_sigmas(num_steps), []

    def watched(x, sigma, step, order):
        seen.extend([log_ratio(x, sigma)] if order == 1 else [])
        return MODEL.denoise(x, sigma, step, order)

    edm_sampler(watched, PerSampleNoise(range(9000, 9500), (2, 1, 1)), sigmas)
    bounds = rejection_bounds(torch.stack(seen), sigmas[:-1], share, time_min=0.0)
    noise = PerSampleNoise(seeds, (2, 1, 1))
    return rejection_sampler(MODEL.denoise, log_ratio, noise, sigmas, bounds, attempts)


def test_rejection_draws_the_law_of_the_data_at_the_cost_it_says():
    found, calls = rejected(range(1500), 0.95)
    off = float(REFERENCE(found.flatten(1).numpy()))
    plain = float(REFERENCE(toy.sample(MODEL.denoise, 1500, 18)))
    assert off < 0.01 < plain / 5
    cost = calls.double().mean(0)
    assert calls[:, 0].min() == 35 and 3 * 35 < cost[0] < 20 * 35 and cost[0] / 2 < cost[1] < 0.7 * cost[0]
    lax, fewer = rejected(range(1500), 0.5)
    assert (fewer.double().mean(0) < cost / 2).all()  # and less of the correction
    assert off < float(REFERENCE(lax.flatten(1).numpy())) < plain


def test_rejection_depends_on_an_images_seed_alone():
    whole, calls = rejected(range(40), 0.9)
    for seeds in ([3], [7, 30, 31], range(20, 40)):
        part, its_calls = rejected(seeds, 0.9)
        assert torch.allclose(part, whole[list(seeds)], rtol=0, atol=1e-9)
        assert torch.equal(its_calls, calls[list(seeds)])
    assert calls[:, 0].unique().numel() > 5


def test_who_is_never_rejected_is_drawn_by_the_plain_sampler():
    noise, sigmas = PerSampleNoise(range(30), (2, 1, 1)), karras_sigmas(10)
    plain = edm_sampler(MODEL.denoise, noise, sigmas)
    found, calls = rejection_sampler(MODEL.denoise, log_ratio, noise, sigmas, [-math.inf] * 9)
    assert torch.equal(found, plain) and calls.tolist() == [[19, 10]] * 30
    found, calls = rejection_sampler(MODEL.denoise, log_ratio, noise, sigmas, [math.inf] * 9, attempts=3)
    assert (found - plain).abs().max() > 0.1  # rejected in the first step twice: the third attempt is taken
    assert calls.tolist() == [[2 + 2 + 19, 2 + 2 + 10]] * 30


# --- extrapolation


class SmallDenoiser(nn.Module):
    """A learned denoiser of points, EDM's preconditioning around three inputs."""

    def __init__(self, width=32):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, 2))  # fmt: skip

    def forward(self, x, sigma, step=0, order=1):
        sigma, x = sigma[:, None], x.flatten(1)
        total = sigma**2 + 0.6**2
        inside = self.net(torch.cat([x / total.sqrt(), sigma.log() / 4], 1).float())
        return (0.6**2 / total * x + 0.6 * sigma / total.sqrt() * inside)[:, :, None, None]


def train_on(network, clean, steps, rate, seed):
    network, draws = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(network.parameters(), rate)
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * (1 - step / steps)
        y = clean[torch.randint(len(clean), (256,), generator=draws)]
        sigma = torch.exp(1.2 * torch.randn(256, generator=draws) - 1.2)
        x = y + sigma[:, None, None, None] * torch.randn(y.shape, generator=draws)
        error = (network(x, sigma) - y).flatten(1).square().sum(1)
        loss = (error * (sigma**2 + 0.6**2) / (0.6 * sigma) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return network


@pytest.fixture(scope="module")
def copies():
    """A network that was trained too shortly, and a copy of it that went on, on its own points."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SmallDenoiser()
    network = train_on(network, points(DATA, 20000, 3), 600, 5e-3, seed=0)
    with torch.no_grad():
        fakes = torch.from_numpy(toy.sample(network, 4000, 18)).float()[:, :, None, None]
    return network, train_on(network, fakes, 300, 1e-3, seed=1)


def test_away_from_a_copy_that_was_trained_on_its_own_points(copies):
    """SIMS in denoisers, Neon in weights: the copy errs again as the network erred, and further."""
    network, own = copies
    plain, worse = distance(network), distance(own)
    sims = distance(extrapolated_denoiser(network, own, 2.0))
    neon = distance(extrapolated_weights(network, own, 1.0))
    assert worse > 2 * plain and max(sims, neon) < plain / 2
    assert distance(extrapolated_weights(network, own, 4.0)) > worse  # too far


def test_extrapolated_weights_leave_both_networks_alone(copies):
    network, own = copies
    before = [copy.deepcopy(net.state_dict()) for net in copies]
    found = dict(extrapolated_weights(network, own, 0.5).named_parameters())
    for name, ours in network.named_parameters():
        torch.testing.assert_close(found[name], ours - 0.5 * (own.state_dict()[name] - ours))
    for old, net in zip(before, copies, strict=True):
        assert all(torch.equal(old[name], value) for name, value in net.state_dict().items())


def test_autoguidance_corrects_as_far_as_the_guide_errs_the_same_way():
    """The guide is wrong in weights, places and widths as the model is, and half as wrong again."""
    data, model = ([np.array(part) for part in (law.weights, law.means, law.stds)] for law in (DATA, MODEL))
    weights, stds = (model[i] * (model[i] / data[i]) ** 0.5 for i in (0, 2))
    means = model[1] + 0.5 * (model[1] - data[1])
    guide = toy.Mixture(tuple(weights / weights.sum()), tuple(map(tuple, means)), tuple(stds))
    found = [distance(extrapolated_denoiser(MODEL.denoise, guide.denoise, 1 + w)) for w in (0.0, 1.0, 2.0)]
    assert found[0] == pytest.approx(distance(MODEL.denoise)) and found[0] > 1.5 * found[1] > 2.25 * found[2]
    assert distance(guide.denoise) > found[0]


# --- copies of a score network


def test_a_copy_goes_on_on_its_own_images_and_is_found(tmp_path):
    log, real = [], RealSet("fashion_mnist", "train", 40)
    store = Store(tmp_path, log.append)
    one = Copy(store, "fashion-mnist-edm", real, 3)
    assert one.lacks and one.sources == (real,) and not list(tmp_path.iterdir())
    network, shipped = one.network, checkpoints.load_denoiser("fashion-mnist-edm")
    off = [float((ours - its).norm() / its.norm()) for ours, its in zip(network.parameters(), shipped.parameters(),
                                                                       strict=True) if its.any()]  # fmt: skip
    assert 0 < np.median(off) < 0.05 and not any(p.requires_grad for p in network.parameters())
    assert not one.lacks and not list((tmp_path / "partial").iterdir())
    again = Copy(store, "fashion-mnist-edm", real, 3)
    assert all(torch.equal(a, b) for a, b in zip(again.network.parameters(), network.parameters(), strict=True))
    assert log[-1].startswith("HIT") and len({one.digest, again.digest, Copy(store, one.score_network, real, 4).digest,
                                              Copy(store, one.score_network, real, 3, seed=1).digest}) == 3
