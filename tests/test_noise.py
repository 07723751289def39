"""Noise levels and draws against their definitions."""

import pytest
import torch

from dgutils.errors import UserError
from dgutils.noise import (
    PerSampleNoise,
    karras_sigmas,
    keyed_rng,
    sample_vp_time,
    sigma_to_vp_time,
    vp_scale,
    vp_time_to_sigma,
)


def test_schedule_ends_and_spacing():
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 19
    assert abs(sigmas[0] - 80) < 1e-12 and abs(sigmas[17] - 0.002) < 1e-15 and sigmas[18] == 0
    roots = sigmas[:18] ** (1 / 7)  # EDM eq. 5: evenly spaced in sigma^(1/rho)
    assert (roots.diff() - roots.diff()[0]).abs().max() < 1e-12


def test_vp_time_inverts_and_matches_the_vp_process():
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    time = sigma_to_vp_time(sigma)
    assert ((vp_time_to_sigma(time) - sigma) / sigma).abs().max() < 1e-9
    mean = torch.exp(-0.25 * time**2 * 19.9 - 0.5 * time * 0.1)  # Song et al. 2021, eq. 33
    assert (mean - vp_scale(sigma)).abs().max() < 1e-12


def test_guidance_window_is_fifteen_of_eighteen_steps():
    """FACTS section 1: tau >= 0.01 means sigma >= 0.0447: 15 of 18 steps are guided, 29 of 35."""
    for steps, guided in ((18, 15), (35, 29)):
        time = sigma_to_vp_time(karras_sigmas(steps)[:-1])
        assert ((time >= 0.01) & (time <= 1)).sum() == guided


def test_sampled_times_are_log_uniform_in_sigma():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    log_sigma = vp_time_to_sigma(sample_vp_time(u)).log()
    steps = log_sigma.diff()
    assert (steps - steps.mean()).abs().max() < 1e-7
    ends = vp_time_to_sigma(sample_vp_time(torch.tensor([0.0, 1.0])))
    assert abs(ends[0] - 0.001) < 2e-5 and abs(ends[1] - 152) < 1  # FACTS: [0.001, 152]
    assert sample_vp_time(torch.tensor([0.0]), 0.01)[0] == pytest.approx(0.01, abs=1e-12)


def test_draws_depend_on_seed_and_step_only():
    many = PerSampleNoise([3, 1, 4], (2, 5, 5))
    one = PerSampleNoise([1], (2, 5, 5))
    assert torch.equal(many.draw(7)[1], one.draw(7)[0])
    assert not torch.equal(one.draw(7), one.draw(8))
    assert not torch.equal(many.draw(0)[0], many.draw(0)[2])


def test_draws_are_standard_normal():
    draws = PerSampleNoise(range(40), (3, 32, 32)).draw(0)
    n = draws.numel()
    assert draws.mean().abs() < 4 / n**0.5 and (draws.var() - 1).abs() < 4 * (2 / n) ** 0.5


def test_keys_do_not_collide():
    keys = [(s, *k) for s in range(3) for k in ((), (1,), (0, 1), (0, 0, 1), (1, 1))]
    firsts = {keyed_rng(*key).integers(2**63) for key in keys}
    assert len(firsts) == len(keys)
    assert keyed_rng(5, 2).random() == keyed_rng(5, 2).random()


@pytest.mark.parametrize("bad", [dict(num_steps=1), dict(num_steps=5, sigma_min=90), dict(num_steps=5, rho=0)])
def test_bad_schedules(bad):
    with pytest.raises(UserError, match="karras_sigmas"):
        karras_sigmas(**bad)


def test_bad_seeds():
    for seeds in ([], [-1]):
        with pytest.raises(UserError, match="seed"):
            PerSampleNoise(seeds, (1, 2, 2))
