"""Discriminator guidance (Kim et al. 2023): a denoiser corrected by the gradient of a log-density-ratio.

With log r = log p_data / p_model, the score of the data is the model's score plus grad log r (DG eq. 8), and
by D = x + sigma^2 score that is one line on denoisers:  D_guided = D + w sigma^2 grad_x log r(x, sigma).
"""

import math

import torch

from dgutils.errors import UserError
from dgutils.noise import sigma_to_vp_time, vp_scale
from dgutils.sampler import Churn, Denoise, NotFinite, autocast

# Boosting (DG section 4.3): (period, phase) of the steps with extra noise, and of those with doubled guidance.
# "released" is the authors' code; "paper" is their text, every odd denoising step for both.
BOOSTING = {"none": None, "released": ((5, 0), (2, 0)), "paper": ((2, 1), (2, 1))}
BOOST_CHURN, BOOST_NOISE, BOOST_FACTOR = 4.0, 1.0, 2.0

# What is differentiated. "clipped": the authors clip the probability to [1e-5, 1 - 1e-5] before the log-odds, which
# in the logit is a clamp: no gradient, hence no guidance, where the discriminator is surer than that.
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


def check_settings(weight_1st_order, weight_2nd_order, time_min, time_max, boosting, log_ratio):
    """Raises UserError unless these settings of `GuidedDenoiser` are known names and possible numbers."""
    if log_ratio not in LOG_RATIOS:
        raise UserError(f"unknown log_ratio '{log_ratio}'; choose one of {', '.join(LOG_RATIOS)}")
    if boosting not in BOOSTING:
        raise UserError(f"unknown boosting '{boosting}'; choose one of {', '.join(BOOSTING)}")
    if not 0 <= time_min <= time_max <= 1:
        raise UserError(f"guidance window [{time_min}, {time_max}]: needs 0 <= time_min <= time_max <= 1")
    if not (0 <= weight_1st_order < math.inf and 0 <= weight_2nd_order < math.inf):
        raise UserError(f"guidance weights {weight_1st_order}, {weight_2nd_order} must be finite, not negative")


class GuidedDenoiser:
    """A denoiser with discriminator guidance (report, eq:guided), for `edm_sampler`; use its `churn` too when boosting.

    denoise: the unguided denoiser; ensemble: has log_density_ratio(x_vp, vp_time), and class labels as a third
    argument if class_labels, int64 [N], are given. weight_1st_order acts on the Euler predictor, weight_2nd_order on
    the Heun corrector.
    time_min, time_max: VP times outside of which there is no guidance, image by image (the authors' code asks the
    batch's least time, which differs only while boosting). boosting: a name of `BOOSTING`.
    log_ratio: a name of `LOG_RATIOS`. Raises UserError for unknown names and bad windows.
    `last_log_ratio` [N] and `last_guidance` [N, C, H, W] keep the newest predictor's values for inspection.
    """

    def __init__(self, denoise: Denoise, ensemble, weight_1st_order=2.0, weight_2nd_order=0.0,
                 time_min=0.01, time_max=1.0, boosting="none", precision="float32", log_ratio="logit",
                 class_labels=None):  # fmt: skip
        check_settings(weight_1st_order, weight_2nd_order, time_min, time_max, boosting, log_ratio)
        self.denoise, self.ensemble, self.precision = denoise, ensemble, precision
        self.weights = {1: weight_1st_order, 2: weight_2nd_order}
        self.time_min, self.time_max, self.boosting = time_min, time_max, BOOSTING[boosting]
        self.log_ratio, self.class_labels = log_ratio, class_labels
        self.last_log_ratio = self.last_guidance = None

    def __call__(self, x, sigma, step, order):
        return self.denoise(x, sigma, step, order) + self.guidance(x, sigma, step, order)

    def guidance(self, x, sigma, step, order):
        """w sigma^2 grad log r, [N, C, H, W]: what guidance adds to the denoised image. Zero outside the window."""
        vp_time = sigma_to_vp_time(sigma)
        inside = (vp_time >= self.time_min) & (vp_time <= self.time_max)
        if not self.weights[order] or not inside.any():
            if order == 1:
                self.last_log_ratio, self.last_guidance = None, torch.zeros_like(x)
            return torch.zeros_like(x)
        grad, log_ratio = grad_log_density_ratio(self.ensemble, x, sigma, self.precision, self.class_labels,
                                                 self.log_ratio)  # fmt: skip
        bad = ~torch.isfinite(grad).flatten(1).all(1) & inside
        if bad.any():
            raise NotFinite("the guidance", bad)
        factor = self.weights[order] * sigma**2 * inside
        if order == 1:
            # Outside the window nothing is known of a sample, which counts as "not in need" (as released).
            log_ratio = torch.where(inside, log_ratio, torch.inf)
            if self.boosting and step % self.boosting[1][0] == self.boosting[1][1]:
                factor = torch.where(log_ratio < 0, BOOST_FACTOR * factor, factor)
        guidance = factor[:, None, None, None] * grad
        if order == 1:
            self.last_log_ratio, self.last_guidance = log_ratio, guidance
        return guidance

    def churn(self, step: int, base: Churn) -> Churn:
        """Boosting's churn for `edm_sampler`: on boosted steps, its own where the previous log r was negative."""
        if self.boosting is None or self.last_log_ratio is None or step % self.boosting[0][0] != self.boosting[0][1]:
            return base
        in_need = self.last_log_ratio < 0
        return tuple(torch.where(in_need, boosted, usual)
                     for boosted, usual in zip((BOOST_CHURN, BOOST_NOISE), base, strict=True))  # fmt: skip
