"""Discriminator guidance (Kim et al. 2023): a denoiser corrected by the gradient of a log-density-ratio.

With log r = log p_data / p_model, the score of the data is the model's score plus grad log r (DG eq. 8), and
by D = x + sigma^2 score that is one line on denoisers:  D_guided = D + w sigma^2 grad_x log r(x, sigma).
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dgutils.errors import require
from dgutils.noise import sigma_to_vp_time, vp_scale
from dgutils.sampler import Churn, Denoise, NotFinite, autocast

# What is differentiated. "clipped": the authors clip the probability to [1e-5, 1 - 1e-5] before the log-odds, which
# clamps the logit: no gradient, hence no guidance, where the discriminator is surer than that.
MOST_SURE = math.log((1 - 1e-5) / 1e-5)
LOG_RATIOS = {"logit": lambda logit: logit, "clipped": lambda logit: logit.clamp(-MOST_SURE, MOST_SURE)}


def grad_log_density_ratio(ensemble, x: torch.Tensor, sigma: torch.Tensor, precision: str = "float32",
                           class_labels=None, log_ratio: str = "logit"):  # fmt: skip
    """Gradient of log r by x, [N, C, H, W], and log r in nats, [N]; both float64 (report, eq:ratio).

    x is noised in the EDM way, clean + sigma z; the discriminator sees x_vp = x / sqrt(1 + sigma^2) at time
    tau(sigma), so the chain rule brings one factor 1 / sqrt(1 + sigma^2). sigma: [N], float64.
    class_labels: int64 [N] for conditional discriminators. log_ratio: a name of `LOG_RATIOS`.
    """
    scale = vp_scale(sigma)[:, None, None, None]
    x_vp = (x * scale).detach().requires_grad_()
    labels = () if class_labels is None else (class_labels,)
    with torch.enable_grad(), autocast(x.device, precision):
        ratio = LOG_RATIOS[log_ratio](ensemble.log_density_ratio(x_vp, sigma_to_vp_time(sigma), *labels))
        (grad,) = torch.autograd.grad(ratio.sum(), x_vp)
    return grad.double() * scale, ratio.detach().double()


@torch.no_grad()
def log_density_ratio(ensemble, x, sigma, precision: str = "float32"):
    """log r alone, in nats, [N], float64: arguments as of `grad_log_density_ratio`."""
    with autocast(x.device, precision):
        return ensemble.log_density_ratio(x * vp_scale(sigma)[:, None, None, None], sigma_to_vp_time(sigma)).double()


def rejection_bounds(log_ratios, sigmas, share: float, time_min: float = 0.01, time_max: float = 1.0):
    """Of the growth of log r in each step, this quantile, at least 0: [steps - 1], bounds for `rejection_sampler`.

    log_ratios: [steps, N], along some images' trajectories; sigmas: [steps]. -inf where a step ends outside the window.
    """
    bounds = torch.quantile(log_ratios.diff(dim=0), share, dim=1).clamp(min=0)
    vp_time = sigma_to_vp_time(sigmas[1:])
    return torch.where((vp_time >= time_min) & (vp_time <= time_max), bounds, -torch.inf)


def reconstruction_error(log_ratio, denoised, clean, x, sigma, weight: float = 1.0):
    """Squared error of the guided denoiser on real images, over sigma^2, [N] (Verine et al. 2025): a loss for log r.

    log_ratio(x_vp, vp_time): [N], of real images noised to x = clean + sigma z; denoised: D(x, sigma) without guidance.
    Its derivative by the parameters of log_ratio needs that of a gradient, but only along the residual, where the
    gradient is a slope of log r: two more logits, a twentieth of sigma to either side, and no network is
    differentiated twice.
    """
    level = sigma[:, None, None, None].to(x.dtype)

    def logit(x):
        return log_ratio(x * vp_scale(level), sigma_to_vp_time(sigma))

    with torch.enable_grad():
        inner = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(logit(inner).sum(), inner)
    residual = (denoised - clean) / level + weight * level * grad
    error = residual.flatten(1).square().sum(1)
    length = error.sqrt()
    ahead = 0.05 * level * residual / length[:, None, None, None]
    slope = (logit(x + ahead) - logit(x - ahead)) / (0.1 * level.flatten()) * length  # <residual, grad>
    linear = 2 * weight * level.flatten() * slope  # its derivative is the error's
    return error + linear - linear.detach()


def check_settings(weight_1st_order, weight_2nd_order, time_min, time_max, boosting="none", log_ratio="logit"):
    """Raises UserError unless these settings of a guided denoiser and its boosting are known or possible."""
    require(log_ratio in LOG_RATIOS, f"unknown log_ratio '{log_ratio}'; choose one of {', '.join(LOG_RATIOS)}")
    require(boosting in BOOSTING, f"unknown boosting '{boosting}'; choose one of {', '.join(BOOSTING)}")
    require(0 <= time_min <= time_max <= 1,
            f"guidance window [{time_min}, {time_max}]: needs 0 <= time_min <= time_max <= 1")
    require(all(0 <= weight < math.inf for weight in (*np.ravel(weight_1st_order), weight_2nd_order)),
            f"guidance weights {weight_1st_order}, {weight_2nd_order} must be finite, not negative")


class GuidedDenoiser:
    """A denoiser with discriminator guidance (report, eq:guided), for `edm_sampler`.

    denoise: the unguided denoiser; ensemble: has log_density_ratio(x_vp, vp_time), and class labels as a third
    argument if class_labels, int64 [N], are given. weight_1st_order acts on the Euler predictor (one for all steps, or
    one a step), weight_2nd_order on the Heun corrector. time_min, time_max: VP times outside of which there is no
    guidance, image by image (the authors' code asks the batch's least time, which differs only while boosting).
    change: what is made of the guidance, a function of it [N, C, H, W] and sigma [N]; None: nothing.
    Raises UserError as `check_settings`.
    `last_log_ratio` [N] and `last_guidance` [N, C, H, W] keep the newest predictor's values for inspection.
    """

    churn = None  # of its own it adds no noise: the sampler's settings hold

    def __init__(self, denoise: Denoise, ensemble, weight_1st_order=2.0, weight_2nd_order=0.0,
                 time_min=0.01, time_max=1.0, precision="float32", log_ratio="logit", class_labels=None,
                 change=None):  # fmt: skip
        check_settings(weight_1st_order, weight_2nd_order, time_min, time_max, log_ratio=log_ratio)
        self.denoise, self.ensemble, self.precision = denoise, ensemble, precision
        self.weights = {1: weight_1st_order, 2: weight_2nd_order}
        self.time_min, self.time_max, self.log_ratio, self.class_labels = time_min, time_max, log_ratio, class_labels
        self.change = change
        self.last_log_ratio = self.last_guidance = None

    def __call__(self, x, sigma, step, order):
        return self.denoise(x, sigma, step, order) + self.guidance(x, sigma, step, order)

    def guidance(self, x, sigma, step, order):
        """w sigma^2 grad log r, [N, C, H, W]: what guidance adds to the denoised image. Zero outside the window."""
        vp_time = sigma_to_vp_time(sigma)
        inside = (vp_time >= self.time_min) & (vp_time <= self.time_max)
        log_ratio, guidance = torch.full_like(sigma, torch.inf), torch.zeros_like(x)
        weight = self.weights[order] if np.ndim(self.weights[order]) == 0 else self.weights[order][step]
        if weight and inside.any():
            grad, log_ratio = grad_log_density_ratio(self.ensemble, x, sigma, self.precision, self.class_labels,
                                                     self.log_ratio)  # fmt: skip
            bad = ~torch.isfinite(grad).flatten(1).all(1) & inside
            if bad.any():
                raise NotFinite("the guidance", bad)
            guidance = (weight * sigma**2 * inside)[:, None, None, None] * grad
            guidance = guidance if self.change is None else self.change(guidance, sigma)
            # Outside the window nothing is known of an image, which counts as "not in need" (as released).
            log_ratio = torch.where(inside, log_ratio, torch.inf)
        if order == 1:
            self.last_log_ratio, self.last_guidance = log_ratio, guidance
        return guidance


@dataclass
class Boosted:
    """Boosting around a guided denoiser (DG section 4.3): images in need, whose last log r was negative, get more.

    Before steps whose number is churn_phase modulo churn_period, s_churn and s_noise take the place of the sampler's;
    in steps of guide_phase modulo guide_period the predictor's guidance is multiplied by `factor`.
    `edm_sampler` takes it as the denoiser, and its `churn` as churn.
    """

    guided: GuidedDenoiser
    churn_period: int
    churn_phase: int
    guide_period: int
    guide_phase: int
    s_churn: float = 4.0
    s_noise: float = 1.0
    factor: float = 2.0

    def __call__(self, x, sigma, step, order):
        return self.guided.denoise(x, sigma, step, order) + self.guidance(x, sigma, step, order)

    def guidance(self, x, sigma, step, order):
        """What is added to the denoised image, as of `GuidedDenoiser`."""
        guidance = self.guided.guidance(x, sigma, step, order)
        if order == 1 and step % self.guide_period == self.guide_phase:
            in_need = (self.guided.last_log_ratio < 0)[:, None, None, None]
            guidance = self.guided.last_guidance = torch.where(in_need, self.factor * guidance, guidance)
        return guidance

    @property
    def last_guidance(self):
        """As of `GuidedDenoiser`, boosted."""
        return self.guided.last_guidance

    def churn(self, step: int, base: Churn) -> Churn:
        """S_churn and S_noise of each image, [N] both, where `base` is what they would be without boosting."""
        if self.guided.last_log_ratio is None or step % self.churn_period != self.churn_phase:
            return base
        in_need = self.guided.last_log_ratio < 0
        return torch.where(in_need, self.s_churn, base[0]), torch.where(in_need, self.s_noise, base[1])


# What puts boosting around a guided denoiser. "released": the authors' code; "paper": their text, every odd step.
BOOSTING = {
    "none": lambda guided: guided,
    "released": partial(Boosted, churn_period=5, churn_phase=0, guide_period=2, guide_phase=0),
    "paper": partial(Boosted, churn_period=2, churn_phase=1, guide_period=2, guide_phase=1),
}
