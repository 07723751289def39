"""The study's steps: draw images, train discriminators, extract features, score. Each is found, not redone.

What a step makes is an object that names it: a store, a frozen config, and what it is made from. Nothing is computed
before `ensure`, or an attribute that needs it, and nothing that the store has.
VERSIONS are the steps' numerical versions: raise one when its numbers change, and only then (tests/test_jobs.py
fails when numbers change and the version does not).
"""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from scipy.optimize import minimize_scalar

from dgutils import datasets, likelihood, metrics, sampler
from dgutils.arrays import NotFiniteRows
from dgutils.discriminator import Ensemble, evaluate_logits
from dgutils.errors import UserError, require
from dgutils.guidance import BOOSTING, GuidedDenoiser, check_settings, log_density_ratio, rejection_bounds
from dgutils.machine import device, log_line, resolve_precision
from dgutils.networks import checkpoints
from dgutils.networks.adm import init_head
from dgutils.networks.features import image_features
from dgutils.noise import RESAMPLING, PerSampleNoise, class_labels, karras_sigmas, keyed_rng, vp_sigmas
from dgutils.paths import results_dir, runs_dir, torchrun_ranks, verbose
from dgutils.pipeline import ranks
from dgutils.pipeline.store import KEPT, Store, digest_of_json
from dgutils.sampler import ancestral_sampler, edm_sampler, extrapolated_denoiser, fitted_sigmas, network_denoiser
from dgutils.terminal import bar, note
from dgutils.training import Split, TrainingSettings, train_discriminators

VERSIONS = {"generate": 1, "train": 1, "logits": 1, "features": 1, "evaluate": 1, "likelihood": 1}
FEATURE_SHARD = 1000  # images whose features are one file, at most
PILOT = range(3_000_000, 3_000_064)  # seeds on which norms are measured, apart from all that are scored


def open_store(profile: str) -> Store:
    """The artifacts of a profile, under runs/<profile>/store. Results of different profiles never mix.

    Its lines go to the profile's log. People see what is damaged, what is waited for (by one process: ranks often do),
    and with VERBOSE=1 all.
    """
    said = ("QUARANTINED",) if torchrun_ranks() else ("QUARANTINED", "WAIT")

    def log(line):
        note(profile, line)
        if line.startswith(said) or ranks.group().main and verbose():
            log_line(line)

    return Store(runs_dir(profile) / "store", log, results_dir(profile) / KEPT)


def less_defaults(config, *without: str) -> dict:
    """The fields of a frozen config, but for some, that differ from their defaults: its identity in the store.

    A field added later, with a default that means what was done before, leaves identities alone; defaults never change.
    A function is its source, a partial its function and keywords: write it in a cell or a module, without a closure.
    """
    def identity(value):
        if isinstance(value, Guidance):
            return less_defaults(value, "discriminators") | {"discriminators": value.discriminators.digest}
        if hasattr(value, "digest"):
            return value.digest
        if getattr(value, "args", ()) or getattr(value, "__closure__", None):
            raise UserError(f"{value}: give a function's settings as functools.partial(function, name=value)")
        if isinstance(value, partial):
            return {"function": identity(value.func), "of": value.keywords}
        return inspect.getsource(value) if callable(value) else value

    return {f.name: identity(value) for f in dataclasses.fields(config)
            if f.name not in without and (value := getattr(config, f.name)) != f.default}


