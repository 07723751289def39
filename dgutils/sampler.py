"""The Heun sampler of EDM. It asks a denoiser what the clean image is, and knows nothing of discriminators.

A denoiser here is any callable `denoise(x, sigma, step, order)`: x float64 [N, C, H, W], sigma float64 [N],
`step` the index i of the loop, `order` 1 for the Euler predictor and 2 for the Heun corrector. Baseline,
guided, ensemble and faulty variants are different callables.
"""

import math
from collections.abc import Callable

import torch

from .errors import UserError
from .noise import PerSampleNoise

Denoise = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def nfe(num_steps: int) -> int:
    """Network evaluations of `num_steps` Heun steps: two each but the last, which has no corrector."""
    return 2 * num_steps - 1


def network_denoiser(network, precision: str = "float32", class_labels=None) -> Denoise:
    """A trained `Denoiser` as the sampler's callable; its networks run in `precision`, sums in float64."""
    device = next(network.parameters()).device.type

    @torch.no_grad()
    def denoise(x, sigma, step, order):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return network(x, sigma, class_labels).double()

    return denoise


def edm_sampler(
    denoise: Denoise,
    noise: PerSampleNoise,
    sigmas: torch.Tensor,
    s_churn: float | Callable[[int], torch.Tensor] = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> torch.Tensor:
    """Images [N, C, H, W], float64, about [-1, 1]: EDM algorithm 2 (Karras et al. 2022).

    noise: one stream per image; sigmas: float64 [num_steps + 1] decreasing to 0 (`karras_sigmas`).
    s_churn: the churn of every step, or a function of the step that gives one value per image [N].
    Raises UserError, naming step, sigma and seeds, if an image stops being finite.
    """
    num_steps = len(sigmas) - 1
    seeds, device = noise.seeds, noise.device
    sigmas = sigmas.double().to(device)
    x = sigmas[0] * noise.draw(0)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        # Algorithm 2, lines 4-6: raise the noise level by gamma, adding noise to match.
        churn = s_churn(i) if callable(s_churn) else torch.full((len(seeds),), float(s_churn), device=device)
        inside = s_min <= sigma <= s_max
        gamma = (churn.double() / num_steps).clamp(max=math.sqrt(2) - 1) * inside  # [N]
        sigma_hat = sigma * (1 + gamma)  # [N]
        if gamma.any():
            added = (sigma_hat**2 - sigma**2).clamp(min=0).sqrt()
            x = x + added[:, None, None, None] * s_noise * noise.draw(i + 1)

        # Lines 7-8: an Euler step along d = (x - D) / sigma.
        slope = (x - denoise(x, sigma_hat, i, 1)) / sigma_hat[:, None, None, None]
        step_size = (sigma_next - sigma_hat)[:, None, None, None]
        x_next = x + step_size * slope

        # Lines 9-11: the trapezoidal correction.
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next.expand(len(seeds)), i, 2)) / sigma_next
            x_next = x + step_size * (slope + slope_next) / 2
        x = x_next
        if not torch.isfinite(x).all():
            bad = [seed for seed, image in zip(seeds, x, strict=True) if not torch.isfinite(image).all()]
            raise UserError(
                f"sampler: not finite after step {i} (sigma {sigma:.4g}) for seeds {bad[:5]}: "
                "lower the guidance weights, or check the networks' weights"
            )
    return x
