"""How alike the members of an ensemble are by noise level (notebook 06)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dgutils.discriminator import EVALUATION, Ensemble, perturb
from dgutils.guidance import grad_log_density_ratio
from dgutils.noise import keyed_rng, sigma_to_vp_time, vp_scale, vp_time_to_sigma
from dgutils.pipeline.jobs import Sampling, Trained, device
from dgutils.pipeline.store import Store

GRADIENTS_VERSION = 1  # raise it when the numbers of `member_gradients` change


@dataclass(frozen=True)
class MemberGradients:
    """Logits [M,L,N] of M members on N noised images at L noise levels, and the Gram matrices [L,N,M,M] of
    their gradients, <grad_x log r_a, grad_x log r_b>. Cosines and norms under every rule follow from these."""

    sigmas: np.ndarray
    logits: np.ndarray
    gram: np.ndarray

    @cached_property
    def norms(self) -> np.ndarray:
        """Norm [L,N,M] of each member's gradient."""
        return np.sqrt(np.einsum("lnaa->lna", self.gram))

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosine [L,N,M,M] between the gradients of two members at one image."""
        return self.gram / (self.norms[..., :, None] * self.norms[..., None, :])

    @cached_property
    def pairs(self) -> np.ndarray:
        """Cosine [L,N,P] of each of the P pairs of members."""
        return self.cosines[:, :, *np.triu_indices(len(self.logits), 1)]

    @cached_property
    def to_mean(self) -> np.ndarray:
        """Cosine [L,N,M] between a member's gradient and the mean of all, which is the mean logit's gradient."""
        return self.gram.mean(axis=-1) / (self.norms * self.mean_norm[..., None])

    @property
    def mean_norm(self) -> np.ndarray:
        """Norm [L,N] of the mean logit's gradient."""
        return np.sqrt(self.gram.mean(axis=(2, 3)))


def fault_gain(mean_logit) -> np.ndarray:
    """Derivative of log(m / (1 - m)) by the mean logit m, clipped to [1e-5, 1 - 1e-5]: 0, or 1/(m(1 - m)) >= 4."""
    m = np.asarray(mean_logit, np.float64)
    inside = (m > 1e-5) & (m < 1 - 1e-5)
    safe = np.where(inside, m, 0.5)
    return np.where(inside, 1 / (safe * (1 - safe)), 0.0)


def guided_sigmas(sampling: Sampling, window: tuple[float, float], levels: int) -> np.ndarray:
    """Noise levels [levels], evenly spaced in log sigma over what the sampler visits of a window of VP times."""
    low, high = vp_time_to_sigma(torch.tensor(window, dtype=torch.float64)).tolist()
    return np.geomspace(max(low, sampling.sigma_min), min(high, sampling.sigma_max), levels)


def gradient_gram(ensemble: Ensemble, images, sigmas, seed: int) -> MemberGradients:
    """MemberGradients of an ensemble's members on images uint8 [N,H,W,C], noised to each sigma, in float32."""
    members = [Ensemble(ensemble.extractor, [head], "mean_logit") for head in ensemble.heads]
    logits, gram = [], []
    for level, sigma in enumerate(np.asarray(sigmas, np.float64)):
        sigma = torch.full((len(images),), sigma, dtype=torch.float64)
        x_vp = perturb(images, sigma_to_vp_time(sigma), keyed_rng(seed, level, 0, EVALUATION))
        x, sigma = (x_vp / vp_scale(sigma)[:, None, None, None]).to(device()), sigma.to(device())
        grads, ratios = zip(*(grad_log_density_ratio(m, x, sigma) for m in members), strict=True)
        grads = torch.stack(grads).flatten(2)  # [M,N,CHW]
        logits.append(torch.stack(ratios).cpu().numpy())  # [M,N]
        gram.append(torch.einsum("and,bnd->nab", grads, grads).cpu().numpy())  # [N,M,M]
    return MemberGradients(np.asarray(sigmas, np.float64), np.stack(logits, axis=1), np.stack(gram))


def member_gradients(store: Store, trained: Trained, sigmas, num_images: int) -> MemberGradients:
    """`gradient_gram` of all members on at most num_images *generated* test images, found or computed.

    Generated, because that is where the sampler walks; of the test split, because no member knows them.
    """
    config = {"sigmas": [float(s) for s in sigmas], "num_images": num_images}
    artifact = store.artifact("gradients", GRADIENTS_VERSION, config, {"discriminators": trained.digest},
                              "members' gradients")  # fmt: skip

    def make(folder):
        images = trained.test_split.images[trained.test_split.labels == 0][:num_images]
        found = gradient_gram(trained.ensemble().to(device()), images, sigmas, trained.config.seed)
        np.save(folder / "logits.npy", found.logits)
        np.save(folder / "gram.npy", found.gram)

    path = artifact.ensure(make).path
    logits, gram = (np.load(path / f"{name}.npy", allow_pickle=False) for name in ("logits", "gram"))
    return MemberGradients(np.asarray(sigmas, np.float64), logits, gram)
