"""`make plan`: what a profile would compute, download and take up, found out without running any of it.

The steps are named by the very code that runs them, on a store that computes nothing (`Store.dry`). Times come
from a few seconds of the profile's own networks on this machine, with random weights where theirs are absent.
"""

import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoints, jobs, notebooks, weights
from .adm import EncoderUNet
from .discriminator import Ensemble, init_head, train_discriminators
from .edm import Denoiser
from .errors import UserError
from .guidance import grad_log_density_ratio
from .jobs import ImageSet, RealSet, Trained
from .noise import karras_sigmas, sigma_to_vp_time
from .sampler import network_denoiser, nfe
from .store import provenance
from .study import Study

DIMENSIONS = {"inception": 2048, "efficientnet-lite0": 1280}  # of the features; an extractor's are fewer
SWEEP = ("num_sweep", "sweep_weights", "sweep_time_mins", "sweep_time_maxs", "sweep_epoch_scales")  # notebook 05's own


@dataclass(frozen=True)
class Step:
    """One artifact: is it there, and what would its missing part cost? All counts are of images."""

    label: str
    hit: bool
    reason: str
    score: int = 0  # evaluations of the score network
    gradient: int = 0  # gradients of log r, by one discriminator
    gradients: int = 0  # ... by several
    train: int = 0  # through one head, forward and backward, the extractor's share included
    features: int = 0
    space: str = ""
    disk: int = 0  # bytes


