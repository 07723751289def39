"""Guidance where the answer is known: two Gaussians, for which log r, its gradient and the guided law are exact."""

import math

import pytest
import torch

from dgutils.errors import UserError
from dgutils.guidance import BOOSTING, Boosted, GuidedDenoiser, check_settings, grad_log_density_ratio
from dgutils.noise import PerSampleNoise, karras_sigmas, vp_time_to_sigma
from dgutils.sampler import edm_sampler

DATA_MEAN, DATA_STD = 0.3, 0.5
MODEL_MEAN, MODEL_STD = -0.2, 0.7


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi) - 0.5 * variance.log()


class ExactDiscriminator:
    """log p_data / p_model of the noised laws: what a perfect discriminator returns, at VP inputs."""

    def log_density_ratio(self, x_vp, vp_time):
        sigma = vp_time_to_sigma(vp_time)[:, None, None, None]
        x = x_vp * (1 + sigma**2).sqrt()
        data = log_normal(x, DATA_MEAN, DATA_STD**2 + sigma**2)
        return (data - log_normal(x, MODEL_MEAN, MODEL_STD**2 + sigma**2)).sum((1, 2, 3))


def gaussian_denoiser(mean, std):
    def denoise(x, sigma, step, order):
        sigma = sigma[:, None, None, None]
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    return denoise


wrong = gaussian_denoiser(MODEL_MEAN, MODEL_STD)
right = gaussian_denoiser(DATA_MEAN, DATA_STD)


