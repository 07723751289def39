"""The samplers: EDM's Heun and DDPM's ancestral. They ask a denoiser for the clean image, and know no discriminator.

A denoiser here is any callable `denoise(x, sigma, step, order)`: x float64 [N, C, H, W], sigma float64 [N],
`step` the index i of the loop, `order` 1 for the Euler predictor and 2 for the Heun corrector.
"""

import copy
import math
from collections.abc import Callable

import torch

from dgutils.errors import UserError, require
from dgutils.noise import PerSampleNoise, karras_sigmas, vp_scale

Churn = tuple[torch.Tensor, torch.Tensor]  # of each image: S_churn [N] and S_noise [N]
Denoise = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def nfe(num_steps: int) -> int:
    """Network evaluations of `num_steps` Heun steps: two each but the last, which has no corrector."""
    return 2 * num_steps - 1


def autocast(device, precision: str):
    """Context in which networks run in `precision`, "float32" or "bfloat16" (mixed). Raises UserError for others."""
    require(precision in ("float32", "bfloat16"), f"unknown precision {precision!r}: choose float32 or bfloat16")
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def network_denoiser(network, precision: str = "float32", class_labels=None) -> Denoise:
    """A trained `Denoiser` as the sampler's callable; its networks run in `precision`, sums in float64.

    A batch with an image at one of the network's `float32_levels` runs in float32. Raises UserError as `autocast`.
    """
    device = next(network.parameters()).device
    autocast(device, precision)
    low, high = network.float32_levels

    @torch.no_grad()
    def denoise(x, sigma, step, order):
        exact = low < high and bool(((low <= sigma) & (sigma <= high)).any())
        with autocast(device, "float32" if exact else precision):
            return network(x, sigma, class_labels).double()

    return denoise


class EpsilonDenoiser:
    """A DDPM network eps(x_vp, t), t int64 [N], with its alphas-bar [T], as a denoiser: D(x, sigma) = x - sigma eps.

    Step t has noise level sqrt(1 / alpha-bar - 1); between two, the nearer one's is taken (see `fitted_sigmas`).
    """

    def __init__(self, network, alphas_bar):
        alphas = torch.as_tensor(alphas_bar).double()
        require(alphas.ndim == 1 and 1 > alphas[0] and (alphas.diff() < 0).all() and alphas[-1] > 0,
                "alphas_bar must fall from below 1 to above 0, one a step: a DDPM's alphas_cumprod")
        self.network, self.levels = network, (1 / alphas - 1).sqrt()
        self.sigma_min, self.sigma_max = self.levels[0].item(), self.levels[-1].item()

    def _step(self, sigma):
        return (sigma.log()[:, None] - self.levels.to(sigma.device).log()).abs().argmin(1)

    def round_sigma(self, sigma):
        return self.levels.to(sigma.device)[self._step(sigma)]

    @torch.no_grad()
    def __call__(self, x, sigma, step, order):
        level = sigma[:, None, None, None]
        eps = self.network((x * vp_scale(level)).float(), self._step(sigma))
        return x - level * getattr(eps, "sample", eps)[:, : x.shape[1]]  # diffusers wraps it; variances may follow


def extrapolated_denoiser(better: Denoise, worse: Denoise, weight: float) -> Denoise:
    """Away from a worse denoiser: D_worse + w (D - D_worse) = D + (w - 1) (D - D_worse).

    Classifier-free guidance, where the worse one knows no classes (Ho & Salimans 2021, eq. 6, whose weight is w - 1);
    autoguidance, where it is an earlier or smaller network (Karras et al. 2024); SIMS, where it is a copy that was
    trained on the network's own images (Alemohammad et al. 2024).
    """

    def denoise(x, sigma, step, order):
        without = worse(x, sigma, step, order)
        return without + weight * (better(x, sigma, step, order) - without)

    return denoise


def extrapolated_weights(network, worse, weight: float):
    """A copy of the network whose parameters are theta - w (theta_worse - theta): Neon (Alemohammad et al. 2025)."""
    found = copy.deepcopy(network)
    with torch.no_grad():
        for ours, its in zip(found.parameters(), worse.parameters(), strict=True):
            ours.lerp_(its.to(ours), -weight)
    return found


