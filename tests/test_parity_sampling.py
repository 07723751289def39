"""Our sampler and guidance against the reference's: same networks, same noise, float64 (tests/fixtures/parity.py)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dgutils.discriminator import Ensemble
from dgutils.guidance import BOOSTING, GuidedDenoiser
from dgutils.networks import edm
from dgutils.noise import PerSampleNoise, karras_sigmas, sample_vp_time, sigma_to_vp_time, vp_to_cosine_time
from dgutils.sampler import edm_sampler, network_denoiser

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import parity  # noqa: E402

REFERENCE = np.load(FIXTURES / "sampling.npz", allow_pickle=False)
TOLERANCE = 1e-10  # of the largest value; docs/parity.md has what is reached
TIMES_TOLERANCE = 1e-6  # of each time: 1 - exp(-t) loses digits at small t


class Discriminator:
    """The stand-in of parity.py with an ensemble's interface."""

    def __init__(self, gain=1.0):
        self.gain = gain

    def log_density_ratio(self, x_vp, vp_time, class_labels=None):
        return parity.logit(x_vp, vp_time, class_labels, self.gain)


class Stage(torch.nn.Module):
    """Extractor and head of that stand-in in one: the features of an image are its pixels."""

    features = staticmethod(lambda x_vp, vp_time: x_vp)

    def forward(self, features, vp_time, class_labels):
        return parity.logit(features, vp_time, class_labels)[:, None]


def relative_error(ours: torch.Tensor, name: str) -> float:
    theirs = REFERENCE[name]
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", parity.TRAJECTORIES)
def test_trajectories(name, record_property):
    case = parity.TRAJECTORIES[name]
    network = edm.Denoiser(**parity.EDM[case["network"]]).eval().requires_grad_(False)
    parity.fill(network)
    labels = torch.tensor(parity.CLASSES) if network.label_dim else None
    one_hot = None if labels is None else torch.eye(network.label_dim, dtype=torch.float64)[labels]
    denoise, churn = network_denoiser(network, "float32", one_hot), None  # "float32": no autocast
    if case["first"] or case["second"]:
        denoise = GuidedDenoiser(denoise, Discriminator(case["gain"]), case["first"], case["second"],
                                 class_labels=labels, log_ratio="clipped")  # fmt: skip
        denoise = BOOSTING[case["boosting"]](denoise)
        churn = denoise.churn
    noise, options = PerSampleNoise(parity.SEEDS, (3, 16, 16)), {k.lower(): v for k, v in case["options"].items()}
    schedule = {name: options.pop(name) for name in ("sigma_min", "sigma_max", "rho") if name in options}
    images = edm_sampler(denoise, noise, karras_sigmas(case["steps"], **schedule), churn=churn, **options)
    error = relative_error(images, name)
    record_property("relative_error", float(error))  # plain: it goes to another process
    assert error < TOLERANCE


def test_the_cases_differ():
    """Guidance, boosting, churn and the sampler's options change the images by far more than the tolerance."""
    for steps in (18, 35):
        sets = [REFERENCE[f"{name}_{steps}"] for name in ("unguided", "first", "both", "boosting_released",
                                                          "boosting_paper", "churn", "options")]  # fmt: skip
        for i, a in enumerate(sets):
            assert all(np.abs(a - b).max() > 1e-3 for b in sets[:i])


def test_clipping_is_met():
    """In the clipped case some samples lie beyond the clip, so that it and the plain logit guide differently."""
    case = parity.TRAJECTORIES["clipped_18"]
    network = edm.Denoiser(**parity.EDM[case["network"]]).eval().requires_grad_(False)
    parity.fill(network)
    plain = GuidedDenoiser(network_denoiser(network), Discriminator(case["gain"]), case["first"], 0.0)
    images = edm_sampler(plain, PerSampleNoise(parity.SEEDS, (3, 16, 16)), karras_sigmas(18))
    assert relative_error(images, "clipped_18") > 1e-3


@pytest.mark.parametrize("clock", ["linear", "cosine"])
def test_guidance_term(clock, record_property):
    """Without weight: sigma^2 grad log r, which the reference returns with the other sign (its slope is -score).

    At 64 x 64 the reference translates the time for its networks: the cosine clock of an `Ensemble`.
    """
    sigma, suffix = torch.tensor(parity.LEVELS, dtype=torch.float64), "" if clock == "linear" else f"_{clock}"
    x = parity.draw("guidance", (len(sigma), 3, 16, 16)) * sigma[:, None, None, None]
    ensemble = Ensemble(Stage(), [Stage()], "mean_logit", clock)
    guided = GuidedDenoiser(None, ensemble, 1.0, log_ratio="clipped")
    error = relative_error(-guided.guidance(x, sigma, 0, 1), f"guidance{suffix}")
    record_property("relative_error", float(error))  # plain: it goes to another process
    assert error < TOLERANCE
    assert relative_error(guided.last_log_ratio, f"log_ratio{suffix}") < TOLERANCE
    other = REFERENCE["guidance_cosine" if clock == "linear" else "guidance"]
    assert np.abs(REFERENCE[f"guidance{suffix}"] - other).max() > 1e-3


def test_times(record_property):
    sigma, uniforms = torch.tensor(parity.LEVELS, dtype=torch.float64), torch.tensor(parity.UNIFORMS)
    errors = [relative_error(sigma_to_vp_time(sigma), "tau"),
              relative_error(vp_to_cosine_time(sigma_to_vp_time(sigma)), "cosine")]  # fmt: skip
    for t_min in (1e-5, 1e-2):
        ours = sample_vp_time(uniforms.double(), t_min).numpy()
        errors.append(np.abs(ours / REFERENCE[f"times_{t_min:g}"] - 1).max())
    record_property("relative_error", float(max(errors)))
    assert max(errors) < TIMES_TOLERANCE
    # The released code works in float32, where 1 - exp(-1e-6) keeps five digits or fewer.
    released = np.abs(REFERENCE["times_1e-05_float32"] / REFERENCE["times_1e-05"] - 1).max()
    assert 1e-3 < released < 0.1
