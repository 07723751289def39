"""The study's steps: draw images, train discriminators, extract features, score. Each is found, not redone.

A step takes a store and a frozen config, and computes the artifact of that identity only if the store lacks it.
VERSIONS are the steps' numerical versions: raise one when its numbers change, and only then (tests/test_jobs.py
fails when numbers change and the version does not).
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dgutils import datasets, metrics
from dgutils.arrays import NotFiniteRows
from dgutils.discriminator import Ensemble, MemberConfig, evaluate_logits
from dgutils.errors import UserError
from dgutils.guidance import BOOSTING, GuidedDenoiser, check_settings
from dgutils.machine import device, log_line, resolve_precision
from dgutils.networks import checkpoints
from dgutils.networks.adm import init_head
from dgutils.networks.features import encode
from dgutils.noise import PerSampleNoise, class_labels, karras_sigmas, vp_sigmas
from dgutils.paths import results_dir, runs_dir, torchrun_ranks, verbose
from dgutils.pipeline import ranks
from dgutils.pipeline.store import KEPT, Artifact, ShardedSet, Store, digest_of_json
from dgutils.sampler import ancestral_sampler, classifier_free_denoiser, edm_sampler, fitted_sigmas, network_denoiser
from dgutils.terminal import bar, note
from dgutils.training import Split, TrainingSettings, train_discriminators

VERSIONS = {"generate": 1, "train": 1, "logits": 1, "features": 1, "statistics": 1, "evaluate": 1}
FEATURE_SHARD = 1000  # images whose features are one file, at most


def open_store(profile: str) -> Store:
    """The artifacts of a profile, under runs/<profile>/store. Results of different profiles never mix.

    Its lines go to the profile's log. What is damaged is also said, and what one waits for (ranks often do), and all
    of them where the user wants it.
    """
    def log(line):
        note(profile, line)
        waits = line.startswith("WAIT") and not torchrun_ranks()
        if line.startswith("QUARANTINED") or ranks.group().main and (waits or verbose()):
            log_line(line)

    return Store(runs_dir(profile) / "store", log, results_dir(profile) / KEPT)


def less_defaults(config) -> dict:
    """The fields of a frozen config that differ from their defaults: its identity in the store.

    A field added later, with a default that means what was done before, leaves identities alone; defaults never change.
    """
    return {f.name: value for f in dataclasses.fields(config) if (value := getattr(config, f.name)) != f.default}


# ---- images ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: the network, EDM's schedule (table 2 of the study), and the fixed batch layout.

    sampler: "heun" (EDM), or "ancestral" (DDPM, on VP times: the schedule's other numbers are not used).
    s_max: None for no limit. conditional: every image has a class, a function of its seed.
    cfg_network: the unconditional network of classifier-free guidance, of weight cfg_weight; "" for none.
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
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float | None = None
    s_noise: float = 1.0
    conditional: bool = False
    cfg_network: str = ""
    cfg_weight: float = 1.0

    def __post_init__(self):
        if self.sampler not in ("heun", "ancestral"):
            raise UserError(f"unknown sampler '{self.sampler}': choose heun or ancestral")
        if self.sampler == "heun":
            karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)
        if self.s_churn < 0 or self.s_noise < 0:
            raise UserError(f"s_churn {self.s_churn} and s_noise {self.s_noise} must not be negative")
        if self.batch_size < 1 or self.shard_size % self.batch_size:
            raise UserError(f"shard_size {self.shard_size} is not a multiple of batch_size {self.batch_size}")
        if self.cfg_network and not self.conditional:
            raise UserError("classifier-free guidance needs conditional sampling: set conditional")


def _ensemble(feature_extractor: str, heads: list, rule: str) -> Ensemble:
    return Ensemble(checkpoints.load_feature_extractor(feature_extractor), heads, rule,
                    checkpoints.clock(feature_extractor))  # fmt: skip


@dataclass(frozen=True)
class Published:
    """Discriminators whose weights are published, for a `Guidance` in the place of trained ones."""

    feature_extractor: str
    discriminators: tuple[str, ...]

    @property
    def digest(self) -> str:
        names = (self.feature_extractor, *self.discriminators)
        return digest_of_json([checkpoints.weights_digest(name) for name in names])

    trainings = ()  # nothing is to be trained

    def ensemble(self, members, rule: str, state: str) -> Ensemble:
        """Heads `members` on their extractor; they have one state only, "last"."""
        if state != "last":
            raise UserError(f"published discriminators have no state '{state}'")
        heads = [checkpoints.load_discriminator(self.discriminators[m]) for m in members]
        return _ensemble(self.feature_extractor, heads, rule)


@dataclass(frozen=True)
class Guidance:
    """Which discriminators guide, how they are combined, and how strongly (table 2)."""

    discriminators: "Trained | Published | Joint"
    members: tuple[int | tuple[int, int], ...]
    rule: str = "mean_logit"
    state: str = "last"
    weight_1st_order: float = 2.0
    weight_2nd_order: float = 0.0
    time_min: float = 0.01
    time_max: float = 1.0
    boosting: str = "none"
    log_ratio: str = "logit"

    def __post_init__(self):
        check_settings(self.weight_1st_order, self.weight_2nd_order, self.time_min, self.time_max, self.boosting,
                       self.log_ratio)  # fmt: skip

    def ensemble(self) -> Ensemble:
        """The discriminators, loaded on the device."""
        return self.discriminators.ensemble(self.members, self.rule, self.state).to(device())

    def config(self) -> dict:
        """What tells two guidances apart, without the discriminators, whose digest is an input."""
        return {name: value for name, value in less_defaults(self).items() if name != "discriminators"}


@dataclass(frozen=True)
class ImageSet:
    """The first n images of a set: `images` uint8 [n, H, W, C], `digest`, and a label for people.

    Named before it is drawn, as `sampling` and `guide` say: what is missing is drawn when somebody asks for it.
    """

    label: str
    n: int
    rows: ShardedSet
    sampling: Sampling | None = field(default=None, repr=False, compare=False)
    guide: Guidance | None = field(default=None, repr=False, compare=False)

    @property
    def digest(self) -> str:
        return self.rows.digest(self.n)

    @property
    def lacks(self) -> bool:
        """Whether some of the images are still to be drawn."""
        return bool(self.rows.missing(self.n))

    @property
    def sources(self) -> tuple:
        """The trained discriminators that guide it."""
        return self.guide.discriminators.trainings if self.guide else ()

    def ensure(self) -> "ImageSet":
        """Have the images, and before them what guides them; the ranks of a group call it together."""
        if self.sources and ranks.group().agree(self.lacks):
            for trained in self.sources:
                trained.ensure()
        ensemble = cache(lambda: self.guide.ensemble() if self.guide else None)  # loaded when the first shard wants it

        def draw_shard(seeds):
            size = self.sampling.batch_size
            batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
            images = [datasets.to_uint8(sample(self.sampling, batch, self.guide, ensemble())) for batch in batches]
            return {"images": np.concatenate(images)}

        self.rows.ensure(self.n, draw_shard)
        return self

    def first(self, n: int) -> "ImageSet":
        """Its first n images alone."""
        return replace(self, n=min(n, self.n))

    @cached_property
    def images(self) -> np.ndarray:
        with ranks.alone():  # of a group, this rank alone asks, for what is there
            self.ensure()
        return self.rows.load(self.n, "images")

    @property
    def seeds(self) -> range:
        return range(self.rows.first_seed, self.rows.first_seed + self.n)


def make_denoiser(sampling: Sampling, guidance: Guidance | None = None, seeds=(), ensemble: Ensemble | None = None):
    """The sampler's callable for a config: the score network, guided or not. seeds: whose classes, if conditional.

    ensemble: the discriminators of the guidance, if they are loaded already.
    """
    precision = resolve_precision(sampling.precision)
    network = checkpoints.load_denoiser(sampling.score_network).to(device())
    labels = one_hot = None
    if sampling.conditional:
        if not network.label_dim:
            raise UserError(f"'{sampling.score_network}' knows no classes: choose a class-conditional network")
        labels = class_labels(seeds, network.label_dim).to(device())
        one_hot = torch.nn.functional.one_hot(labels, network.label_dim).float()
    denoise = network_denoiser(network, precision, one_hot)
    if sampling.cfg_network:
        unconditional = checkpoints.load_denoiser(sampling.cfg_network).to(device())
        denoise = classifier_free_denoiser(denoise, network_denoiser(unconditional, precision), sampling.cfg_weight)
    if guidance is None:
        return denoise
    ensemble = ensemble or guidance.ensemble()
    guided = GuidedDenoiser(denoise, ensemble, guidance.weight_1st_order, guidance.weight_2nd_order, guidance.time_min,
                            guidance.time_max, precision, guidance.log_ratio,
                            labels if ensemble.conditional else None)  # fmt: skip
    return BOOSTING[guidance.boosting](guided)


def draw(sampling: Sampling, denoise, seeds, churn=None) -> torch.Tensor:
    """Images of these seeds, [N, C, H, W] in [-1, 1], in one batch, by any denoiser of the sampler's kind."""
    network = checkpoints.load_denoiser(sampling.score_network)
    noise = PerSampleNoise(seeds, network.shape, device())
    if sampling.sampler == "ancestral":
        return ancestral_sampler(denoise, noise, vp_sigmas(sampling.num_steps))
    sigmas = fitted_sigmas(network, sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    return edm_sampler(denoise, noise, sigmas, sampling.s_churn, sampling.s_min,
                       math.inf if sampling.s_max is None else sampling.s_max, sampling.s_noise,
                       churn, network.round_sigma)  # fmt: skip


def sample(sampling: Sampling, seeds, guidance: Guidance | None = None,
           ensemble: Ensemble | None = None) -> torch.Tensor:  # fmt: skip
    """Images of these seeds, [N, C, H, W] in [-1, 1], in one batch, stored nowhere; ensemble: as above."""
    denoise = make_denoiser(sampling, guidance, seeds, ensemble)
    return draw(sampling, denoise, seeds, denoise.churn if guidance else None)


def image_set(store: Store, sampling: Sampling, n: int, first_seed: int = 0, guidance: Guidance | None = None,
              label: str = "images") -> ImageSet:  # fmt: skip
    """The images of seeds first_seed ... first_seed + n - 1; drawn when they are needed.

    Raises UserError for n < 1 and unknown networks, and, when they are drawn, for images that stop being finite.
    """
    sampling = replace(sampling, precision=resolve_precision(sampling.precision))
    config = less_defaults(sampling) | ({"guidance": guidance.config()} if guidance else {})
    inputs = {"score_network": checkpoints.weights_digest(sampling.score_network)}
    if sampling.cfg_network:
        inputs["cfg_network"] = checkpoints.weights_digest(sampling.cfg_network)
    if guidance:
        inputs["discriminators"] = guidance.discriminators.digest
    artifact = store.artifact("generate", VERSIONS["generate"], config, inputs, label)
    rows = artifact.shards(sampling.shard_size, first_seed)
    rows.parts(n)  # refuses n < 1
    return ImageSet(label, n, rows, sampling, guidance)


# ---- discriminators ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How discriminators are trained: data, frozen extractor, head, and the members of table 1.

    kept: (member, epoch) pairs whose states are kept besides the last and the best. resampling: which images a
    member sees, a name of `discriminator.RESAMPLINGS`. parts: that a batch is divided into, for as many ranks at most.
    """

    dataset: str
    feature_extractor: str
    head: dict
    members: tuple[MemberConfig, ...]
    num_real: int
    batch_size: int = 128
    seed: int = 0
    sequential: bool = False
    precision: str = "auto"
    held_out_every: int = 10
    kept: tuple[tuple[int, int], ...] = ()
    resampling: str = "none"
    parts: int = 1


@dataclass(frozen=True)
class Trained:
    """Trained discriminators: `history` per member, `ensemble(...)` for guidance, and the held-out split.

    Named before they are trained, which happens when somebody asks for them. better: images in the place of real ones.
    """

    config: Training
    fakes: ImageSet
    artifact: Artifact
    better: ImageSet | None = None

    @property
    def digest(self) -> str:
        return self.artifact.digest

    @property
    def lacks(self) -> bool:
        """Whether they are still to be trained."""
        return not self.artifact.status().hit

    @property
    def trainings(self) -> tuple["Trained", ...]:
        """What is to be trained for them: themselves."""
        return (self,)

    @property
    def sources(self) -> tuple[ImageSet, ...]:
        """The generated images that they learn from."""
        return (self.fakes,) if self.better is None else (self.fakes, self.better)

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
            self.artifact.store.drop_partial(self.artifact.name)
        return self

    def _train(self, folder: Path) -> dict:
        """Train them into a folder, from the last finished epoch on."""
        config, group, resume = self.config, ranks.group(), None
        store, name = self.artifact.store, self.artifact.name

        def checkpoint(tensors, info):
            if group.rank == 0:
                state = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
                store.save_partial(name, json.dumps(info).encode() + b"\n" + state)
            group.stop_if_late()

        with group.first():  # one of them puts it into quarantine if it is damaged
            saved = store.load_partial(name)
        if saved:
            info, _, tensors = saved.partition(b"\n")
            resume = safetensors.torch.load(tensors), json.loads(info)
        learn, validate, _ = self.splits
        extractor = checkpoints.load_feature_extractor(config.feature_extractor).to(device())
        done = sum(len(h) for h in resume[1]["histories"]) if resume else 0
        with bar(sum(m.epochs for m in config.members), self.artifact.label, done, group.main) as epochs:

            def progress(name, row):
                epochs.set_postfix_str(f"{name} {row['val_loss']:.3f}")
                epochs.update()

            settings = TrainingSettings(
                config.members, config.batch_size, config.seed, config.precision,
                checkpoints.clock(config.feature_extractor), config.sequential, config.resampling, config.kept,
                config.parts)  # fmt: skip
            members = train_discriminators(extractor, partial(init_head, config.head, config.seed), learn, validate,
                                           settings, progress, checkpoint, resume, group)  # fmt: skip
        states = {f"{m}.{which}.{k}": v for m, member in enumerate(members)
                  for which, state in (("last", member.last_state), ("best", member.best_state), *member.kept.items())
                  for k, v in state.items()}  # fmt: skip
        checkpoints.write_tensors(folder / "heads.safetensors", states, {})
        (folder / "history.json").write_text(json.dumps([member.history for member in members]))
        return {"seed": config.seed}

    def _file(self, name: str) -> Path:
        with ranks.alone():  # as in `ImageSet.images`
            self.ensure()
        return self.artifact.path / name

    @cached_property
    def history(self) -> list[list[dict]]:
        """For each member one row an epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy."""
        return json.loads(self._file("history.json").read_text())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return checkpoints.read_tensors(self._file("heads.safetensors"))[0]

    def ensemble(self, members=None, rule: str = "mean_logit", state: str = "last") -> Ensemble:
        """Heads `members` (default: all) in a state: "last", "best" (lowest validation loss), or "initial".

        "initial", before any training, is the control: what a push by a network that knows nothing does. A member
        may also be a pair (member, epoch) of those that the training kept, whatever `state` is.
        """
        every = range(len(self.config.members))
        wanted = [(m[0], f"epoch{m[1]}") if isinstance(m, tuple) else (m, state)
                  for m in (every if members is None else members)]  # fmt: skip
        known = [(m, which) for m in every for which in ("last", "best", "initial")]
        known += [(m, f"epoch{epoch}") for m, epoch in self.config.kept]
        if missing := [pair for pair in wanted if pair not in known]:
            raise UserError(f"no discriminator {missing[0][0]} in state '{missing[0][1]}': states are last, best, "
                            f"initial and {self.config.kept}, members 0 to {len(self.config.members) - 1}")  # fmt: skip
        heads = []
        for m, which in wanted:
            prefix, head = f"{m}.{which}.", init_head(self.config.head, self.config.seed, m)
            if which != "initial":
                head.load_state_dict({k.removeprefix(prefix): v for k, v in self._tensors.items()
                                      if k.startswith(prefix)})  # fmt: skip
            heads.append(head)
        return _ensemble(self.config.feature_extractor, heads, rule)

    @property
    def splits(self) -> list[Split]:
        """Train, validation and test parts of as many real (or `better`) as generated images, stratified, seeded."""
        config, n = self.config, self.config.num_real
        real, labels = (self.better.images, np.full(self.better.n, -1)) if self.better else \
            datasets.load_dataset(config.dataset, "train")
        if n != self.fakes.n or n > len(real) or n < 10:
            raise UserError(f"{n} real and {self.fakes.n} generated images: give as many of each, from 10 to "
                            f"{len(real)}")
        parts = [datasets.split_indices(of, config.seed, config.held_out_every) for of in (labels[:n], np.full(n, -1))]
        return [Split(np.concatenate([real[r], self.fakes.images[f]]), np.repeat([1, 0], [len(r), len(f)]))
                for r, f in zip(*parts, strict=True)]  # fmt: skip

    @cached_property
    def test_split(self) -> Split:
        """The images that no member was trained or validated on."""
        return self.splits[2]


@dataclass(frozen=True)
class Joint:
    """The first members of several trainings on one extractor, for a `Guidance` in the place of one training's."""

    parts: tuple[Trained, ...]

    @property
    def digest(self) -> str:
        return digest_of_json([part.digest for part in self.parts])

    @property
    def trainings(self) -> tuple[Trained, ...]:
        """What is to be trained for them."""
        return self.parts

    def ensemble(self, members, rule: str, state: str) -> Ensemble:
        """Member m is the first of training m."""
        heads = [self.parts[m].ensemble((0,), rule, state).heads[0] for m in members]
        return _ensemble(self.parts[0].config.feature_extractor, heads, rule)


def discriminators(store: Store, training: Training, fakes: ImageSet, label: str = "discriminators",
                   better: ImageSet | None = None) -> Trained:  # fmt: skip
    """The members, trained when they are needed, on real images or on `better` ones in their place."""
    training = replace(training, precision=resolve_precision(training.precision, pixels=False))
    real = better.digest if better else datasets.dataset_digest(training.dataset, "train")
    inputs = {"fakes": fakes.digest, "real": real,
              "feature_extractor": checkpoints.weights_digest(training.feature_extractor)}  # fmt: skip
    config = less_defaults(training) | {"members": [dataclasses.asdict(member) for member in training.members]}
    artifact = store.artifact("train", VERSIONS["train"], config, inputs, label)

    return Trained(training, fakes, artifact, better)


def held_out_logits(store: Store, trained: Trained, vp_times) -> tuple[np.ndarray, np.ndarray]:
    """Logits [M, levels, N] of all members on the test split at each VP time, and its labels [N]."""
    config = {"vp_times": [float(t) for t in vp_times], "state": "last"}
    artifact = store.artifact("logits", VERSIONS["logits"], config, {"discriminators": trained.digest},
                              "held-out logits")  # fmt: skip

    def make(folder):
        ensemble = trained.ensemble().to(device())
        logits = evaluate_logits(ensemble, trained.test_split.images, vp_times, trained.config.seed,
                                 trained.config.batch_size, trained.config.precision)  # fmt: skip
        np.save(folder / "logits.npy", logits)

    path = artifact.ensure(make).path / "logits.npy"
    return np.load(path, allow_pickle=False), trained.test_split.labels


# ---- scores ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealSet:
    """`n` images of a dataset's split from `start` on, in canonical order; used like an ImageSet."""

    dataset: str
    split: str
    n: int
    start: int = 0

    seeds, sources, lacks = range(0), (), False  # real images have no seeds, and nothing is to be made for them

    def ensure(self) -> "RealSet":
        """Nothing is to be drawn; as `ImageSet.ensure`."""
        return self

    @property
    def label(self) -> str:
        return f"real {self.split} images"

    @property
    def digest(self) -> str:
        checksum = datasets.dataset_digest(self.dataset, self.split)
        return digest_of_json({"dataset": checksum, "start": self.start, "n": self.n})

    @cached_property
    def images(self) -> np.ndarray:
        images, _ = datasets.load_dataset(self.dataset, self.split)
        if self.n < 1 or self.start < 0:
            raise UserError(f"{self.n} real images from number {self.start} on: ask for at least 1, from 0 on")
        if self.start + self.n > len(images):
            raise UserError(f"{self.dataset} has {len(images)} {self.split} images, not {self.start + self.n}")
        return images[self.start : self.start + self.n]


def _of_features(store: Store, step: str, images: "ImageSet | RealSet", space: str) -> Artifact:
    """The artifact of a step on an image set's features; the extractor of a published space is in its name."""
    extractor = {} if space.startswith("efficientnet") else {"feature_extractor": checkpoints.weights_digest(space)}
    return store.artifact(step, VERSIONS[step], {"space": space}, {"images": images.digest} | extractor,
                          f"{images.label}, {space}")  # fmt: skip


def feature_rows(store: Store, images: ImageSet | RealSet, space: str) -> ShardedSet:
    """Where the features of an image set are stored, in shards of equally many images, at most FEATURE_SHARD."""
    size = math.ceil(images.n / math.ceil(images.n / FEATURE_SHARD))
    return _of_features(store, "features", images, space).shards(size)


def features(store: Store, images: ImageSet | RealSet, space: str) -> np.ndarray:
    """Features float32 [n, d] in `space`: "efficientnet-lite0@128", "inception", or an extractor's name.

    Made in shards, so that ranks share them and a kill costs one.
    """
    rows = feature_rows(store, images, space)
    if ranks.group().agree(bool(rows.missing(images.n))):
        images.ensure()
    source = replace(images)  # a copy, whose pixels go when the features are there

    def compute_shard(rows):
        try:
            values = encode(source.images[rows.start : rows.stop], space, str(device()))
        except NotFiniteRows as error:  # it counts from the shard's first
            numbers = [rows.start + row for row in error.rows[:8]]
            which = f"seeds {[images.seeds[i] for i in numbers]}" if images.seeds else f"images {numbers}"
            raise UserError(f"{images.label}: the {space} features of {len(error.rows)} images are not finite, "
                            f"{which}: look at them, and at the networks that drew them") from error
        return {"features": np.pad(values, ((0, len(rows) - len(values)), (0, 0)))}  # the last shard may want a few

    return rows.ensure(images.n, compute_shard).load(images.n, "features")


def statistics(store: Store, images: ImageSet | RealSet, space: str) -> metrics.FeatureStats:
    """Mean and covariance of a set's features, in float64."""
    def make(folder):
        stats = metrics.FeatureStats.of(features(store, images, space))
        np.savez(folder / "statistics.npz", n=stats.n, mean=stats.mean, scatter=stats.scatter)

    path = ranks.group().ensure(_of_features(store, "statistics", images, space), make).path / "statistics.npz"
    with np.load(path, allow_pickle=False) as stored:
        return metrics.FeatureStats(int(stored["n"]), stored["mean"], stored["scatter"])


@dataclass(frozen=True)
class Scores:
    """Scores of one arm against real images in one feature space.

    fd, kid: metrics.Resampled, with `.interval()` and `.minus(other)`; manifold: precision, recall, density,
    coverage. `digest` names the artifact.
    """

    arm: ImageSet | RealSet
    space: str
    digest: str
    fd: metrics.Resampled
    kid: metrics.Resampled
    manifold: dict[str, float]

    def minus(self, baseline: "Scores", score: str = "fd") -> metrics.Interval:
        """Paired difference to a baseline in "fd" or "kid". Raises UserError unless made from the same seeds."""
        if self.arm.seeds != baseline.arm.seeds or self.space != baseline.space:
            raise UserError(f"{self.arm.label} and {baseline.arm.label} have other seeds or spaces: "
                            "a paired comparison needs equal first_seed, n and space")  # fmt: skip
        return getattr(self, score).minus(getattr(baseline, score))


@dataclass(frozen=True, eq=False)
class Score:
    """An arm that is to be scored against real images in a feature space: by name alone, until `ensure`."""

    store: Store
    images: ImageSet | RealSet
    reference: RealSet
    space: str
    num_resamples: int = 200
    seed: int = 0

    @cached_property
    def artifact(self) -> Artifact:
        """Where the scores are stored."""
        inputs = {"arm": self.images.digest, "reference": self.reference.digest}
        config = {"space": self.space, "num_resamples": self.num_resamples, "seed": self.seed}
        return self.store.artifact("evaluate", VERSIONS["evaluate"], config, inputs,
                                   f"{self.images.label}, {self.space}")  # fmt: skip

    @property
    def lacks(self) -> bool:
        """Whether the scores are still to be computed: neither stored nor kept by the repository."""
        return self.artifact.digest not in self.store.kept and not self.artifact.status().hit

    def ensure(self) -> Scores:
        """Fréchet distance, unbiased KID (both with bootstrap draws), precision/recall, density/coverage of the arm.

        Where the repository keeps these scores (`Artifact.kept`), no image is drawn for them.
        """
        kept = self.artifact.kept()
        record = kept or json.loads((self.artifact.ensure(self._make).path / "scores.json").read_text())
        fd, kid = (metrics.Resampled(record[k]["value"], np.array(record[k]["draws"])) for k in ("fd", "kid"))
        return Scores(self.images, self.space, self.artifact.digest, fd, kid, record["manifold"])

    def _make(self, folder: Path) -> None:
        x, real = (features(self.store, images, self.space) for images in (self.images, self.reference))
        frechet = metrics.FrechetReference(statistics(self.store, self.reference, self.space))
        fd = metrics.resample(frechet, x, self.num_resamples, self.seed)
        pairs = metrics.PairReference(real, device=device()).compare(x, self.num_resamples, self.seed)
        record = {"manifold": pairs.manifold}
        for name, resampled in (("fd", fd), ("kid", pairs.kid)):
            record[name] = {"value": resampled.value, "draws": resampled.draws.tolist()}
        (folder / "scores.json").write_text(json.dumps(record))