def fitted_sigmas(network, num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> torch.Tensor:
    """`karras_sigmas` between the noise levels that `network` knows, on its grid of them; the final 0 stays."""
    ramp = karras_sigmas(num_steps, max(sigma_min, network.sigma_min), min(sigma_max, network.sigma_max), rho)
    return torch.cat([network.round_sigma(ramp[:-1]), ramp[-1:]])


class NotFinite(Exception):
    """For denoisers to raise: what is not finite, and for which images, a mask [N]. The sampler adds whose they are."""


def _ask(denoise: Denoise, x, sigma, step: int, order: int, seeds):
    """The denoised images. Raises UserError, naming step, noise level and seeds, if they are not finite."""
    try:
        denoised = denoise(x, sigma, step, order)
        finite = torch.isfinite(denoised).flatten(1).all(1)
        if finite.all():
            return denoised
        what, mask = "the denoised image", ~finite
    except NotFinite as error:
        what, mask = error.args
    bad = [seed for seed, is_bad in zip(seeds, mask.tolist(), strict=True) if is_bad]
    raise UserError(f"sampler: {what} is not finite at step {step} (sigma {sigma.max():.4g}) for seeds "
                    f"{bad[:5]}: lower the guidance weights, or check the networks' weights")


def edm_sampler(denoise: Denoise, noise: PerSampleNoise, sigmas: torch.Tensor, s_churn: float = 0.0,
                s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0,
                churn: Callable[[int, Churn], Churn] | None = None,
                round_sigma: Callable[[torch.Tensor], torch.Tensor] = lambda sigma: sigma) -> torch.Tensor:
    """Images [N, C, H, W], float64, about [-1, 1]: EDM algorithm 2 (Karras et al. 2022; report, eq:denoiser).

    noise: one stream per image; sigmas: float64 [num_steps + 1] decreasing to 0 (`karras_sigmas`).
    s_churn, s_noise inside [s_min, s_max]: the base churn. churn(step, (S_churn [N], S_noise [N])): what replaces
    it, image by image. round_sigma: to the noise levels that the network knows.
    Raises UserError, naming step, sigma and seeds, if an image stops being finite.
    """
    num_steps = len(sigmas) - 1
    seeds, device = noise.seeds, noise.device
    sigmas = sigmas.double().to(device)
    base = tuple(sigmas.new_full((len(seeds),), value) for value in (s_churn, s_noise))
    x = sigmas[0] * noise.draw(0)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        # Algorithm 2, lines 4-6: raise the noise level by gamma, adding noise to match.
        churn_i, noise_i = (value.double() for value in (churn(i, base) if churn else base))  # [N] each
        inside = s_min <= sigma <= s_max
        gamma = (churn_i / num_steps).clamp(max=math.sqrt(2) - 1) * inside  # [N]
        sigma_hat = round_sigma(sigma * (1 + gamma))  # [N]
        if gamma.any():
            added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt() * noise_i
            x = x + added[:, None, None, None] * noise.draw(i + 1)

        x = _heun_step(denoise, x, sigma_hat, sigma_next, i, seeds)
    return x


def _heun_step(denoise: Denoise, x, sigma, sigma_next, step: int, seeds):
    """Algorithm 2, lines 7-11: from the noise levels sigma [N] to sigma_next, a number."""
    # Lines 7-8: an Euler step along d = (x - D) / sigma.
    slope = (x - _ask(denoise, x, sigma, step, 1, seeds)) / sigma[:, None, None, None]
    step_size = (sigma_next - sigma)[:, None, None, None]
    x_next = x + step_size * slope

    # Lines 9-11: the trapezoidal correction.
    if sigma_next > 0:
        slope_next = (x_next - _ask(denoise, x_next, sigma_next.expand(len(seeds)), step, 2, seeds)) / sigma_next
        x_next = x + step_size * (slope + slope_next) / 2
    return x_next


def rejection_sampler(denoise: Denoise, log_ratio: Callable, noise: PerSampleNoise, sigmas: torch.Tensor, bounds,
                      attempts: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as of `edm_sampler`, and how often each asked denoise and log_ratio, [N, 2]: DiffRS (Na et al. 2024).

    A step from x to x' is accepted with probability min(1, r(x') / (r(x) e^bound)), r = p_data / p_model at either
    level. Over a trajectory the ratios telescope: what is accepted at every step, unclipped, has the law of the data.
    Heun's step adds no noise that could be drawn again, so a rejected image begins anew; its last attempt is taken.
    log_ratio(x, sigma): log r in nats, [N]. bounds: one for each step but the last; -inf: always accepted.
    The draws are functions of (seed, step, attempt); the first attempt's latents are those of `edm_sampler`.
    """
    sigmas, calls = sigmas.double().to(noise.device), torch.zeros(len(noise.seeds), 2, dtype=torch.int64)
    images, left = torch.zeros_like(noise.draw(0)), torch.arange(len(noise.seeds))
    for attempt in range(attempts):
        rows, rejected = left, []
        x = sigmas[0] * noise.draw(0, attempt, rows)
        before = log_ratio(x, sigmas[0].expand(len(rows)))
        calls[rows] += torch.tensor([0, 1])
        for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            x = _heun_step(denoise, x, sigma.expand(len(rows)), sigma_next, i, [noise.seeds[row] for row in rows])
            calls[rows] += torch.tensor([2, 1] if sigma_next > 0 else [1, 0])
            if sigma_next == 0:
                break
            after = log_ratio(x, sigma_next.expand(len(rows)))
            accepted = noise.uniform(i + 1, attempt, rows).log() < after - before - bounds[i]
            accepted |= attempt == attempts - 1
            rejected.append(rows[~accepted.cpu()])
            x, before, rows = x[accepted], after[accepted], rows[accepted.cpu()]
            if len(rows) == 0:
                break
        images[rows] = x
        left = torch.cat([*rejected, left[:0]]).sort().values
        if len(left) == 0:
            break
    return images, calls


def ancestral_sampler(denoise: Denoise, noise: PerSampleNoise, sigmas: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W], float64: DDPM's sampler (Ho et al. 2020, algorithm 2), posterior variance beta-tilde.

    In EDM's scaling, x = x_vp / sqrt(alpha-bar), a step from s to s' draws from q(x' | x, x_0 = D(x; s)):
    x' = D + (s'/s)^2 (x - D) + s' sqrt(1 - (s'/s)^2) z. sigmas, errors: as of `edm_sampler` (`vp_sigmas`).
    """
    seeds, sigmas = noise.seeds, sigmas.double().to(noise.device)
    x = (1 + sigmas[0] ** 2).sqrt() * noise.draw(0)  # its variance at the VP scale is one
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        denoised = _ask(denoise, x, sigma.expand(len(seeds)), i, 1, seeds)
        kept = (sigma_next / sigma) ** 2
        x = denoised + kept * (x - denoised)
        if sigma_next > 0:
            x = x + sigma_next * (1 - kept).sqrt() * noise.draw(i + 1)
    return x