# ---- images ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: the network, EDM's schedule (table 2 of the study), and the fixed batch layout.

    precision: "auto" becomes this machine's. sampler: "heun" (EDM), or "ancestral" (DDPM: of the schedule, num_steps
    alone counts). conditional: every image has a class, a function of its seed. cfg_network: the unconditional network
    of classifier-free guidance, of weight cfg_weight; "" for none. worse: a network's name, or a `copies.Copy`, away
    from which to extrapolate by worse_weight, in denoisers or, in_weights, in parameters.
    """

    score_network: str
    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch_size: int = 125
    shard_size: int = 250
    precision: str = "auto"
    sampler: str = "heun"
    conditional: bool = False
    cfg_network: str = ""
    cfg_weight: float = 1.0
    worse: Any = None
    worse_weight: float = 0.0
    in_weights: bool = False

    def __post_init__(self):
        object.__setattr__(self, "precision", resolve_precision(self.precision))
        require(self.sampler in ("heun", "ancestral"), f"unknown sampler '{self.sampler}': choose heun or ancestral")
        if self.sampler == "heun":
            karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)  # refuses what is no schedule
        require(self.batch_size > 0 and self.shard_size % self.batch_size == 0,
                f"shard_size {self.shard_size} is not a multiple of batch_size {self.batch_size}")
        require(self.conditional or not self.cfg_network,
                "classifier-free guidance needs conditional sampling: set conditional")


class Discriminators:
    """What may guide images: `head(member, state)` on the extractor named `feature_extractor`, known by `digest`."""

    trainings = ()  # what is to be trained for them

    def ensemble(self, members, rule="mean_logit", state: str = "last", calibrated: bool = False) -> Ensemble:
        """Some heads, each in a state of `Trained.head`, combined by a rule; calibrated: at their `temperature`."""
        extractor = checkpoints.load_feature_extractor(self.feature_extractor)
        heads = [self.head(member, state) for member in members]
        for member, head in zip(members, heads, strict=True) if calibrated else ():
            last = head.out[-1].c_proj  # the logit is linear in it
            last.weight.data /= (temperature := self.temperature(member, state))
            last.bias.data /= temperature
        return Ensemble(extractor, heads, rule, checkpoints.clock(self.feature_extractor))


@dataclass(eq=False)
class Published(Discriminators):
    """Discriminators whose weights are published."""

    feature_extractor: str
    discriminators: tuple[str, ...]

    def __post_init__(self):
        names = (self.feature_extractor, *self.discriminators)
        self.digest = digest_of_json([checkpoints.weights_digest(name) for name in names])

    def head(self, member: int, state: str):
        require(state == "last", f"published discriminators have no state '{state}'")
        return checkpoints.load_discriminator(self.discriminators[member])


@dataclass(frozen=True)
class Guidance:
    """Which discriminators guide, how they are combined, and how strongly (table 2).

    rule: as of `Ensemble`. calibrated: members at their `Trained.temperature`. change: as of `GuidedDenoiser`.
    equal_to: another guidance, whose mean norm this one is to have at every noise level (see `equalised`).
    rejection: above 0, images are rejected along their trajectories (`sampler.rejection_sampler`), too, and of the
    growth of log r in each step this quantile is the bound (see `bounded`, which sets bounds). With a weight above 0
    log r acts twice.
    """

    discriminators: Discriminators
    members: tuple[int | tuple[int, int], ...]
    rule: str | Callable = "mean_logit"
    state: str = "last"
    weight_1st_order: float = 2.0
    weight_2nd_order: float = 0.0
    time_min: float = 0.01
    time_max: float = 1.0
    boosting: str = "none"
    log_ratio: str = "logit"
    calibrated: bool = False
    change: Callable | None = None
    equal_to: "Guidance | None" = None
    rejection: float = 0.0
    bounds: tuple[float, ...] = ()

    def __post_init__(self):
        require(0 <= self.rejection <= 1 and not (self.rejection and self.boosting != "none"),
                f"rejection {self.rejection}, boosting {self.boosting}: give a quantile, and no boosting with it")
        check_settings(self.weight_1st_order, self.weight_2nd_order, self.time_min, self.time_max, self.boosting,
                       self.log_ratio)

    @cached_property
    def ensemble(self) -> Ensemble:
        """The discriminators, on the device from now on."""
        return self.discriminators.ensemble(self.members, self.rule, self.state, self.calibrated).to(device())


def make_denoiser(sampling: Sampling, guidance: Guidance | None = None, seeds=()):
    """The sampler's callable for a config: the score network, guided or not. seeds: whose classes, if conditional."""
    def load(which):
        return (checkpoints.load_denoiser(which) if isinstance(which, str) else which.network).to(device())

    network, labels, one_hot = load(sampling.score_network), None, None
    if sampling.in_weights:
        network = sampler.extrapolated_weights(network, load(sampling.worse), sampling.worse_weight)
    if sampling.conditional:
        require(network.label_dim, f"'{sampling.score_network}' knows no classes: choose a class-conditional network")
        labels = class_labels(seeds, network.label_dim).to(device())
        one_hot = torch.nn.functional.one_hot(labels, network.label_dim).float()
    denoise = network_denoiser(network, sampling.precision, one_hot)
    if sampling.cfg_network:
        unconditional = network_denoiser(load(sampling.cfg_network), sampling.precision)
        denoise = extrapolated_denoiser(denoise, unconditional, sampling.cfg_weight)
    if sampling.worse and not sampling.in_weights:
        worse = network_denoiser(load(sampling.worse), sampling.precision, one_hot)
        denoise = extrapolated_denoiser(denoise, worse, 1 + sampling.worse_weight)
    if guidance is None:
        return denoise
    guidance = equalised(sampling, guidance)
    guided = GuidedDenoiser(denoise, guidance.ensemble, guidance.weight_1st_order, guidance.weight_2nd_order,
                            guidance.time_min, guidance.time_max, sampling.precision, guidance.log_ratio,
                            labels if guidance.ensemble.conditional else None, guidance.change)
    return BOOSTING[guidance.boosting](guided)