def test_gradient_is_the_difference_of_scores():
    sigma = torch.logspace(-2, 1.5, 9, dtype=torch.float64)
    x = torch.randn(9, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grad, log_ratio = grad_log_density_ratio(ExactDiscriminator(), x, sigma)
    variance = sigma[:, None, None, None] ** 2
    score_data = -(x - DATA_MEAN) / (DATA_STD**2 + variance)
    score_model = -(x - MODEL_MEAN) / (MODEL_STD**2 + variance)
    # vp_time loses about eight digits at small sigma, hence not 1e-12
    assert (grad - (score_data - score_model)).abs().max() < 1e-7
    assert log_ratio.shape == (9,) and log_ratio.dtype == torch.float64


def test_weight_one_turns_the_wrong_denoiser_into_the_right_one():
    guided = GuidedDenoiser(wrong, ExactDiscriminator(), 1.0, 1.0, time_min=0.0)
    sigma = torch.logspace(-2, 1.9, 12, dtype=torch.float64)
    x = torch.randn(12, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    for order in (1, 2):
        assert (guided(x, sigma, 0, order) - right(x, sigma, 0, order)).abs().max() < 1e-6


def test_guided_samples_of_the_wrong_model_have_the_right_law():
    noise = PerSampleNoise(range(300), (1, 4, 4))
    guided = GuidedDenoiser(wrong, ExactDiscriminator(), 1.0, 1.0, time_min=0.0)
    x = edm_sampler(guided, noise, karras_sigmas(40))
    same_noise = edm_sampler(right, noise, karras_sigmas(40))
    assert (x - same_noise).abs().max() < 1e-5
    unguided = edm_sampler(wrong, noise, karras_sigmas(40))
    standard_error = DATA_STD / math.sqrt(x.numel())
    assert abs(x.mean() - DATA_MEAN) < 4 * standard_error + 2e-3
    assert abs(x.std() - DATA_STD) < 4 * standard_error + 2e-3
    assert abs(unguided.mean() - MODEL_MEAN) < 0.05 and abs(unguided.std() - MODEL_STD) < 0.05


def test_weights_act_on_their_own_order():
    x, sigma = torch.ones(2, 1, 2, 2, dtype=torch.float64), torch.full((2,), 1.0, dtype=torch.float64)
    first = GuidedDenoiser(wrong, ExactDiscriminator(), 2.0, 0.0)
    assert not torch.equal(first(x, sigma, 0, 1), wrong(x, sigma, 0, 1))
    assert torch.equal(first(x, sigma, 0, 2), wrong(x, sigma, 0, 2))
    second = GuidedDenoiser(wrong, ExactDiscriminator(), 0.0, 2.0)
    assert torch.equal(second(x, sigma, 0, 1), wrong(x, sigma, 0, 1))
    assert not torch.equal(second(x, sigma, 0, 2), wrong(x, sigma, 0, 2))


def test_nothing_outside_the_window_per_image():
    sigma = torch.tensor([0.01, 1.0, 79.0], dtype=torch.float64)  # below, inside, above [0.01, 0.5]
    x = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    guided = GuidedDenoiser(wrong, ExactDiscriminator(), 2.0, 0.0, time_min=0.01, time_max=0.5)
    guidance = guided.guidance(x, sigma, 0, 1)
    assert (guidance[[0, 2]] == 0).all() and (guidance[1] != 0).all()


class Tilted:
    """log r = slope * sum(x_vp) + offset per image: boosting must pick the images with negative log r."""

    def __init__(self, offsets):
        self.offsets = torch.tensor(offsets, dtype=torch.float64)

    def log_density_ratio(self, x_vp, vp_time):
        return 0.1 * x_vp.sum((1, 2, 3)) + self.offsets


@pytest.mark.parametrize(("boosting", "doubled"), [("released", {0, 2, 4}), ("paper", {1, 3, 5}), ("none", set())])
def test_boosting_doubles_the_guidance_of_samples_in_need(boosting, doubled):
    x, sigma = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for step in range(6):
        guided = BOOSTING[boosting](GuidedDenoiser(wrong, Tilted([-1.0, 1.0]), 1.0))
        guidance = guided.guidance(x, sigma, step, 1)
        ratio = (guidance[0] / guidance[1]).mean().item()
        assert ratio == pytest.approx(2.0 if step in doubled else 1.0)


@pytest.mark.parametrize(("boosting", "boosted"), [("released", [0, 5, 10]), ("paper", [1, 3, 5, 7, 9, 11])])
def test_boosting_churns_samples_whose_previous_log_ratio_was_negative(boosting, boosted):
    guided = BOOSTING[boosting](GuidedDenoiser(wrong, Tilted([-1.0, 1.0]), 1.0))
    base = torch.tensor([2.0, 2.0]), torch.tensor([1.01, 1.01])  # S_churn and S_noise of the others
    assert guided.churn(0, base) is base  # nothing is known yet
    guided(torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0, 1)
    for step in range(12):
        churn, noise = guided.churn(step, base)
        assert churn.tolist() == [4.0 if step in boosted else 2.0, 2.0]
        assert torch.equal(noise, torch.tensor([1.0 if step in boosted else 1.01, 1.01]))


def test_boosting_of_ones_own_settings_stays_within_them():
    """Half the guidance, every third step; outside the window no image is in need."""
    boosted = Boosted(GuidedDenoiser(wrong, Tilted([-1.0, 1.0, -1.0]), 1.0), 3, 1, 3, 2, s_churn=9.0, factor=0.5)
    x, sigma = torch.zeros(3, 1, 2, 2, dtype=torch.float64), torch.tensor([1.0, 1.0, 1e-3], dtype=torch.float64)
    base = torch.tensor([2.0] * 3), torch.tensor([1.01] * 3)
    for step in range(6):
        denoised, guidance = boosted(x, sigma, step, 1), boosted.last_guidance
        assert torch.equal(denoised, wrong(x, sigma, step, 1) + guidance) and (guidance[2] == 0).all()
        assert (guidance[0] / guidance[1]).mean() == pytest.approx(0.5 if step % 3 == 2 else 1.0)
        assert torch.equal(boosted(x, sigma, step, 2), wrong(x, sigma, step, 2))
        assert boosted.churn(step, base)[0].tolist() == ([9.0, 2.0, 2.0] if step % 3 == 1 else [2.0] * 3)


def test_clipped_log_ratio_has_no_gradient_where_the_discriminator_is_sure():
    x, sigma = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    clipped = GuidedDenoiser(wrong, Tilted([0.0, -12.0]), 1.0, log_ratio="clipped")
    guidance = clipped.guidance(x, sigma, 0, 1)
    assert (guidance[0] != 0).all() and (guidance[1] == 0).all()
    assert clipped.last_log_ratio.tolist() == pytest.approx([0.0, math.log(1e-5 / (1 - 1e-5))])
    assert (GuidedDenoiser(wrong, Tilted([0.0, -12.0]), 1.0).guidance(x, sigma, 0, 1) != 0).all()


def test_class_labels_reach_the_discriminator():
    class Conditional:
        def log_density_ratio(self, x_vp, vp_time, class_labels):
            return x_vp.sum((1, 2, 3)) * class_labels

    x, sigma = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    guided = GuidedDenoiser(wrong, Conditional(), 1.0, class_labels=torch.tensor([0, 3]))
    guidance = guided.guidance(x, sigma, 0, 1)
    assert (guidance[0] == 0).all() and guidance[1].numpy() == pytest.approx(3 / math.sqrt(2))


def test_guidance_that_is_not_finite_names_itself_step_sigma_and_seeds():
    guided = GuidedDenoiser(wrong, Tilted([0.0, math.nan]), 1.0)
    broken = torch.tensor([1.0, math.nan])[:, None, None, None]
    guided.ensemble.log_density_ratio = lambda x, t: (x * broken).sum((1, 2, 3))
    with pytest.raises(UserError, match=r"the guidance is not finite at step 0 \(sigma 80\) for seeds \[8\]"):
        edm_sampler(guided, PerSampleNoise([7, 8], (1, 2, 2)), karras_sigmas(5))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(time_min=0.6, time_max=0.5), "time_min <= time_max"),
        (dict(time_max=1.5), "time_max <= 1"),
        (dict(weight_1st_order=-1.0), "must be finite, not negative"),
        (dict(log_ratio="probability"), "unknown log_ratio"),
    ],
)
def test_bad_guidance(bad, message):
    with pytest.raises(UserError, match=message):
        GuidedDenoiser(wrong, ExactDiscriminator(), **bad)


def test_unknown_boosting():
    with pytest.raises(UserError, match="unknown boosting 'sometimes'; choose one of none, released, paper"):
        check_settings(2.0, 0.0, 0.01, 1.0, "sometimes")
