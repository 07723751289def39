"""`make plan`: what a profile would compute, download and take up, found out without running any of it.

The notebooks' own cells name the steps. Times come from a few seconds of the profile's own networks on this machine,
with random weights where theirs are absent.
"""

import math
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from dgutils.discriminator import Ensemble
from dgutils.errors import UserError
from dgutils.guidance import grad_log_density_ratio
from dgutils.networks import checkpoints, weights
from dgutils.networks.adm import EncoderUNet, init_head
from dgutils.networks.edm import Denoiser
from dgutils.noise import karras_sigmas, sigma_to_vp_time
from dgutils.pipeline import jobs
from dgutils.pipeline.experiment import Score
from dgutils.pipeline.jobs import Guidance, ImageSet, RealSet, Sampling, Trained, Training
from dgutils.pipeline.parameters import Parameters
from dgutils.pipeline.store import provenance
from dgutils.pipeline.work import Declared, needed
from dgutils.sampler import network_denoiser, nfe
from dgutils.training import Split, TrainingSettings, train_discriminators

DIMENSIONS = {"inception": 2048, "efficientnet-lite0": 1280}  # of the features; an extractor's are fewer


@dataclass(frozen=True)
class Step:
    """A training, or a set of images with its features: what is missing, why, and what it would cost, in images."""

    label: str
    n: int = 0
    missing: tuple[str, ...] = ()
    score: int = 0  # evaluations of the score network
    gradient: int = 0  # gradients of log r, by one discriminator
    gradients: int = 0  # ... by several
    train: int = 0  # through one head, forward and backward, the extractor's share included
    features: dict[str, int] = field(default_factory=dict)  # by feature space
    disk: int = 0  # bytes