def equalised(sampling: Sampling, guide: Guidance) -> Guidance:
    """The guidance with a first-order weight a step, such that its mean norm there is that of `equal_to`.

    Both norms are means over the images of PILOT, along their unguided trajectories.
    """
    if guide.equal_to is None:
        return guide
    plain, norms = make_denoiser(sampling), np.zeros((2, sampling.num_steps))
    pair = [make_denoiser(sampling, which) for which in (replace(guide, equal_to=None), guide.equal_to)]

    def watched(x, sigma, step, order):
        if order == 1:
            norms[:, step] = [one.guidance(x, sigma, step, 1).flatten(1).norm(dim=1).mean().item() for one in pair]
        return plain(x, sigma, step, order)

    draw(sampling, watched, PILOT)
    ratio = np.divide(norms[1], norms[0], out=np.zeros(sampling.num_steps), where=norms[0] > 0)
    return replace(guide, weight_1st_order=tuple(guide.weight_1st_order * ratio), equal_to=None)


def draw(sampling: Sampling, denoise, seeds, churn=None) -> torch.Tensor:
    """Images of these seeds, [N, C, H, W] in [-1, 1], in one batch, by any denoiser of the sampler's kind."""
    network = checkpoints.load_denoiser(sampling.score_network)
    noise = PerSampleNoise(seeds, network.shape, device())
    if sampling.sampler == "ancestral":
        return ancestral_sampler(denoise, noise, vp_sigmas(sampling.num_steps))
    sigmas = fitted_sigmas(network, sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    return edm_sampler(denoise, noise, sigmas, churn=churn, round_sigma=network.round_sigma)


def sample(sampling: Sampling, seeds, guidance: Guidance | None = None) -> torch.Tensor:
    """Images of these seeds, [N, C, H, W] in [-1, 1], in one batch, stored nowhere."""
    return drawn(sampling, seeds, guidance)[0]


def drawn(sampling: Sampling, seeds, guide: Guidance | None = None) -> tuple[torch.Tensor, np.ndarray | None]:
    """Images as of `sample`, and, if guidance rejects, what each asked for: as of `rejection_sampler`."""
    denoise = make_denoiser(sampling, guide, seeds)
    if not guide or not guide.rejection:
        return draw(sampling, denoise, seeds, denoise.churn if guide else None), None
    network, guide = checkpoints.load_denoiser(sampling.score_network), bounded(sampling, guide)
    sigmas = fitted_sigmas(network, sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    log_ratio = partial(log_density_ratio, guide.ensemble, precision=sampling.precision)
    noise = PerSampleNoise(seeds, network.shape, device())
    images, calls = sampler.rejection_sampler(denoise, log_ratio, noise, sigmas, guide.bounds)
    return images, calls.numpy()


def bounded(sampling: Sampling, guide: Guidance) -> Guidance:
    """The guidance with the bounds by which it rejects: `rejection_bounds` over the images of PILOT, drawn by it."""
    if not guide.rejection or guide.bounds:
        return guide
    require(sampling.sampler == "heun" and not sampling.conditional, "rejection needs Heun's steps, without classes")
    denoise, seen, sigmas = make_denoiser(sampling, guide), [], []

    def watched(x, sigma, step, order):
        if order == 1:
            seen.append(log_density_ratio(guide.ensemble, x, sigma, sampling.precision))
            sigmas.append(sigma[0])
        return denoise(x, sigma, step, order)

    draw(sampling, watched, PILOT)
    return replace(guide, bounds=tuple(rejection_bounds(torch.stack(seen), torch.stack(sigmas), guide.rejection,
                                                        guide.time_min, guide.time_max).tolist()))  # fmt: skip


@dataclass(eq=False)
class ImageSet:
    """The images of n seeds from first_seed on: `images` uint8 [n, H, W, C], `digest`, and a label for people.

    rows: where they are stored, in shards. sources: what is trained for them, discriminators or a copy of the network.
    Raises UserError for n < 1 and unknown networks, and, when they are drawn, for images that stop being finite.
    """

    store: Store
    sampling: Sampling
    n: int
    first_seed: int = 0
    guide: Guidance | None = None
    label: str = "images"

    def __post_init__(self):
        sampling, config = self.sampling, less_defaults(self.sampling)
        inputs = {role: checkpoints.weights_digest(config[role])
                  for role in ("score_network", "cfg_network") if role in config}
        if worse := sampling.worse:
            inputs["worse"] = checkpoints.weights_digest(worse) if isinstance(worse, str) else worse.digest
        if self.guide:
            config["guidance"] = less_defaults(self.guide, "discriminators")
            inputs["discriminators"] = self.guide.discriminators.digest
        artifact = self.store.artifact("generate", VERSIONS["generate"], config, inputs, self.label)
        self.rows = artifact.shards(sampling.shard_size, self.first_seed)
        self.digest, self.seeds = self.rows.digest(self.n), range(self.first_seed, self.first_seed + self.n)
        self.sources = self.guide.discriminators.trainings if self.guide else ()
        self.sources += (worse,) if worse and not isinstance(worse, str) else ()

    @property
    def lacks(self) -> bool:
        """Whether some of the images are still to be drawn."""
        return bool(self.rows.missing(self.n))

    def first(self, n: int) -> "ImageSet":
        """Its first n images alone."""
        return replace(self, n=min(n, self.n))

    def ensure(self) -> "ImageSet":
        """Have the images, and before them what guides them; the ranks of a group call it together."""
        if self.sources and ranks.group().agree(self.lacks):
            for trained in self.sources:
                trained.ensure()
        # a copy, whose networks go when the images are there
        guide = cache(lambda: self.guide and bounded(self.sampling, equalised(self.sampling, replace(self.guide))))

        def draw_shard(seeds):
            size = self.sampling.batch_size
            batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
            found = [drawn(self.sampling, batch, guide()) for batch in batches]
            calls = [calls for _, calls in found if calls is not None]
            return {"images": np.concatenate([datasets.to_uint8(images) for images, _ in found])} | (
                {"calls": np.concatenate(calls)} if calls else {})

        self.rows.ensure(self.n, draw_shard)
        return self

    @property
    def images(self) -> np.ndarray:
        """The pixels, read anew each time; drawn first, by this rank of a group alone, if some are missing."""
        with ranks.alone():
            self.ensure()
        return self.rows.load(self.n, "images")

    @property
    def calls(self) -> np.ndarray:
        """How often each image asked the denoiser, and, to be rejected or not, log r alone: int64 [n, 2]."""
        if not self.guide or not self.guide.rejection:
            count = self.sampling.num_steps
            return np.tile([sampler.nfe(count) if self.sampling.sampler == "heun" else count, 0], (self.n, 1))
        with ranks.alone():
            self.ensure()
        return self.rows.load(self.n, "calls")


@dataclass(frozen=True)
class RealSet:
    """`n` images of a dataset's split from `start` on, in canonical order; used like an ImageSet."""

    dataset: str
    split: str
    n: int
    start: int = 0

    seeds, sources, lacks = range(0), (), False  # real images have no seeds, and nothing is to be made for them

    def ensure(self) -> "RealSet":
        return self

    @property
    def label(self) -> str:
        return f"real {self.split} images"

    @property
    def digest(self) -> str:
        checksum = datasets.dataset_digest(self.dataset, self.split)
        return digest_of_json({"dataset": checksum, "start": self.start, "n": self.n})

    @property
    def images(self) -> np.ndarray:
        images, _ = datasets.load_dataset(self.dataset, self.split)
        stop = self.start + self.n
        require(0 <= self.start < stop <= len(images), f"{self.n} images from number {self.start} on: ask for at least "
                f"1, from 0 on; {self.dataset} has {len(images)} {self.split} images, not {stop}")
        return images[self.start : stop]


# ---- discriminators ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training(TrainingSettings):
    """How discriminators are trained: settings of the loop (table 1), and the data, frozen extractor and head.

    num_real: of real images, and of generated ones; the real ones from number first_real on, or, with a real_seed,
    drawn by it. precision: as of `Sampling`. held_out_every: of so many images, one validates and one tests. start: the
    shipped head that every member goes on from; "": random weights, of each its own. shuffled: a control, whose labels
    say nothing. denoiser: the score network whose error is the objective, as of `train_discriminators`; "": none.
    """

    dataset: str
    feature_extractor: str
    head: dict
    num_real: int
    precision: str = "auto"
    held_out_every: int = 10
    real_seed: int | None = None
    shuffled: bool = False
    first_real: int = 0
    start: str = ""
    denoiser: str = ""

    def __post_init__(self):
        object.__setattr__(self, "precision", resolve_precision(self.precision, pixels=False))


@dataclass(eq=False)
class Trained(Discriminators):
    """Discriminators that are trained: their `history`, and the images that no member has seen.

    better: images that they learn to tell from generated ones, in the place of real ones. sources: all such image sets.
    """

    store: Store
    config: Training
    fakes: ImageSet
    label: str = "discriminators"
    better: ImageSet | None = None

    def __post_init__(self):
        config, self.trainings, self.feature_extractor = self.config, (self,), self.config.feature_extractor
        self.sources = (self.fakes, self.better) if self.better else (self.fakes,)
        inputs = {"fakes": self.fakes.digest,
                  "real": self.better.digest if self.better else datasets.dataset_digest(config.dataset, "train"),
                  "feature_extractor": checkpoints.weights_digest(config.feature_extractor)}
        inputs |= {role: checkpoints.weights_digest(name) for role in ("start", "denoiser")
                   if (name := getattr(config, role))}
        identity = less_defaults(config) | {"members": [dataclasses.asdict(member) for member in config.members]}
        # Scores that the repository keeps are older than the choice of groups, which were of 4 channels.
        identity["head"] = {k: v for k, v in config.head.items() if (k, v) != ("num_group_channels", 4)}
        self.artifact = self.store.artifact("train", VERSIONS["train"], identity, inputs, self.label)
        self.digest = self.artifact.digest

    @property
    def lacks(self) -> bool:
        """Whether they are still to be trained."""
        return bool(self.artifact.lacks())

    def ensure(self, wait: bool = True) -> "Trained":
        """Have them trained, and before that the images they learn from; the ranks of a group call it together.

        Unless `wait`, discriminators that another process trains are left to it.
        """
        group = ranks.group()
        if group.agree(self.lacks):
            for images in self.sources:
                images.ensure()
        if self.config.parts > 1:
            group.ensure(self.artifact, self._train)
        else:
            with ranks.alone():  # one rank's work, while the others wait for the artifact
                self.artifact.ensure(self._train, wait)
        if wait:
            self.store.drop_partial(self.artifact.name)
        return self

    def _train(self, folder: Path) -> None:
        """Train them into a folder, from the last finished epoch on."""
        config, group, resume, name = self.config, ranks.group(), None, self.artifact.name

        def checkpoint(tensors, info):
            if group.rank == 0:
                state = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
                self.store.save_partial(name, json.dumps(info).encode() + b"\n" + state)
            group.stop_if_late()

        with group.first():  # one of them puts it into quarantine if it is damaged
            saved = self.store.load_partial(name)
        if saved:
            info, _, tensors = saved.partition(b"\n")
            resume = safetensors.torch.load(tensors), json.loads(info)
        learn, validate, _ = self.splits
        extractor = checkpoints.load_feature_extractor(config.feature_extractor).to(device())
        denoise = network_denoiser(checkpoints.load_denoiser(config.denoiser).to(device())) if config.denoiser else None
        done = sum(len(h) for h in resume[1]["histories"]) if resume else 0
        with bar(sum(m.epochs for m in config.members), self.label, done, group.main) as epochs:

            def progress(name, row):
                epochs.set_postfix_str(f"{name} {row['val_loss']:.3f}")
                epochs.update()

            members = train_discriminators(
                extractor, self._first_head, learn, validate,
                replace(config, clock=checkpoints.clock(config.feature_extractor)),
                progress, checkpoint, resume, group, denoise)
        states = {f"{m}.{which}.{k}": v for m, member in enumerate(members)
                  for which, state in (("last", member.last_state), ("best", member.best_state), *member.kept.items())
                  for k, v in state.items()}
        checkpoints.write_tensors(folder / "heads.safetensors", states, {})
        (folder / "history.json").write_text(json.dumps([member.history for member in members]))

    def _first_head(self, member: int):
        """The head that a member's training begins with."""
        head, start = init_head(self.config.head, self.config.seed, member), self.config.start
        if start:
            require(checkpoints.network_config(start) == self.config.head,
                    f"'{start}' has other widths or blocks: set head_start to ''")
            head.load_state_dict(checkpoints.load_discriminator(start).state_dict())
        return head

    @property
    def _folder(self) -> Path:
        with ranks.alone():  # as in `ImageSet.images`
            self.ensure()
        return self.artifact.path

    @cached_property
    def history(self) -> list[list[dict]]:
        """For each member one row an epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy."""
        return json.loads((self._folder / "history.json").read_text())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return checkpoints.read_tensors(self._folder / "heads.safetensors")[0]

    def head(self, member: int | tuple[int, int], state: str):
        """A member in a state: "last", "best" (lowest validation loss), or "initial".

        "initial", random weights, is the control: what a push by a network that knows nothing does. A member may also
        be a pair (member, epoch) of those that the training kept, whatever `state` is.
        """
        m, which = (member[0], f"epoch{member[1]}") if isinstance(member, tuple) else (member, state)
        head, prefix = init_head(self.config.head, self.config.seed, m), f"{m}.{which}."
        if which == "initial":
            return head
        weights = {k.removeprefix(prefix): v for k, v in self._tensors.items() if k.startswith(prefix)}
        require(weights, f"no discriminator {m} in state '{which}': states are last, best, initial and "
                f"{self.config.kept}, members 0 to {len(self.config.members) - 1}")
        head.load_state_dict(weights)
        return head

    @property
    def splits(self) -> list[Split]:
        """Train, validation and test parts of as many real (or `better`) as generated images, stratified, seeded."""
        config, n, fakes = self.config, self.config.num_real, self.fakes.images
        real, labels = (self.better.images, np.full(self.better.n, -1)) if self.better else \
            [part[config.first_real :] for part in datasets.load_dataset(config.dataset, "train")]
        require(n == len(fakes) and 10 <= n <= len(real),
                f"{n} real and {len(fakes)} generated images: give as many of each, from 10 to {len(real)}")
        if config.real_seed is not None:
            chosen = keyed_rng(config.real_seed, RESAMPLING).permutation(len(real))[:n]
            real, labels = real[chosen], labels[chosen]
        parts = [datasets.split_indices(of, config.seed, config.held_out_every) for of in (labels[:n], np.full(n, -1))]
        splits = [Split(np.concatenate([real[r], fakes[f]]), np.repeat([1, 0], [len(r), len(f)]))
                  for r, f in zip(*parts, strict=True)]
        if config.shuffled:
            for number, split in enumerate(splits):
                keyed_rng(config.seed, number, RESAMPLING).shuffle(split.labels)
        return splits

    def temperature(self, member: int, state: str) -> float:
        """What divides its logits for the least cross-entropy on validation images (Guo et al. 2017, section 4)."""
        split, config = self.splits[1], self.config
        ensemble, vp_times = self.ensemble([member], state=state).to(device()), np.geomspace(0.01, 0.7, 12)
        (logits,) = evaluate_logits(ensemble, split.images, vp_times, config.seed, config.batch_size, config.precision)

        def loss(log_temperature):
            scaled = logits.astype(np.float64) / math.exp(log_temperature)
            return float(np.mean(np.logaddexp(0, scaled) - split.labels * scaled))

        return math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)

    @cached_property
    def test_split(self) -> Split:
        """The images that no member was trained or validated on."""
        return self.splits[2]


@dataclass(eq=False)
class Joint(Discriminators):
    """The first members of several trainings on one extractor: member m is the first of training m."""

    trainings: tuple[Trained, ...]

    def __post_init__(self):
        self.feature_extractor = self.trainings[0].feature_extractor
        self.digest = digest_of_json([trained.digest for trained in self.trainings])

    def head(self, member: int, state: str):
        return self.trainings[member].head(0, state)


def held_out_logits(store: Store, trained: Trained, vp_times) -> tuple[np.ndarray, np.ndarray]:
    """Logits [M, levels, N] of all members on the test split at each VP time, and its labels [N]."""
    def make(folder):
        config, images = trained.config, trained.test_split.images
        ensemble = trained.ensemble(range(len(config.members))).to(device())
        logits = evaluate_logits(ensemble, images, vp_times, config.seed, config.batch_size, config.precision)
        np.save(folder / "logits.npy", logits)

    config = {"vp_times": [float(t) for t in vp_times], "state": "last"}
    artifact = store.artifact("logits", VERSIONS["logits"], config, {"discriminators": trained.digest},
                              "held-out logits")
    return np.load(artifact.ensure(make).path / "logits.npy", allow_pickle=False), trained.test_split.labels


# ---- scores ------------------------------------------------------------------------------


def features(store: Store, images: ImageSet | RealSet, space: str) -> np.ndarray:
    """Features float32 [n, d] in `space`: "efficientnet-lite0@128", "inception", or an extractor's name.

    Made in shards of equally many images, at most FEATURE_SHARD, so that ranks share them and a kill costs one.
    """
    inputs, pixels = {"images": images.digest}, cache(lambda: images.images)
    if not space.startswith("efficientnet"):  # whose extractor is in its name
        inputs["feature_extractor"] = checkpoints.weights_digest(space)
    artifact = store.artifact("features", VERSIONS["features"], {"space": space}, inputs, f"{images.label}, {space}")
    rows = artifact.shards(math.ceil(images.n / math.ceil(images.n / FEATURE_SHARD)))
    if ranks.group().agree(bool(rows.missing(images.n))):
        images.ensure()

    def compute_shard(rows):
        try:
            values = image_features(pixels()[rows.start : rows.stop], space, device=str(device()))
        except NotFiniteRows as error:  # it counts from the shard's first
            numbers = [rows.start + row for row in error.rows[:8]]
            which = f"seeds {[images.seeds[i] for i in numbers]}" if images.seeds else f"images {numbers}"
            raise UserError(f"{images.label}: the {space} features of {len(error.rows)} images are not finite, "
                            f"{which}: look at them, and at the networks that drew them") from error
        return {"features": np.pad(values, ((0, len(rows) - len(values)), (0, 0)))}  # the last shard may want a few

    return rows.ensure(images.n, compute_shard).load(images.n, "features")


@dataclass(frozen=True)
class Scores:
    """Scores of one arm against real images in one feature space; manifold: precision, recall, density, coverage."""

    arm: ImageSet | RealSet
    space: str
    digest: str  # of the artifact
    fd: metrics.Resampled
    kid: metrics.Resampled
    manifold: dict[str, float]

    def change(self, baseline: "Scores", score: str = "fd") -> metrics.Resampled:
        """Paired difference to a baseline in "fd" or "kid". Raises UserError unless made from the same seeds."""
        require((self.arm.seeds, self.space) == (baseline.arm.seeds, baseline.space),
                f"{self.arm.label} and {baseline.arm.label} have other seeds or spaces: a paired comparison needs "
                "equal first_seed, n and space")
        return getattr(self, score) - getattr(baseline, score)

    def minus(self, baseline: "Scores", score: str = "fd") -> metrics.Interval:
        """The interval of the paired difference."""
        return self.change(baseline, score).interval()


@dataclass(eq=False)
class Score:
    """An arm that is to be scored against real images in a feature space: by name alone, until `ensure`."""

    store: Store
    images: ImageSet | RealSet
    reference: RealSet
    space: str
    num_resamples: int = 200
    linear_from: float = 20  # of `metrics.FrechetReference`

    def __post_init__(self):
        inputs = {"arm": self.images.digest, "reference": self.reference.digest}
        config = {"space": self.space, "num_resamples": self.num_resamples, "seed": 0}
        config |= {"linear_from": self.linear_from} if self.linear_from != 20 else {}
        self.artifact = self.store.artifact("evaluate", VERSIONS["evaluate"], config, inputs,
                                            f"{self.images.label}, {self.space}")

    @property
    def lacks(self) -> bool:
        """Whether the scores are still to be computed: neither stored nor kept by the repository."""
        return self.artifact.digest not in self.store.kept and bool(self.artifact.lacks())

    def ensure(self) -> Scores:
        """Fréchet distance, unbiased KID (both with bootstrap draws), precision/recall, density/coverage of the arm.

        Where the repository keeps these scores, and the store lacks them, no image is drawn for them.
        """
        record = self.store.kept.get(self.artifact.digest)
        if record and self.artifact.lacks():
            self.artifact.say(True, f"kept in {self.store.keeps}")
        else:
            record = json.loads((self.artifact.ensure(self._make).path / "scores.json").read_text())
        fd, kid = (metrics.Resampled(record[name]["value"], np.array(record[name]["draws"])) for name in ("fd", "kid"))
        return Scores(self.images, self.space, self.artifact.digest, fd, kid, record["manifold"])

    def _make(self, folder: Path) -> None:
        x, real = (features(self.store, images, self.space) for images in (self.images, self.reference))
        fd = metrics.resample(metrics.FrechetReference(real, self.linear_from), x, self.num_resamples, seed=0)
        pairs = metrics.PairReference(real, device=device()).compare(x, self.num_resamples, seed=0)
        record = {name: {"value": resampled.value, "draws": resampled.draws.tolist()}
                  for name, resampled in (("fd", fd), ("kid", pairs.kid))}
        (folder / "scores.json").write_text(json.dumps({"manifold": pairs.manifold} | record))


@dataclass(eq=False)
class Likelihood:
    """How likely real images are under a score network, guided or not (dgutils/likelihood.py); by name until `ensure`.

    A likelihood is a field's, not a sampler's: guidance acts everywhere by the mean of its two weights, unboosted; in
    float32. The noise is keyed by the number of the image, so that guided and unguided likelihoods share it.
    """

    store: Store
    images: RealSet
    sampling: Sampling
    guide: Guidance | None = None
    label: str = "likelihood"
    levels: int = 24

    def __post_init__(self):
        self.sampling, self.n, self.sources = replace(self.sampling, precision="float32"), self.images.n, ()
        network, sigma_max = self.sampling.score_network, self.sampling.sigma_max
        config = {"score_network": network, "sigma_max": sigma_max, "levels": self.levels}
        inputs = {"images": self.images.digest, "score_network": checkpoints.weights_digest(network)}
        if self.guide:
            weight = (self.guide.weight_1st_order + self.guide.weight_2nd_order) / 2
            self.sources = self.guide.discriminators.trainings
            self.guide = replace(self.guide, weight_1st_order=weight, weight_2nd_order=weight, boosting="none")
            config["guidance"] = less_defaults(self.guide, "discriminators")
            inputs["discriminators"] = self.guide.discriminators.digest
        artifact = self.store.artifact("likelihood", VERSIONS["likelihood"], config, inputs, self.label)
        self.rows = artifact.shards(min(self.sampling.batch_size, self.n))
        self.digest = self.rows.digest(self.n)

    lacks = ImageSet.lacks

    def ensure(self) -> metrics.Resampled:
        """Bits a dimension, the mean over images: `.interval()`, or `.minus()` that of the same images, guided else.

        What guides is trained first. The ranks of a group call it together.
        """
        for trained in self.sources if ranks.group().agree(self.lacks) else ():
            trained.ensure()

        def compute_shard(rows):
            images = self.images.images[rows.start : rows.stop]
            seeds, sigmas = rows[: len(images)], likelihood.noise_levels(self.sampling.sigma_max, self.levels)
            x = likelihood.dequantise(images, seeds).to(device())
            found = likelihood.log_density(make_denoiser(self.sampling, self.guide), x, seeds, sigmas)
            bits = likelihood.bits_per_dim(found, x[0].numel()).numpy(force=True)
            return {"bits": np.pad(bits, (0, len(rows) - len(bits)))}  # the last shard may want a few

        bits = self.rows.ensure(self.n, compute_shard).load(self.n, "bits")
        return metrics.resample(np.mean, bits, 1000, seed=0)