def _guided_steps(config: dict) -> int:
    """Gradients of log r that an image costs: one for each order with a weight, at each step inside the window."""
    guidance = config["guidance"]
    if not guidance or config["sampler"] != "heun":
        return 0
    times = sigma_to_vp_time(karras_sigmas(*(config[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho")))[:-1])
    inside = ((times >= guidance["time_min"]) & (times <= guidance["time_max"])).numpy()
    first = inside.sum() if guidance["weight_1st_order"] else 0
    return int(first + (inside[1:].sum() if guidance["weight_2nd_order"] else 0))


def _images(arm: ImageSet) -> Step:
    config, status = arm.rows.artifact.identity["config"], arm.rows.status(arm.n)
    missing = len(arm.rows.missing(arm.n)) * arm.rows.shard_size
    evaluations = nfe(config["num_steps"]) if config["sampler"] == "heun" else config["num_steps"]
    score = missing * evaluations * (2 if config["cfg_network"] else 1)
    count = missing * _guided_steps(config)
    several = bool(config["guidance"]) and len(config["guidance"]["members"]) > 1
    pixels = int(np.prod(checkpoints.image_shape(config["score_network"])))
    return Step(f"{arm.n:,} images, {arm.label}", status.hit, status.reason, score, 0 if several else count,
                count if several else 0, disk=missing * pixels)  # fmt: skip


def _training(trained: Trained) -> Step:
    status, config = trained.artifact.status(), trained.config
    images = 2 * config.num_real * (config.held_out_every - 2) // config.held_out_every
    work = 0 if status.hit else images * sum(member.epochs for member in config.members)
    return Step("training of " + ", ".join(m.name for m in config.members), status.hit, status.reason, train=work)


def _features(study: Study, images: ImageSet | RealSet, space: str) -> Step:
    rows = jobs.feature_rows(study.store, images, space)
    status, width = rows.status(images.n), DIMENSIONS.get(space.split("@")[0], 512)
    missing = min(len(rows.missing(images.n)) * rows.shard_size, images.n)
    return Step(f"features of {images.label}", status.hit, status.reason, features=missing, space=space,
                disk=4 * width * missing)  # fmt: skip


def steps(parameters: dict) -> list[Step]:
    """Every artifact of a profile's notebooks that costs more than seconds, in order, each once."""
    study = Study.from_parameters(parameters)
    study.__dict__["store"] = jobs.open_store(study.profile, dry=True)
    found: dict[str, Step] = {}

    def images(arm):
        for space in study.feature_spaces:
            if isinstance(arm, ImageSet):
                found.setdefault(arm.digest, _images(arm))
            found.setdefault(f"{arm.digest} {space}", _features(study, arm, space))

    found["fakes"], found["training"] = _images(study.fakes), _training(study.trained)
    images(study.reference)
    blocks = [arm for arms in study.seed_block_arms().values() for arm in arms]
    for arms in (study.evaluation_arms(), study.published_arms(), study.claim_arms(), study.ensemble_arms()):
        for arm in arms.values():
            images(arm)
    for arm in blocks:
        images(arm)
    for trained in study.sweep_trainings(parameters["sweep_epoch_scales"]).values():
        found.setdefault(trained.digest, _training(trained))
    for arms in study.sweep_arms(*(parameters[name] for name in SWEEP)).values():
        for arm in arms.values():
            images(arm)
    return list(found.values())


# ---- how fast is this machine ------------------------------------------------------------


def _seconds(call, images: int) -> float:
    """Seconds an image of a call on `images` of them: the least of a few, after one to warm up."""
    call()
    taken, until = [], time.perf_counter() + 3
    while len(taken) < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken) / images


def _network(name: str, load, architecture):
    """The network, or one of its shape with random weights if its file is absent."""
    try:
        return load(name)
    except UserError:
        return architecture(**checkpoints.network_config(name)).eval().requires_grad_(False)


def rates(study: Study) -> dict[str, float]:
    """Seconds an image of each kind of work (the fields of `Step`), measured here."""
    device, precision = jobs.device(), jobs.resolve_precision(study.precision)
    denoiser = _network(study.score_network, checkpoints.load_denoiser, Denoiser).to(device)
    extractor = _network(study.feature_extractor, checkpoints.load_feature_extractor, EncoderUNet).to(device)
    head = jobs.head_config(study.feature_extractor, study.head_width, study.head_blocks, study.head_channels)
    size = study.batch_size if device.type == "cuda" else min(study.batch_size, 32)
    x = torch.zeros(size, *denoiser.shape, dtype=torch.float64, device=device)
    sigma, denoise = torch.ones(size, dtype=torch.float64, device=device), network_denoiser(denoiser, precision)

    def gradient(members):
        heads = [init_head(head, 0, m) for m in range(members)]
        ensemble = Ensemble(extractor, heads, "mean_logit").to(device)
        return _seconds(lambda: grad_log_density_ratio(ensemble, x, sigma, precision), size)

    batch = study.discriminator_batch_size
    pixels = np.zeros((2 * batch, *denoiser.shape[1:], denoiser.shape[0]), np.uint8)
    labels, member = np.tile([0, 1], batch), study.training().members[:1]
    member = [replace(member[0], epochs=1)]
    training = _seconds(lambda: train_discriminators(extractor, head, pixels, labels, pixels[:2], labels[:2], member,
                                                     batch, 0, precision), 2 * batch)  # fmt: skip
    return {"score": _seconds(lambda: denoise(x, sigma, 0, 1), size), "gradient": gradient(1),
            "gradients": gradient(len(study.member_names)), "train": training}  # fmt: skip


def _feature_rate(space: str, shape) -> float | None:
    channels, height, width = shape
    images = np.zeros((16, height, width, channels), np.uint8)
    try:
        return _seconds(lambda: jobs.encode(images, space), len(images))
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
    parameters = notebooks.parameters(profile)
    study = Study.from_parameters({field.name: parameters[field.name] for field in fields(Study)})
    listed = steps(parameters)
    for _ in tqdm(range(1), desc="timing this machine", leave=False):
        rate = rates(study)
        by_space = {space: _feature_rate(space, checkpoints.image_shape(study.score_network))
                    for space in study.feature_spaces}  # fmt: skip
    files = weights.status(weights.mentioned(parameters))
    print(f"Plan of profile {profile}; nothing is run.\n\nFiles ({weights.weights_dir()})")
    for file in files:
        print(f"  {file.published.file:<36} {file.bytes / 1e6:8.1f} MB  {file.state}")
    if not files:
        print("  none to download: the networks ship with the repository")
    if any(file.state == "absent" for file in files):
        print(f"  get them with: make fetch PROFILE={profile}")
    print(f"\nSteps\n  {'what':<52} {'here?':<5} {'score evals':>13} {'gradients':>11} {'time':>9}")
    total, unknown = 0.0, False
    for step in listed:
        seconds = sum(getattr(step, kind) * rate[kind] for kind in rate)
        unknown |= bool(step.features) and by_space[step.space] is None
        seconds += step.features * (by_space.get(step.space) or 0)
        total += seconds
        label = f"{step.label} ({step.space})" if step.space else step.label
        took = "" if step.hit else duration(seconds)
        print(f"  {label[:52]:<52} {'HIT' if step.hit else 'MISS':<5} {counted(step.score):>13} "
              f"{counted(step.gradient + step.gradients):>11} {took:>9}  {'' if step.hit else step.reason}".rstrip())
    sums = {name: sum(getattr(step, name) for step in listed) for name in ("score", "gradient", "gradients", "disk")}
    print(f"\nIn all: {sums['score']:,} score network evaluations, {sums['gradient'] + sums['gradients']:,} gradients of "
          f"log r, {sums['disk'] / 1e9:.2f} GB of disk, about {duration(total)} on {provenance()['device']}\n"
          f"(measured: {1 / rate['score']:.1f} score evaluations/s, {1 / rate['gradient']:.1f} gradients/s by one "
          f"discriminator, {1 / rate['gradients']:.1f} by {len(study.member_names)}; {1 / rate['train']:.0f} images/s "
          "through one head in training; without the scores themselves"
          + (", and without features whose network is absent)" if unknown else ")"))
