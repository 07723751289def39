"""A world in two dimensions where every answer is known: Gaussian mixtures under Gaussian noise.

A mixture noised at any level is a mixture again, so its density, its score and its denoiser are exact, and so is the
log-density-ratio of two, which a perfect discriminator would say. Points are images [2, 1, 1], in float64, so that
the study's own sampler and guidance run on them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dgutils.discriminator import RULES
from dgutils.noise import PerSampleNoise, karras_sigmas, keyed_rng, vp_scale, vp_time_to_sigma
from dgutils.sampler import edm_sampler


@dataclass(frozen=True)
class Mixture:
    """sum_k weight_k N(mean_k, std_k^2 I): weights [K], means [K, 2], stds [K]."""

    weights: tuple
    means: tuple
    stds: tuple

    def _components(self, x, sigma):
        """Log of weight_k times the noised component's density, [N, K], offsets x - mean_k [N, K, 2] and variances."""
        means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds, self.weights))
        variance = stds**2 + sigma[:, None] ** 2  # noise adds to every component's
        offset = x.flatten(1)[:, None] - means
        log_parts = weights.log() - offset.square().sum(2) / (2 * variance) - torch.log(2 * math.pi * variance)
        return log_parts, offset, variance

    def log_density(self, x, sigma):
        """log p(x; sigma) in nats, [N], at points x [N, 2, 1, 1] and noise levels sigma [N]."""
        return self._components(x, sigma)[0].logsumexp(1)

    # Tweedie: D = x + sigma^2 score, the score being the responsibility-weighted -(x - mean_k) / variance_k
    def denoise(self, x, sigma, step=0, order=1):
        """The exact denoiser E[clean | x], as `edm_sampler` calls it."""
        log_parts, offset, variance = self._components(x, sigma)
        score = -(log_parts.softmax(1) / variance)[:, :, None] * offset  # [N, K, 2]
        return x + (sigma**2)[:, None, None, None] * score.sum(1)[:, :, None, None]

    def sample(self, n: int, seed: int) -> np.ndarray:
        """n clean points [n, 2]."""
        rng = keyed_rng(seed)
        which = rng.choice(len(self.weights), n, p=self.weights)
        return np.array(self.means)[which] + np.array(self.stds)[which, None] * rng.standard_normal((n, 2))


class ExactDiscriminator:
    """The perfect discriminator of `data` against `model`, in the place of an Ensemble in `GuidedDenoiser`.

    rule: one of `discriminator.RULES` for its one logit; only "raw_logits_as_probabilities", the fault, changes it.
    """

    def __init__(self, data: Mixture, model: Mixture, rule: str = "mean_logit"):
        self.data, self.model, self.rule = data, model, rule

    def log_density_ratio(self, x_vp, vp_time):
        """log p_data / p_model [N] of the noised laws; both densities change alike under the VP scaling."""
        sigma = vp_time_to_sigma(vp_time)
        x = x_vp / vp_scale(sigma)[:, None, None, None]
        return RULES[self.rule]((self.data.log_density(x, sigma) - self.model.log_density(x, sigma))[None])


# The study's toy: the data is four garments of unequal frequency; the model gets weights, places and widths wrong.
DATA = Mixture((0.4, 0.3, 0.2, 0.1), ((0.6, 0.6), (-0.6, 0.5), (-0.5, -0.6), (0.6, -0.5)), (0.12, 0.15, 0.12, 0.1))
MODEL = Mixture((0.2, 0.2, 0.3, 0.3), ((0.5, 0.7), (-0.5, 0.4), (-0.6, -0.4), (0.5, -0.4)), (0.2, 0.2, 0.16, 0.18))


def sample(denoise, n: int, num_steps: int, first_seed: int = 0) -> np.ndarray:
    """Points [n, 2] of seeds first_seed ... first_seed + n - 1, by EDM's sampler and schedule; boosting churns."""
    noise, churn = PerSampleNoise(range(first_seed, first_seed + n), (2, 1, 1)), getattr(denoise, "churn", None)
    return edm_sampler(denoise, noise, karras_sigmas(num_steps), churn=churn).flatten(1).numpy()


class EnergyReference:
    """The reference side of energy distances (Székely & Rizzo 2013): 2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased.

    Zero in expectation if and only if the laws are equal. A statistic for `metrics.resample`.
    """

    def __init__(self, points):
        self.points = torch.as_tensor(points)  # [M, 2]
        self.within = float(torch.pdist(self.points).mean())

    def __call__(self, points) -> float:
        return float(self.bootstrap_distances(points, [np.arange(len(points))])[0])

    def bootstrap_distances(self, points, indices) -> np.ndarray:
        """The distance of every resample points[i], i a row of indices [R, n]; pairs of copies are left out."""
        x = torch.as_tensor(points)  # [n, 2]
        across, among = torch.cdist(x, self.points).mean(1).numpy(), torch.cdist(x, x).numpy()
        out = np.empty(len(indices))
        for row, index in enumerate(indices):
            count = np.bincount(index, minlength=len(x)).astype(np.float64)  # [n]
            within = count @ among @ count / (count.sum() ** 2 - count @ count)
            out[row] = 2 * (count @ across) / count.sum() - within - self.within
        return out
