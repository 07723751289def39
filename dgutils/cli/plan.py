"""`make plan`: what a profile would compute, download and take up, found out without running any of it.

The notebooks' own cells name the steps. Times come from a few seconds of the profile's own networks on this machine,
with random weights where theirs are absent.
"""

import math
import textwrap
import timeit
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

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
KINDS = ("score", "gradient", "gradients", "train")  # of work, beside features


@dataclass(frozen=True)
class Step:
    """A training, or a set of images with its features: what is missing, why, and what it would cost, in images.

    work: evaluations of the "score" network; "gradient" of log r by one discriminator, "gradients" by several; "train",
    passes through one head and back, the extractor's share included. features: by feature space. disk: bytes.
    """

    label: str
    n: int = 0
    missing: tuple[str, ...] = ()
    work: Counter[str] = field(default_factory=Counter)
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


def _images(arms: list[ImageSet | RealSet], scores: dict[str, list[Score]]) -> Step:
    """What image sets cost that are the same images, of different numbers: the largest, and the features of each.

    scores: a set's digest -> what its features are wanted for.
    """
    arm, missing, work, disk, features = max(arms, key=lambda arm: arm.n), [], Counter(), 0, Counter()
    if arm.lacks:
        sampling, guide, count = arm.sampling, arm.guide, len(arm.rows.missing(arm.n)) * arm.rows.shard_size
        evaluations = nfe(sampling.num_steps) if sampling.sampler == "heun" else sampling.num_steps
        work["score"] = count * evaluations * (2 if sampling.cfg_network else 1)
        work["gradients" if guide and len(guide.members) > 1 else "gradient"] = count * _guided_steps(sampling, guide)
        disk = count * math.prod(checkpoints.image_shape(sampling.score_network))
        missing.append(arm.rows.lacks(arm.n))
    for part in arms:
        for space, store in {score.space: score.store for score in scores.get(part.digest, [])}.items():
            rows = jobs.feature_rows(store, part, space)
            features[space] += len(rows.missing(part.n)) * rows.shard_size
    features = +features  # without those of which none is missing
    disk += sum(4 * DIMENSIONS.get(space.split("@")[0], 512) * count for space, count in features.items())
    missing += ["features: " + ", ".join(features)] if features else []
    return Step(arm.label, arm.n, tuple(missing), work, features, disk)


def _training(trained: Trained) -> Step:
    lacks, config = trained.artifact.lacks(), trained.config
    images = 2 * config.num_real * (config.held_out_every - 2) // config.held_out_every
    lengths = {member.name: member.epochs for member in config.members}
    label = ", ".join(f"{name} {epochs}" for name, epochs in lengths.items())
    return Step(f"training: {trained.label}, {label} epochs", images, (lacks,) if lacks else (),
                Counter(train=images * sum(lengths.values()) if lacks else 0))  # fmt: skip


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
    """Seconds an image of call(n), which works on n images at once: the best of three calls, the first to warm up.

    n doubles up to `most` while a call takes less than half a second: a large network on a CPU shows its speed by few
    images, an accelerator wants its whole batch.
    """
    def finished():
        call(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    while (taken := min(timeit.repeat(finished, number=1, repeat=3))) < 0.5 and n < most:
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
    """Seconds an image of each kind of work, and of features by space unless its file is absent, measured here."""
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
    pixels = np.zeros((max(2 * batch, 256), *denoiser.shape[1:], denoiser.shape[0]), np.uint8)
    labels, member = np.tile([0, 1], batch), (replace(training.members[0], epochs=1),)

    def train(pairs):
        learn, validate = (Split(pixels[:n], labels[:n]) for n in (2 * pairs, 2))
        settings = TrainingSettings(member, min(2 * pairs, batch), precision=precision)
        train_discriminators(extractor, partial(init_head, training.head, 0), learn, validate, settings)

    found = {"score": _seconds(lambda n: denoise(x[:n], sigma[:n], 0, 1), size), "gradient": gradient(1),
             "gradients": gradient(len(p.member_names)), "train": _seconds(train, batch, min(4, batch)) / 2}
    for space in p.feature_spaces:
        try:
            found[space] = _seconds(lambda n, space=space: jobs.encode(pixels[:n], space, str(jobs.device())), 256)
        except UserError:
            pass
    return found


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
    p, rate = declared.parameters, rates(declared.parameters, declared.experiments[0].training())
    files = weights.status(weights.mentioned(p.model_dump()))
    print(f"Plan of profile {profile}; nothing is run.\n\nFiles ({weights.weights_dir()})")
    for file in files:
        print(f"  {file.published.file:<36} {file.bytes / 1e6:8.1f} MB  {file.state}")
    if not files:
        print("  none to download: the networks ship with the repository")
    if absent := [file.bytes for file in files if file.state == "absent"]:
        print(f"  get these {sum(absent) / 1e6:,.0f} MB with: make fetch PROFILE={profile}")
    row = "{:<5}{:<63} {:>9} {:>13} {:>11} {:>9} {:>8}  {}"
    print("\n" + row.format("", "Steps", "images", "score evals", "gradients", "features", "time", "").rstrip())
    seconds, all_work, disk = 0.0, Counter(), 0
    for step in steps(declared):
        work = step.work + step.features
        took = sum(count * rate.get(kind, 0) for kind, count in work.items())
        seconds, all_work, disk = seconds + took, all_work + work, disk + step.disk
        counts = (step.n, work["score"], work["gradient"] + work["gradients"], step.features.total())
        print(row.format("MISS" if step.missing else "HIT", textwrap.shorten(step.label, 62, placeholder=" ..."),
                         *(f"{count:,}" if count else "" for count in counts), duration(took) if step.missing else "",
                         "; ".join(step.missing)).rstrip())  # fmt: skip
    unknown = ", nor features whose network is absent" if all_work.keys() - rate.keys() else ""
    score, one, several, train = (f"{1 / rate[kind]:.3g}" for kind in KINDS)
    gradients = all_work["gradient"] + all_work["gradients"]
    print(f"\nIn all: {all_work['score']:,} score network evaluations, {gradients:,} gradients of log r, "
          f"{disk / 1e9:.2f} GB of disk, about {duration(seconds)} on {provenance()['device']},\n"
          f"computing the scores from the features not counted{unknown}.\n"
          f"Measured just now: {score} score evaluations/s; {one} gradients/s by one discriminator, {several} by "
          f"{len(p.member_names)}; {train} images/s through one head in training.")
