"""Our networks against the reference's, same weights, same inputs, in float64 (tests/fixtures/parity.py)."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dgutils.networks import adm, edm
from dgutils.networks.weights import registry

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import parity  # noqa: E402

REFERENCE = np.load(FIXTURES / "networks.npz", allow_pickle=False)
TOLERANCE = 1e-10  # of the largest output; docs/parity.md has what is reached


def relative_error(ours: torch.Tensor, name: str) -> float:
    """Largest absolute error over the largest absolute output."""
    theirs = REFERENCE[name]
    return float(np.abs(ours.numpy() - theirs).max() / np.abs(theirs).max())


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", parity.EDM)
def test_denoisers(name, channels_last, record_property):
    config = parity.EDM[name]
    network = edm.Denoiser(**config).eval()
    parity.fill(network)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    size = config["img_resolution"]
    x = parity.draw(f"{name}.x", (len(parity.SIGMAS), 3, size, size))
    labels = torch.eye(10, dtype=torch.float64)[[1, 4, 9]] if config.get("label_dim") else None
    error = relative_error(network(x, torch.tensor(parity.SIGMAS, dtype=torch.float64), labels), f"edm.{name}")
    record_property("relative_error", float(error))  # plain: it goes to another process
    assert error < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", parity.ADM)
def test_encoders(name, record_property):
    network = adm.EncoderUNet(model_channels=128, **parity.ADM[name]).eval()
    parity.fill(network)
    config = network.config
    x = parity.draw(f"{name}.x", (2, config["in_channels"], config["image_size"], config["image_size"]))
    labels = torch.tensor(parity.LABELS) if config["num_classes"] else None
    times = torch.tensor(parity.TIMES, dtype=torch.float64)
    features = network.features(x, times, labels)
    errors = [relative_error(network.out(features), f"adm.{name}")]
    if name.startswith("extractor"):
        errors.append(relative_error(features[:, ::8], f"adm.{name}.features"))
    record_property("relative_error", float(max(errors)))
    assert max(errors) < TOLERANCE


# Counted in the reference's own networks: parameters, and the start of the sha256 of the sorted "name shape" lines of
# the state dict.
PUBLISHED = {
    "edm-cifar10-32x32-uncond-vp": (55_733_891, "1c5f38fd273af62a"),
    "edm-cifar10-32x32-cond-vp": (55_735_299, "740b096010232034"),
    "edm-cifar10-uncond-vp-ddo": (55_733_891, "1c5f38fd273af62a"),  # the same network, other weights
    "neon-edm-cifar10-uncond": (55_733_891, "1c5f38fd273af62a"),
    "edm-ffhq-64x64-uncond-vp": (61_805_571, "327e9abfb3a00b61"),
    "edm-afhqv2-64x64-uncond-vp": (61_805_571, "327e9abfb3a00b61"),
    "32x32_classifier": (47_771_112, "d5e863278bb0966a"),
    "64x64_classifier": (65_438_568, "1f101795c34a2e14"),
    "discriminator_60": (2_883_841, "3dd8e2904f0d4d49"),
    "discriminator_250": (3_395_841, "a9a17fdbbf0709fe"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_reference_parameters_and_run(name):
    entry, (count, names) = registry()[name], PUBLISHED[name]
    denoiser = entry.kind == "denoiser"
    network = (edm.Denoiser if denoiser else adm.EncoderUNet)(**entry.config).eval()
    state = network.state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert sum(p.numel() for p in network.parameters()) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == names
    size, channels = (network.shape[1], 3) if denoiser else (entry.config["image_size"], entry.config["in_channels"])
    x = torch.zeros(1, channels, size, size)
    with torch.inference_mode():
        if denoiser:
            assert network(x, 1.0).shape == x.shape
        else:
            labels = torch.tensor([1]) if entry.config.get("num_classes") else None
            assert network(x, 0.5, labels).shape == (1, entry.config["out_channels"])


def test_every_published_network_is_counted():
    assert {name for name, entry in registry().items() if entry.config} == set(PUBLISHED)