def _guided_steps(sampling: Sampling, guide: Guidance | None) -> int:
    """Gradients of log r that an image costs: one for each order with a weight, at each step inside the window."""
    if not guide or sampling.sampler != "heun":
        return 0
    sigmas = karras_sigmas(sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    times = sigma_to_vp_time(sigmas[:-1])
    inside = ((times >= guide.time_min) & (times <= guide.time_max)).numpy()
    return int(inside.sum() * bool(guide.weight_1st_order) + inside[1:].sum() * bool(guide.weight_2nd_order))


def _images(arms: list[ImageSet | RealSet], scores: dict[str, list[Score]]) -> Step:
    """What image sets cost that are the same images, of different numbers: the largest, and the features of each.

    scores: a set's digest -> what its features are wanted for.
    """
    arm, missing, cost, disk, features = max(arms, key=lambda arm: arm.n), [], {}, 0, Counter()
    if arm.lacks:
        sampling, guide, count = arm.sampling, arm.guide, len(arm.rows.missing(arm.n)) * arm.rows.shard_size
        evaluations = nfe(sampling.num_steps) if sampling.sampler == "heun" else sampling.num_steps
        several = bool(guide) and len(guide.members) > 1
        cost = {"score": count * evaluations * (2 if sampling.cfg_network else 1),
                "gradients" if several else "gradient": count * _guided_steps(sampling, guide)}
        disk = count * math.prod(checkpoints.image_shape(sampling.score_network))
        missing.append(arm.rows.lacks(arm.n))
    for part in arms:
        for space, store in {score.space: score.store for score in scores.get(part.digest, [])}.items():
            rows = jobs.feature_rows(store, part, space)
            features[space] += len(rows.missing(part.n)) * rows.shard_size
    features = +features  # without those of which none is missing
    disk += sum(4 * DIMENSIONS.get(space.split("@")[0], 512) * count for space, count in features.items())
    missing += ["features: " + ", ".join(features)] if features else []
    return Step(arm.label, arm.n, tuple(missing), features=features, disk=disk, **cost)


def _training(trained: Trained) -> Step:
    lacks, config = trained.artifact.lacks(), trained.config
    images = 2 * config.num_real * (config.held_out_every - 2) // config.held_out_every
    epochs = ", ".join(f"{member.name} {member.epochs}" for member in config.members)
    label = f"training: {trained.label}, {epochs} epochs"
    return Step(label, images, (lacks,), train=images * sum(member.epochs for member in config.members)) \
        if lacks else Step(label, images)


def steps(declared: Declared) -> list[Step]:
    """Every artifact of a profile's notebooks that costs more than seconds, each once: what they train, then draw."""
    sets: dict[tuple, dict] = {}  # equal images -> {number of them: the set}, in the order of the notebooks
    scores: dict[str, list[Score]] = {}
    makers = needed([score.images for score in declared.scored if score.lacks] + declared.made)
    trainings = {item.digest: item for item in declared.made + makers if isinstance(item, Trained)}
    wanted = [item for item in declared.made if isinstance(item, ImageSet)]
    for score in declared.scored:
        if score.lacks or not getattr(score.images, "lacks", False):  # else its scores are kept
            for images in (score.reference, score.images):
                wanted.append(images)
                scores.setdefault(images.digest, []).append(score)
    for arm in wanted:
        key = (arm.rows.artifact.digest, arm.seeds.start) if isinstance(arm, ImageSet) else (arm.digest,)
        sets.setdefault(key, {}).setdefault(arm.n, arm)
    learnt = {images.rows.artifact.digest: images for trained in trainings.values() for images in trained.sources
              if (images.rows.artifact.digest, images.seeds.start) not in sets}
    return [*(_images([images], {}) for images in learnt.values()), *map(_training, trainings.values()),
            *(_images(list(arms.values()), scores) for arms in sets.values())]


# ---- how fast is this machine ------------------------------------------------------------


def _seconds(call, most: int, n: int = 1) -> float:
    """Seconds an image of call(n), which works on n images at once: the better of two calls, after one to warm up.

    n doubles up to `most` while a call takes less than half a second: a large network on a CPU shows its speed by few
    images, an accelerator wants its whole batch.
    """
    def timed():
        start = time.perf_counter()
        call(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    while (taken := min(timed(), timed())) < 0.5 and n < most:
        n = min(2 * n, most)
    return taken / n


def _network(name: str, load, architecture):
    """The network on the device, or one of its shape with random weights if its file is absent."""
    try:
        return load(name).to(jobs.device())
    except UserError:
        network = architecture(**checkpoints.network_config(name)).eval().requires_grad_(False)
        return network.to(jobs.device(), memory_format=torch.channels_last)  # as checkpoints loads them


def rates(p: Parameters, training: Training) -> dict[str, float]:
    """Seconds an image of each kind of work (the counts of `Step`), measured here."""
    size, precision = p.batch_size, jobs.resolve_precision(p.precision)
    denoiser = _network(p.score_network, checkpoints.load_denoiser, Denoiser)
    extractor = _network(p.feature_extractor, checkpoints.load_feature_extractor, EncoderUNet)
    x = torch.zeros(size, *denoiser.shape, dtype=torch.float64, device=jobs.device())
    sigma, denoise = x.new_ones(size), network_denoiser(denoiser, precision)

    def gradient(members):
        heads = [init_head(training.head, 0, m) for m in range(members)]
        ensemble = Ensemble(extractor, heads, "mean_logit").to(x.device)
        return _seconds(lambda n: grad_log_density_ratio(ensemble, x[:n], sigma[:n], precision), size)

    batch = p.discriminator_batch_size
    pixels = np.zeros((2 * batch, *denoiser.shape[1:], denoiser.shape[0]), np.uint8)
    labels, member = np.tile([0, 1], batch), (replace(training.members[0], epochs=1),)

    def train(pairs):
        learn, validate = (Split(pixels[:n], labels[:n]) for n in (2 * pairs, 2))
        settings = TrainingSettings(member, min(2 * pairs, batch), precision=precision)
        train_discriminators(extractor, partial(init_head, training.head, 0), learn, validate, settings)

    return {"score": _seconds(lambda n: denoise(x[:n], sigma[:n], 0, 1), size), "gradient": gradient(1),
            "gradients": gradient(len(p.member_names)), "train": _seconds(train, batch, min(4, batch)) / 2}


def _feature_rate(space: str, shape) -> float | None:
    """Seconds an image of shape (C, H, W); None if the space's file is absent."""
    images = np.zeros((256, *shape[1:], shape[0]), np.uint8)
    try:
        return _seconds(lambda n: jobs.encode(images[:n], space, str(jobs.device())), len(images))
    except UserError:
        return None


# ---- the table ---------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds in words of the right size."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show(profile: str) -> None:
    """Print the plan of a profile. Runs nothing of it."""
    declared = Declared(profile)
    p, listed = declared.parameters, steps(declared)
    for _ in tqdm(range(1), desc="timing this machine", leave=False):
        rate, shape = rates(p, declared.experiments[0].training()), checkpoints.image_shape(p.score_network)
        by_space = {space: _feature_rate(space, shape) for space in p.feature_spaces}
    files = weights.status(weights.mentioned(p.model_dump()))
    print(f"Plan of profile {profile}; nothing is run.\n\nFiles ({weights.weights_dir()})")
    for file in files:
        print(f"  {file.published.file:<36} {file.bytes / 1e6:8.1f} MB  {file.state}")
    if not files:
        print("  none to download: the networks ship with the repository")
    if absent := [file.bytes for file in files if file.state == "absent"]:
        print(f"  get these {sum(absent) / 1e6:,.0f} MB with: make fetch PROFILE={profile}")
    print(f"\n{'Steps':<68} {'images':>9} {'score evals':>13} {'gradients':>11} {'features':>9} {'time':>8}")
    total, unknown = 0.0, False
    for step in listed:
        seconds = sum(getattr(step, kind) * rate[kind] for kind in rate)
        seconds += sum(count * (by_space[space] or 0) for space, count in step.features.items())
        unknown |= any(by_space[space] is None for space in step.features)
        total += seconds
        counts = (step.n, step.score, step.gradient + step.gradients, sum(step.features.values()))
        n, evaluations, gradients, features = (f"{count:,}" if count else "" for count in counts)
        print(f"{'MISS' if step.missing else 'HIT':<5}{textwrap.shorten(step.label, 62, placeholder=' ...'):<63} "
              f"{n:>9} {evaluations:>13} {gradients:>11} {features:>9} "
              f"{duration(seconds) if step.missing else '':>8}  {'; '.join(step.missing)}".rstrip())
    score, one, several, disk = (sum(getattr(step, name) for step in listed)
                                 for name in ("score", "gradient", "gradients", "disk"))
    speed = {kind: f"{1 / seconds:.3g}" for kind, seconds in rate.items()}
    print(f"\nIn all: {score:,} score network evaluations, {one + several:,} gradients of log r, "
          f"{disk / 1e9:.2f} GB of disk, about {duration(total)} on {provenance()['device']},\ncomputing the scores "
          f"from the features not counted{', nor features whose network is absent' if unknown else ''}.\n"
          f"Measured just now: {speed['score']} score evaluations/s; {speed['gradient']} gradients/s by one "
          f"discriminator, {speed['gradients']} by {len(p.member_names)}; "
          f"{speed['train']} images/s through one head in training.")
