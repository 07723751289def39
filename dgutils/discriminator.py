"""Discriminators and their ensembles: the log-density-ratio log p_data / p_model at every noise level.

A discriminator is a shallow head on a frozen ADM extractor's features, trained to tell real from generated images
after both were noised: for balanced classes its logit is the log-density-ratio (Kim et al. 2023, section 3).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dgutils.errors import require
from dgutils.noise import EVALUATION, RESAMPLING, keyed_rng, vp_scale, vp_time_to_sigma, vp_to_cosine_time
from dgutils.sampler import autocast

# --- Combination rules: logits [M, N] of M members -> log-density-ratio [N] --------------------------------


def mean_probability(logits):
    """log(p / (1 - p)) of the mean p of the members' probabilities, for any finite logits (eq:mean-probability)."""
    return F.logsigmoid(logits).logsumexp(dim=0) - F.logsigmoid(-logits).logsumexp(dim=0)  # 1/M cancels


def mean_logit(logits):
    """Mean of the log-density-ratios: the geometric mean of the members' density ratios (eq:mean-logit)."""
    return logits.mean(dim=0)


def median_logit(logits):
    """Median of the log-density-ratios; of an even number, the mean of the middle two, gradient shared."""
    ordered = logits.sort(dim=0).values
    return (ordered[(len(logits) - 1) // 2] + ordered[len(logits) // 2]) / 2


def raw_logits_as_probabilities(logits):
    """The study's fault, kept to be measured: the clipped mean *logit* is taken for a probability (eq:fault).

    Zero gradient unless the mean logit lies in (0, 1), and 1 / (m (1 - m)) >= 4 times too large inside.
    """
    m = logits.mean(dim=0).clamp(1e-5, 1 - 1e-5)
    return torch.log(m / (1 - m))


RULES = {rule.__name__: rule for rule in (mean_probability, mean_logit, median_logit, raw_logits_as_probabilities)}


# --- Discriminators ----------------------------------------------------------------------------------------

# How networks that were trained on another noise schedule read the VP time.
CLOCKS = {"linear": lambda vp_time: vp_time, "cosine": vp_to_cosine_time}


class Ensemble(nn.Module):
    """Heads over one shared extractor, combined by a rule, on a clock of CLOCKS. Freezes all networks.

    rule: a name of RULES, or a function of your own of logits [M, N] and noise levels sigma [N].
    """

    def __init__(self, extractor, heads, rule, clock="linear"):
        super().__init__()
        require(callable(rule) or rule in RULES, f"unknown combination rule {rule!r}: choose one of {', '.join(RULES)}")
        require(heads, "an ensemble needs at least one discriminator head")
        require(clock in CLOCKS, f"unknown clock {clock!r}: choose one of {', '.join(CLOCKS)}")
        self.extractor, self.heads, self.clock = extractor, nn.ModuleList(heads), CLOCKS[clock]
        self.rule = rule if callable(rule) else lambda logits, sigma: RULES[rule](logits)
        self.eval().requires_grad_(False)

    @property
    def conditional(self) -> bool:
        """Whether the heads ask for class labels."""
        return hasattr(self.heads[0], "label_emb")

    def logits(self, x_vp, vp_time, class_labels=None):
        """Members' logits [M, N] at VP-scaled images x_vp [N, C, H, W] and VP time (scalar or [N]).

        class_labels: int64 [N], for class-conditional heads; the extractor knows no classes.
        """
        time = self.clock(torch.as_tensor(vp_time))
        features = self.extractor.features(x_vp, time)  # [N,F,h,w]
        logits = torch.stack([head(features, time, class_labels)[:, 0] for head in self.heads])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast leaves bfloat16

    def log_density_ratio(self, x_vp, vp_time, class_labels=None):
        """Combined log p_data / p_model [N], in nats; arguments as in `logits`."""
        sigma = vp_time_to_sigma(torch.as_tensor(vp_time, dtype=torch.float64)).expand(len(x_vp))
        return self.rule(self.logits(x_vp, vp_time, class_labels), sigma.to(x_vp.device))


@dataclass(frozen=True)
class MemberConfig:
    """How one discriminator is trained; min_time is the smallest VP time that it sees."""

    name: str
    learning_rate: float
    weight_decay: float
    epochs: int
    min_time: float = 1e-5


def perturb(images, vp_time, rng):
    """VP forward process, x_vp = x / sqrt(1 + sigma^2) + sigma / sqrt(1 + sigma^2) z at sigma(vp_time).

    images: uint8 [N, H, W, C], x in [-1, 1]; vp_time: float64 [N]; rng: NumPy generator of z. float32 [N, C, H, W].
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    z = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    sigma = vp_time_to_sigma(vp_time)[:, None, None, None]
    return vp_scale(sigma).float() * x + (sigma * vp_scale(sigma)).float() * z


def _bootstrap(labels, members, seed):
    """Each member has drawn as many images as there are, with replacement."""
    draws = [keyed_rng(seed, m, 0, RESAMPLING).integers(len(labels), size=len(labels)) for m in range(members)]
    return np.stack([np.bincount(drawn, minlength=len(labels)) for drawn in draws])


def _disjoint(labels, members, seed):
    """Each image is one member's, and every member has as many of each label, up to one."""
    rng, times = keyed_rng(seed, 0, 0, RESAMPLING), np.zeros((members, len(labels)), np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        times[np.arange(len(rows)) % members, rows] = 1
    return times


# How often each member sees each training image in an epoch: (labels [N], members M, seed) -> int64 [M, N].
RESAMPLINGS = {
    "none": lambda labels, members, seed: np.ones((members, len(labels)), np.int64),
    "bootstrap": _bootstrap,
    "disjoint": _disjoint,
}


@torch.no_grad()
def evaluate_logits(ensemble, images, vp_times, seed: int, batch_size: int, precision: str = "float32"):
    """Logits of held-out images uint8 [N, H, W, C] at the VP times [levels]: float32 [M, levels, N].

    The noise of a level is a function of (seed, its index).
    """
    device = next(ensemble.parameters()).device
    logits = np.empty((len(ensemble.heads), len(vp_times), len(images)), np.float32)
    for level, vp_time in enumerate(vp_times):
        rng = keyed_rng(seed, level, 0, EVALUATION)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            time = torch.full((len(images[rows]),), float(vp_time), dtype=torch.float64)
            x_vp = perturb(images[rows], time, rng).to(device)
            with autocast(device, precision):
                logits[:, level, rows] = ensemble.logits(x_vp, time).cpu().numpy()
    return logits
