"""`make plan`: what a profile would compute, download and take up, found out without running any of it.

The steps are named by the notebooks' own cells, which are run up to their arms. Times come
from a few seconds of the profile's own networks on this machine, with random weights where theirs are absent.
"""

import math
import textwrap
import time
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
MISSING = ", nor features whose network is absent"


@dataclass(frozen=True)
class Step:
    """A training, or a set of images with its features: what is missing, and what would that cost?

    All counts are of images. missing: why, a reason for each part that is not there.
    """

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
    sigmas = karras_sigmas(sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)[:-1]
    times = sigma_to_vp_time(sigmas)
    inside = ((times >= guide.time_min) & (times <= guide.time_max)).numpy()
    return int(inside.sum() * bool(guide.weight_1st_order) + inside[1:].sum() * bool(guide.weight_2nd_order))


def _images(arms: list[ImageSet | RealSet], scores: dict[str, list[Score]]) -> Step:
    """What image sets cost that are the same images, of different numbers: the largest, and the features of each.

    scores: a set's digest -> what its features are wanted for.
    """
    arm, missing, cost, disk = max(arms, key=lambda arm: arm.n), [], {}, 0
    if arm.lacks:
        sampling, guide, count = arm.sampling, arm.guide, len(arm.rows.missing(arm.n)) * arm.rows.shard_size
        evaluations = nfe(sampling.num_steps) if sampling.sampler == "heun" else sampling.num_steps
        several = bool(guide) and len(guide.members) > 1
        cost = {"score": count * evaluations * (2 if sampling.cfg_network else 1),
                "gradients" if several else "gradient": count * _guided_steps(sampling, guide)}  # fmt: skip
        disk = count * math.prod(checkpoints.image_shape(sampling.score_network))
        missing.append(arm.rows.status(arm.n).reason)
    features: dict[str, int] = {}
    for part in arms:
        for space, store in {score.space: score.store for score in scores.get(part.digest, [])}.items():
            rows = jobs.feature_rows(store, part, space)
            if count := len(rows.missing(part.n)) * rows.shard_size:
                features[space] = features.get(space, 0) + count
                disk += 4 * DIMENSIONS.get(space.split("@")[0], 512) * count
    if features:
        missing.append("features: " + ", ".join(features))
    return Step(arm.label, arm.n, tuple(missing), features=features, disk=disk, **cost)


def _training(trained: Trained) -> Step:
    status, config = trained.artifact.status(), trained.config
    images = 2 * config.num_real * (config.held_out_every - 2) // config.held_out_every
    epochs = ", ".join(f"{member.name} {member.epochs}" for member in config.members)
    label = f"training: {trained.artifact.label}, {epochs} epochs"
    if status.hit:
        return Step(label, images)
    return Step(label, images, (status.reason,), train=images * sum(member.epochs for member in config.members))


def steps(declared: Declared) -> list[Step]:
    """Every artifact of a profile's notebooks that costs more than seconds, each once: what they train, then draw."""
    sets: dict[tuple, dict] = {}  # equal images -> {number of them: the set}, in the order of the notebooks
    scores: dict[str, list[Score]] = {}
    trainings = {item.digest: item for item in declared.made if isinstance(item, Trained)}
    lacking = [score for score in declared.scored if score.lacks]
    wanted = [item for item in declared.made if isinstance(item, ImageSet)]
    for score in declared.scored:
        if not score.lacks and getattr(score.images, "lacks", False):
            continue  # its scores are kept
        for images in (score.reference, score.images):
            wanted.append(images)
            scores.setdefault(images.digest, []).append(score)
    for item in needed([score.images for score in lacking] + declared.made):
        if isinstance(item, Trained):
            trainings[item.digest] = item
    for arm in wanted:
        key = (arm.rows.artifact.digest, arm.seeds.start) if isinstance(arm, ImageSet) else (arm.digest,)
        sets.setdefault(key, {}).setdefault(arm.n, arm)
    learnt = {images.rows.artifact.digest: images for trained in trainings.values() for images in trained.sources
              if (images.rows.artifact.digest, images.seeds.start) not in sets}
    return [*(_images([images], {}) for images in learnt.values()), *map(_training, trainings.values()),
            *(_images(list(arms.values()), scores) for arms in sets.values())]  # fmt: skip


# ---- how fast is this machine ------------------------------------------------------------


