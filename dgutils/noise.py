"""Noise levels, diffusion times and random draws, all in float64.

Two clocks describe the same noise. EDM measures it by `sigma`, the standard deviation added to clean data
(Karras et al. 2022); the discriminator was built for the variance-preserving (VP) process and measures it by
`vp_time`, tau in [0, 1] (Song et al. 2021, beta_min 0.1, beta_max 20).
"""

import math

import numpy as np
import torch

from dgutils.errors import require

BETA_MIN, BETA_MAX = 0.1, 20.0

# Third word of `keyed_rng`'s key: the use that a stream of random numbers serves; the sampler's is 0.
TRAINING, INITIALISATION, VALIDATION, EVALUATION, RESAMPLING, LIKELIHOOD, REJECTION = 1, 2, 3, 4, 5, 6, 7


def karras_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
    """Noise levels of the sampler, EDM eq. 5: `num_steps` >= 2 decreasing values, then 0. Float64 [num_steps + 1]."""
    require(num_steps >= 2 and 0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf,
            f"karras_sigmas: num_steps={num_steps}, sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: "
            "needs num_steps >= 2, finite 0 < sigma_min < sigma_max and rho > 0")
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    lowest, highest = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (highest + ramp * (lowest - highest)) ** rho
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def sigma_to_vp_time(sigma: torch.Tensor) -> torch.Tensor:
    """VP time tau of the noise level `sigma` (DG appendix; report, eq:vp). Same shape; dtype kept.

    It solves log(1 + sigma^2) = b0 tau + (b1 - b0) tau^2 / 2, the integral of beta.
    """
    slope = BETA_MAX - BETA_MIN
    return (-BETA_MIN + (BETA_MIN**2 + 2 * slope * torch.log1p(sigma**2)) ** 0.5) / slope


def vp_time_to_sigma(vp_time: torch.Tensor) -> torch.Tensor:
    """The inverse of `sigma_to_vp_time`: sigma = sqrt(exp(integral of beta) - 1)."""
    return torch.expm1(BETA_MIN * vp_time + 0.5 * (BETA_MAX - BETA_MIN) * vp_time**2).sqrt()


def vp_sigmas(num_steps: int) -> torch.Tensor:
    """Noise levels at the VP times 1, 1 - 1/N, ..., 1/N, then 0: DDPM's N >= 1 steps. Float64 [num_steps + 1]."""
    require(num_steps >= 1, f"vp_sigmas: num_steps={num_steps}: needs at least 1")
    return vp_time_to_sigma(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))


def vp_to_cosine_time(vp_time: torch.Tensor) -> torch.Tensor:
    """The time at which the cosine schedule (Nichol & Dhariwal 2021, eq. 17, s = 0.008) is as noisy as VP at vp_time.

    The published 64 x 64 extractor was trained on that schedule.
    """
    s = 0.008
    mean = vp_scale(vp_time_to_sigma(vp_time))  # sqrt of alpha-bar
    return (1 + s) * 2 / math.pi * torch.arccos(mean * math.cos(s / (1 + s) * math.pi / 2)) - s


def vp_scale(sigma: torch.Tensor) -> torch.Tensor:
    """Mean scale of the VP process at noise level `sigma`: x_vp = x / sqrt(1 + sigma^2) (report, eq:vp)."""
    return (1 + sigma**2).rsqrt()


def sample_vp_time(u: torch.Tensor, t_min: float = 1e-5) -> torch.Tensor:
    """Diffusion times for training a discriminator, by inverse CDF of uniforms `u` in [0, 1).

    DG draws tau on [t_min, 1] with density proportional to g^2 / sigma_VP^2, whose antiderivative is
    log(expm1(B(t))), B the integral of beta: this is log-uniform in sigma.
    """
    low, high = vp_time_to_sigma(torch.tensor([t_min, 1.0], dtype=torch.float64)).log()
    return sigma_to_vp_time((low + u.double() * (high - low)).exp())


def keyed_rng(seed: int, *key: int) -> np.random.Generator:
    """A random generator that is a pure function of (seed, *key): counter-based Philox, up to three keys."""
    counter = [0, *key, *[0] * (3 - len(key))]  # word 0 counts the draws, the others hold the key
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def class_labels(seeds, num_classes: int) -> torch.Tensor:
    """A uniform class for each image, int64 [N], a function of its seed alone."""
    draws = [keyed_rng(int(seed), 0, 1).integers(num_classes) for seed in seeds]
    return torch.tensor(draws, dtype=torch.int64)


class PerSampleNoise:
    """Standard normal noise, one stream per image, each draw a function of (seed, step) alone.

    A set of images is thus the same whatever the batch size, the device or the number of processes.
    seeds: one integer >= 0 per image; shape: (C, H, W) of one image.
    """

    def __init__(self, seeds, shape, device="cpu"):
        self.seeds, self.shape, self.device = [int(s) for s in seeds], tuple(shape), device
        require(min(self.seeds, default=-1) >= 0, "PerSampleNoise: needs at least one seed, each >= 0")

    def draw(self, step: int, attempt: int = 0, rows=None) -> torch.Tensor:
        """Float64 [N, C, H, W]. Step 0 is the latent; step i + 1 is the noise that churn adds at step i.

        attempt: of an image that was rejected, other noise each time. rows: of these images alone.
        """
        key = (step, attempt, REJECTION) if attempt else (step,)
        seeds = self.seeds if rows is None else [self.seeds[row] for row in rows]
        draws = [keyed_rng(seed, *key).standard_normal(self.shape) for seed in seeds]
        return torch.from_numpy(np.stack(draws)).to(self.device)

    def uniform(self, step: int, attempt: int, rows) -> torch.Tensor:
        """Float64 in [0, 1), one for each of these images: the coin of a step >= 1, which has no other draw."""
        draws = [keyed_rng(self.seeds[row], step, attempt, REJECTION).random() for row in rows]
        return torch.tensor(draws, dtype=torch.float64, device=self.device)
