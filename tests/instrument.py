"""The pilot of the second study's instrument: how far can one discriminator guide CIFAR-10's score network?

Amendment 4 of docs/preregistration.md has what it found. From the repository's root:
    python tests/instrument.py train frozen FILE --steps 4000 --fakes 20000
    python tests/instrument.py score FILE 16 8 4 2
`train` learns one head on the extractor, frozen or tuned along, from the first generated images of training 0 (drawn
into runs/second, if they are not there), and prints held-out losses by noise level; `score` draws guided images of
pilot seeds.
"""

import argparse
import copy
import math
import time

import numpy as np
import torch
import torch.nn.functional as F

from dgutils import datasets, metrics
from dgutils.discriminator import Ensemble, perturb
from dgutils.guidance import GuidedDenoiser
from dgutils.networks import checkpoints
from dgutils.networks.adm import EncoderUNet, init_head
from dgutils.networks.features import image_features
from dgutils.noise import sample_vp_time, sigma_to_vp_time
from dgutils.pipeline import jobs
from dgutils.pipeline.experiment import Experiment, fake_set

EXTRACTOR, BATCH = "cifar10-adm", 64
LEVELS = sigma_to_vp_time(torch.tensor([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], dtype=torch.float64))


def labels(n):
    """1 for n real images, then 0 for as many generated ones."""
    return torch.cat([torch.ones(n), torch.zeros(n)])


def logits(extractor, head, images, vp_time, rng, tuned):
    x = perturb(images, vp_time, rng).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        features = extractor.features(x, vp_time.float())
        return head(features if tuned else features.detach(), vp_time.float())[:, 0].float()


@torch.no_grad()
def held_out(extractor, head, images):
    """Cross-entropy at each of LEVELS, of held-out images with the same noise every time."""
    losses = []
    for vp_time in LEVELS:
        rng = np.random.default_rng(5)
        parts = [logits(extractor, head, part, vp_time.expand(len(part)), rng, False)
                 for part in np.split(images, range(200, len(images), 200))]
        losses.append(F.binary_cross_entropy_with_logits(torch.cat(parts), labels(len(images) // 2)).item())
    return losses


def train(file, tuned, steps, n):
    fakes = fake_set(Experiment({"profile": "second"}, "instrument")).first(n).images
    real, rng = datasets.load_dataset("cifar10", "train")[0], np.random.default_rng(0)
    real, held = real[rng.permutation(len(real))[:n]], n // 10
    torch.manual_seed(0)
    extractor = copy.deepcopy(checkpoints.load_feature_extractor(EXTRACTOR)).to(memory_format=torch.channels_last)
    head = init_head(checkpoints.head_config(EXTRACTOR, 32, 1, 32), 0, 0)
    extractor.requires_grad_(tuned), head.requires_grad_(True)
    groups = [{"params": head.parameters(), "lr": 3e-4}]
    groups += [{"params": extractor.parameters(), "lr": 1e-4}] if tuned else []
    optimiser, start, losses = torch.optim.AdamW(groups, weight_decay=0.01, fused=True), time.monotonic(), []
    rates = [group["lr"] for group in groups]
    for step in range(steps + 1):
        if step % 250 == 0:
            values = held_out(extractor, head, np.concatenate([real[:held], fakes[:held]]))
            print(step, f"{time.monotonic() - start:.0f} s, train {np.mean(losses[-250:] or [0]):.4f}, held out",
                  *(f"{value:.3f}" for value in values), flush=True)
            torch.save({"extractor": extractor.state_dict(), "head": head.state_dict(), "config": head.config}, file)
        if step == steps:
            break
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = [rng.integers(0, n - held, BATCH // 2) for _ in range(2)]
        batch = np.concatenate([which[held:][row] for which, row in zip((real, fakes), rows, strict=True)])
        batch = np.where((rng.random(len(batch)) < 0.5)[:, None, None, None], batch[:, :, ::-1], batch)
        vp_time = sample_vp_time(torch.from_numpy(rng.random(len(batch))), 1e-3)
        said = logits(extractor, head, np.ascontiguousarray(batch), vp_time, rng, tuned)
        loss = F.binary_cross_entropy_with_logits(said, labels(BATCH // 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())


def score(file, weights, n):
    saved = torch.load(file, weights_only=True)
    extractor = copy.deepcopy(checkpoints.load_feature_extractor(EXTRACTOR))
    extractor.load_state_dict(saved["extractor"])
    head = EncoderUNet(**saved["config"])
    head.load_state_dict(saved["head"])
    ensemble, sampling = Ensemble(extractor, [head], "mean_logit"), Experiment({"profile": "second"}, "x").sampling()
    reference = metrics.PairReference(image_features(datasets.load_dataset("cifar10", "test")[0][:4000]))
    plain = None
    for weight in (0.0, *weights):
        parts = []
        for first in range(0, n, 125):
            denoise = jobs.make_denoiser(sampling)
            if weight:
                denoise = GuidedDenoiser(denoise, ensemble, weight, 0.0, 0.01, 1.0, sampling.precision)
            seeds = range(jobs.PILOT.start + first, jobs.PILOT.start + min(n, first + 125))
            parts.append(datasets.to_uint8(jobs.draw(sampling, denoise, seeds)))
        kid = reference.compare(image_features(np.concatenate(parts)), 400).kid
        plain = plain or kid
        level, change = kid.interval(), kid.minus(plain)
        print(f"w = {weight:g}, {n} images: KID x 1000 {1000 * level.value:.1f} [{1000 * level.low:.1f}, "
              f"{1000 * level.high:.1f}], change {1000 * change.value:.1f} [{1000 * change.low:.1f}, "
              f"{1000 * change.high:.1f}], {100 * change.value / plain.value:.0f} % of the level", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(required=True, dest="verb")
    one = verbs.add_parser("train", help="a head, and with `tuned` the extractor under it")
    one.add_argument("extractor", choices=("frozen", "tuned"))
    one.add_argument("file")
    one.add_argument("--steps", type=int, default=4000)
    one.add_argument("--fakes", type=int, default=20000)
    two = verbs.add_parser("score", help="guided images of pilot seeds, by weight")
    two.add_argument("file")
    two.add_argument("weights", type=float, nargs="+")
    two.add_argument("--images", type=int, default=500)
    given = parser.parse_args()
    if given.verb == "train":
        train(given.file, given.extractor == "tuned", given.steps, given.fakes)
    else:
        score(given.file, given.weights, given.images)


if __name__ == "__main__":
    main()
