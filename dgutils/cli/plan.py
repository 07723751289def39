"""`make plan`: what a profile would compute, download and take up, found out without running any of it.

The notebooks' own cells name the steps; what they cost is counted in evaluations of the networks. How many of the
score network's this machine does in a second is measured.
"""

import math
import textwrap
import timeit
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch

from dgutils.errors import UserError
from dgutils.machine import device, provenance, resolve_precision
from dgutils.networks import checkpoints, weights
from dgutils.noise import karras_sigmas, sigma_to_vp_time
from dgutils.pipeline.copies import BATCH, Copy
from dgutils.pipeline.jobs import Guidance, ImageSet, Likelihood, Sampling, Trained
from dgutils.pipeline.parameters import Parameters
from dgutils.pipeline.work import Declared, needed
from dgutils.sampler import network_denoiser, nfe

KINDS = ("score", "gradient", "gradients", "train")  # of work, beside features
FEATURE_BYTES = 4 * 2048  # of an image in one space, at most


@dataclass(frozen=True)
class Step:
    """A training, or a set of images with its features: what of it is missing, and costs how much, in images.

    work: evaluations of the "score" network; "gradient" of log r by one discriminator, "gradients" by several; "train",
    passes through one head and back. features: by feature space. disk: bytes.
    """

    label: str
    n: int
    work: Counter[str]
    features: Counter[str] = field(default_factory=Counter)
    disk: int = 0


def _guided_steps(sampling: Sampling, guide: Guidance | None) -> int:
    """Gradients of log r that an image costs: one for each order with a weight, at each step inside the window."""
    if not guide or sampling.sampler != "heun":
        return 0
    sigmas = karras_sigmas(sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    times = sigma_to_vp_time(sigmas[:-1])
    inside = ((times >= guide.time_min) & (times <= guide.time_max)).numpy()
    return int(inside.sum() * bool(guide.weight_1st_order) + inside[1:].sum() * bool(guide.weight_2nd_order))


def _images(sets: list, features: Counter[str]) -> Step:
    """What sets of the same images, of different numbers, lack: pixels of the largest, and these features."""
    arm, work, disk = max(sets, key=lambda arm: arm.n), Counter(), FEATURE_BYTES * features.total()
    if arm.lacks:
        sampling, guide, count = arm.sampling, arm.guide, len(arm.rows.missing(arm.n)) * arm.rows.shard_size
        evaluations = nfe(sampling.num_steps) if sampling.sampler == "heun" else sampling.num_steps
        two = sampling.cfg_network or (sampling.worse and not sampling.in_weights)
        work["score"] = count * evaluations * (2 if two else 1)
        work["gradients" if guide and len(guide.members) > 1 else "gradient"] = count * _guided_steps(sampling, guide)
        disk += count * math.prod(checkpoints.image_shape(sampling.score_network))
    return Step(arm.label, arm.n, work, features, disk)


def _training(trained: Trained) -> Step:
    config = trained.config
    images = 2 * config.num_real * (config.held_out_every - 2) // config.held_out_every
    epochs = ", ".join(f"{member.name} {member.epochs}" for member in config.members)
    work = Counter(train=images * sum(member.epochs for member in config.members))
    return Step(f"training: {trained.label}, {epochs} epochs", images, work)


def _copy(item: Copy) -> Step:
    work = Counter(score=3 * item.steps * BATCH)  # an image forth and back is as much as three evaluations
    return Step(f"training: {item.label}, {item.steps} steps", item.images.n, work)


def _likelihood(item: Likelihood) -> Step:
    work = len(item.rows.missing(item.n)) * item.rows.shard_size * (6 * item.levels - 4)
    return Step(f"likelihood: {item.label}", item.n, Counter(score=work, gradient=work if item.guide else 0))


def steps(declared: Declared) -> list[Step]:
    """What a profile's notebooks need and the store lacks, each once: what is trained, then what is drawn.

    The features of a set count as there if a score that needed them is.
    """
    lacking = [score for score in declared.scored if score.lacks]
    features = {(images.digest, score.space): images
                for score in lacking for images in (score.reference, score.images)}
    for score in (score for score in declared.scored if not score.artifact.lacks()):
        for images in (score.reference, score.images):
            features.pop((images.digest, score.space), None)
    items, wanted = needed([score.images for score in lacking] + declared.made), defaultdict(Counter)
    same: dict[str, dict] = {}  # images that are equal -> the sets of them, of different numbers
    for images in [item for item in items if isinstance(item, ImageSet)] + list(features.values()):
        same.setdefault(_which(images), {})[images.digest] = images
    for (_, space), images in features.items():
        wanted[_which(images)][space] += images.n
    return [*(_training(item) for item in items if isinstance(item, Trained)),
            *(_copy(item) for item in items if isinstance(item, Copy)),
            *(_images(list(sets.values()), wanted[key]) for key, sets in same.items()),
            *(_likelihood(item) for item in items if isinstance(item, Likelihood))]


def _which(images) -> str:
    return images.rows.artifact.digest if isinstance(images, ImageSet) else images.digest


def score_rate(p: Parameters) -> float | None:
    """Evaluations of the score network a second on this machine, of a few images on a CPU; None if it is absent."""
    try:
        network = checkpoints.load_denoiser(p.score_network).to(device())
    except UserError:
        return None
    on_gpu, denoise = device().type == "cuda", network_denoiser(network, resolve_precision(p.precision))
    n = p.batch_size if on_gpu else min(8, p.batch_size)
    x = torch.zeros(n, *network.shape, dtype=torch.float64, device=device())

    def evaluate():
        denoise(x, x.new_ones(n), 0, 1)
        if on_gpu:
            torch.cuda.synchronize()

    return n / min(timeit.repeat(evaluate, number=1, repeat=3))


def show(profile: str) -> None:
    """Print the plan of a profile. Runs nothing of it."""
    declared = Declared(profile)
    files = [weights.published(name) for name in weights.mentioned(declared.parameters.model_dump())]
    print(f"Plan of profile {profile}; nothing is run.\n\nFiles ({weights.weights_dir()})")
    for file in files:
        print(f"  {file.file:<36} {file.megabytes:6.0f} MB  {'here' if file.path.is_file() else 'absent'}")
    if not files:
        print("  none to download: the networks ship with the repository")
    if absent := [file.megabytes for file in files if not file.path.is_file()]:
        print(f"  get these {sum(absent):,.0f} MB with: make fetch PROFILE={profile}")
    row, total, disk = "{:<67} {:>9} {:>13} {:>11} {:>11} {:>9}", Counter(), 0
    print("\n" + row.format("Steps that are to be made", "images", "score evals", "gradients", "training", "features"))
    for step in steps(declared):
        total, disk, work = total + step.work, disk + step.disk, step.work
        counts = step.n, work["score"], work["gradient"] + work["gradients"], work["train"], step.features.total()
        print(row.format(textwrap.shorten(step.label, 66, placeholder=" ..."),
                         *(f"{count:,}" if count else "" for count in counts)).rstrip())
    gradients = total["gradient"] + total["gradients"]
    print(f"\nIn all: {total['score']:,} score network evaluations, {gradients:,} gradients of log r, "
          f"{total['train']:,} passes through a head in training, at most {disk / 1e9:.2f} GB of disk.")
    if rate := score_rate(declared.parameters):
        print(f"The score network alone takes about {total['score'] / rate / 3600:.2g} h on {provenance()['device']}: "
              f"{rate:.3g} evaluations/s, measured just now.")