def _timed(call, n: int) -> float:
    """Seconds of call(n), waiting for an accelerator to finish it."""
    start = time.perf_counter()
    call(n)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _seconds(call, most: int, n: int = 1) -> float:
    """Seconds an image of call(n), which works on n images at once: the better of two calls, after one to warm up.

    n doubles up to `most` while a call takes less than half a second: of a large network on a CPU few images are
    enough, an accelerator wants its whole batch.
    """
    _timed(call, n)
    while (taken := min(_timed(call, n) for _ in range(2))) < 0.5 and n < most:
        n = min(2 * n, most)
    return taken / n


def _network(name: str, load, architecture):
    """The network, or one of its shape with random weights if its file is absent."""
    try:
        return load(name)
    except UserError:
        network = architecture(**checkpoints.network_config(name)).eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last)  # as checkpoints loads them


def rates(p: Parameters, training: Training) -> dict[str, float]:
    """Seconds an image of each kind of work (the fields of `Step`), measured here."""
    device, precision = jobs.device(), jobs.resolve_precision(p.precision)
    denoiser = _network(p.score_network, checkpoints.load_denoiser, Denoiser).to(device)
    extractor = _network(p.feature_extractor, checkpoints.load_feature_extractor, EncoderUNet).to(device)
    head = training.head
    size = p.batch_size
    x = torch.zeros(size, *denoiser.shape, dtype=torch.float64, device=device)
    sigma, denoise = torch.ones(size, dtype=torch.float64, device=device), network_denoiser(denoiser, precision)

    def gradient(members):
        heads = [init_head(head, 0, m) for m in range(members)]
        ensemble = Ensemble(extractor, heads, "mean_logit").to(device)
        return _seconds(lambda n: grad_log_density_ratio(ensemble, x[:n], sigma[:n], precision), size)

    batch = p.discriminator_batch_size
    pixels = np.zeros((2 * batch, *denoiser.shape[1:], denoiser.shape[0]), np.uint8)
    labels, member = np.tile([0, 1], batch), (replace(training.members[0], epochs=1),)

    def train(pairs):
        learn, validate = (Split(pixels[:n], labels[:n]) for n in (2 * pairs, 2))
        settings = TrainingSettings(member, min(2 * pairs, batch), precision=precision)
        train_discriminators(extractor, partial(init_head, head, 0), learn, validate, settings)

    return {"score": _seconds(lambda n: denoise(x[:n], sigma[:n], 0, 1), size), "gradient": gradient(1),
            "gradients": gradient(len(p.member_names)),
            "train": _seconds(train, batch, min(4, batch)) / 2}  # fmt: skip


def _feature_rate(space: str, shape) -> float | None:
    channels, height, width = shape
    images = np.zeros((256, height, width, channels), np.uint8)
    try:
        return _seconds(lambda n: jobs.encode(images[:n], space, str(jobs.device())), len(images))
    except UserError:
        return None  # its file is absent


# ---- the table ---------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds in words of the right size."""
    for size, unit in ((172800, "days"), (7200, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"


def counted(number: int) -> str:
    """A number with thousands apart; nothing for none."""
    return f"{number:,}" if number else ""


def show(profile: str) -> None:
    """Print the plan of a profile. Runs nothing of it."""
    declared = Declared(profile)
    p, listed = declared.parameters, steps(declared)
    for _ in tqdm(range(1), desc="timing this machine", leave=False):
        rate = rates(p, declared.experiments[0].training())
        by_space = {space: _feature_rate(space, checkpoints.image_shape(p.score_network))
                    for space in p.feature_spaces}  # fmt: skip
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
        what = textwrap.shorten(step.label, 62, placeholder=" ...")
        print(f"{'MISS' if step.missing else 'HIT':<5}{what:<63} {counted(step.n):>9} {counted(step.score):>13} "
              f"{counted(step.gradient + step.gradients):>11} {counted(sum(step.features.values())):>9} "
              f"{duration(seconds) if step.missing else '':>8}  {'; '.join(step.missing)}".rstrip())  # fmt: skip
    sums = {name: sum(getattr(step, name) for step in listed) for name in ("score", "gradient", "gradients", "disk")}
    speeds = [f"{1 / rate['score']:.3g} score evaluations/s", f"{1 / rate['gradient']:.3g} gradients/s by one "
              f"discriminator, {1 / rate['gradients']:.3g} by {len(p.member_names)}",
              f"{1 / rate['train']:.3g} images/s through one head in training"]  # fmt: skip
    print(f"\nIn all: {sums['score']:,} score network evaluations, {sums['gradient'] + sums['gradients']:,} gradients "
          f"of log r, {sums['disk'] / 1e9:.2f} GB of disk, about {duration(total)} on {provenance()['device']},\n"
          f"computing the scores from the features not counted{MISSING if unknown else ''}.\n"
          f"Measured just now: {'; '.join(speeds)}.")  # fmt: skip
