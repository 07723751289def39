"""The study's steps: generate images, train discriminators, extract features, evaluate. Each is found, not redone.

A step takes a store and a frozen config, asks the store for the artifact of that identity, and computes it
only if it is not there. The integers in VERSIONS are the steps' numerical versions: raise one when its numbers
change, and only then (tests/test_jobs.py fails when numbers change and the version does not).
"""

import dataclasses
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoints, datasets, metrics
from .discriminator import Ensemble, MemberConfig, evaluate_logits, init_head, train_discriminators
from .errors import UserError
from .guidance import GuidedDenoiser
from .noise import PerSampleNoise, karras_sigmas
from .paths import runs_dir
from .sampler import edm_sampler, network_denoiser
from .store import Artifact, ShardedSet, Store, digest_of_json

VERSIONS = {"generate": 1, "train": 1, "logits": 1, "features": 1, "evaluate": 1}


def open_store(profile: str) -> Store:
    """The artifacts of a profile, under runs/<profile>/store. Results of different profiles never mix."""
    return Store(runs_dir(profile) / "store")


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str) -> str:
    """'auto' is bfloat16 where the hardware multiplies it natively, else float32."""
    if precision != "auto":
        return precision
    if device().type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


# ---- images ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: the network, EDM's schedule (table 2 of the study), and the fixed batch layout."""

    score_network: str
    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    batch_size: int = 125
    shard_size: int = 250
    precision: str = "auto"


@dataclass(frozen=True)
class Guidance:
    """Which discriminators guide, how they are combined, and how strongly (table 2)."""

    discriminators: "Trained"
    members: tuple[int, ...]
    rule: str = "mean_logit"
    state: str = "last"
    weight_1st_order: float = 2.0
    weight_2nd_order: float = 0.0
    time_min: float = 0.01
    time_max: float = 1.0
    boosting: str = "none"

    def config(self) -> dict:
        """What tells two guidances apart, without the discriminators, whose digest is an input."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name != "discriminators"}


@dataclass(frozen=True)
class ImageSet:
    """The first n images of a set: `images` uint8 [n, H, W, C], `digest`, and a label for people."""

    label: str
    n: int
    rows: ShardedSet

    @property
    def digest(self) -> str:
        return self.rows.digest(self.n)

    @cached_property
    def images(self) -> np.ndarray:
        return self.rows.load(self.n, "images")

    @property
    def seeds(self) -> range:
        return range(self.rows.first_seed, self.rows.first_seed + self.n)


def make_denoiser(sampling: Sampling, guidance: Guidance | None = None):
    """The sampler's callable for a config: the score network, guided or not."""
    precision = resolve_precision(sampling.precision)
    denoise = network_denoiser(checkpoints.load_denoiser(sampling.score_network).to(device()), precision)
    if guidance is None:
        return denoise
    ensemble = guidance.discriminators.ensemble(guidance.members, guidance.rule, guidance.state).to(device())
    return GuidedDenoiser(denoise, ensemble, guidance.weight_1st_order, guidance.weight_2nd_order,
                          guidance.time_min, guidance.time_max, guidance.boosting, precision)  # fmt: skip


def sample(sampling: Sampling, seeds, guidance: Guidance | None = None) -> torch.Tensor:
    """Images of these seeds, [N, C, H, W] in [-1, 1], in one batch. Nothing is stored."""
    denoise = make_denoiser(sampling, guidance)
    shape = checkpoints.load_denoiser(sampling.score_network).shape
    sigmas = karras_sigmas(sampling.num_steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    noise = PerSampleNoise(seeds, shape, device())
    churn = denoise.churn(len(noise.seeds), device()) if guidance and guidance.boosting != "none" else 0.0
    return edm_sampler(denoise, noise, sigmas, churn)


def generate(store: Store, sampling: Sampling, n: int, first_seed: int = 0, guidance: Guidance | None = None,
             label: str = "images") -> ImageSet:  # fmt: skip
    """The images of seeds first_seed ... first_seed + n - 1, in shards of a fixed size.

    Raises UserError for n < 1, unknown networks, or images that stop being finite.
    """
    if sampling.shard_size % sampling.batch_size:
        raise UserError(f"shard_size {sampling.shard_size} is not a multiple of batch_size {sampling.batch_size}")
    sampling = replace(sampling, precision=resolve_precision(sampling.precision))
    config = dataclasses.asdict(sampling) | {"guidance": guidance.config() if guidance else None}
    inputs = {"score_network": checkpoints.weights_digest(sampling.score_network)}
    if guidance:
        inputs["discriminators"] = guidance.discriminators.digest
    artifact = store.artifact("generate", VERSIONS["generate"], config, inputs, label)

    def compute_shard(seeds):
        size = sampling.batch_size
        batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        return {"images": np.concatenate([datasets.to_uint8(sample(sampling, b, guidance)) for b in batches])}

    rows = artifact.shards(sampling.shard_size, first_seed).ensure(n, compute_shard)
    return ImageSet(label, n, rows)


# ---- discriminators ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How discriminators are trained: data, frozen extractor, head, and the members of table 1."""

    dataset: str
    feature_extractor: str
    head: dict
    members: tuple[MemberConfig, ...]
    num_real: int
    batch_size: int = 128
    seed: int = 0
    sequential: bool = False
    precision: str = "auto"


def head_config(feature_extractor: str, width: int, num_res_blocks: int, num_head_channels: int) -> dict:
    """Arguments of the shallow head on an extractor's features: one level, attention, one output (DG)."""
    channels, size, _ = checkpoints.load_feature_extractor(feature_extractor).feature_shape
    return dict(
        image_size=size, in_channels=channels, model_channels=width, out_channels=1,
        num_res_blocks=num_res_blocks, attention_resolutions=[1], channel_mult=[1],
        num_head_channels=num_head_channels,
    )  # fmt: skip


def scaled_members(names, learning_rates, weight_decays, epochs, min_times, epoch_scale: float):
    """Table 1 as members, every number of epochs multiplied by `epoch_scale` (at least one epoch)."""
    columns = zip(names, learning_rates, weight_decays, epochs, min_times, strict=True)
    return tuple(MemberConfig(n, lr, wd, max(1, round(e * epoch_scale)), t) for n, lr, wd, e, t in columns)


@dataclass(frozen=True)
class Split:
    """Real (label 1) and generated (label 0) images of one part of the data, as many of each."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Trained:
    """Trained discriminators: `history` per member, `ensemble(...)` for guidance, and the held-out split."""

    config: Training
    fakes: ImageSet
    artifact: Artifact

    @property
    def digest(self) -> str:
        return self.artifact.digest

    @cached_property
    def history(self) -> list[list[dict]]:
        """For each member one row an epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy."""
        return json.loads((self.artifact.path / "history.json").read_text())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return checkpoints.read_tensors(self.artifact.path / "heads.safetensors")[0]

    def ensemble(self, members=None, rule: str = "mean_logit", state: str = "last") -> Ensemble:
        """Heads `members` (default: all) in a state: "last", "best" (lowest validation loss), or "initial".

        "initial", before any training, is the control: what a push by a network that knows nothing does.
        """
        members = range(len(self.config.members)) if members is None else members
        if state not in ("last", "best", "initial") or not all(0 <= m < len(self.config.members) for m in members):
            raise UserError(f"no discriminators {list(members)} in state '{state}': states are last, best, initial, "
                            f"members 0 to {len(self.config.members) - 1}")  # fmt: skip
        heads = []
        for m in members:
            prefix, head = f"{m}.{state}.", init_head(self.config.head, self.config.seed, m)
            if state != "initial":
                head.load_state_dict({k.removeprefix(prefix): v for k, v in self._tensors.items()
                                      if k.startswith(prefix)})  # fmt: skip
            heads.append(head)
        return Ensemble(checkpoints.load_feature_extractor(self.config.feature_extractor), heads, rule)

    @cached_property
    def test_split(self) -> Split:
        """The images that no member was trained or validated on."""
        return splits(self.config, self.fakes)[2]


def splits(training: Training, fakes: ImageSet) -> list[Split]:
    """Train, validation and test parts (80/10/10) of as many real as generated images, stratified, seeded."""
    real, labels = datasets.load_dataset(training.dataset, "train")
    n = training.num_real
    if n != fakes.n or n > len(real) or n < 10:
        raise UserError(f"{n} real and {fakes.n} generated images: give as many of each, from 10 to {len(real)}")
    real_parts = datasets.split_indices(labels[:n], training.seed)
    fake_parts = datasets.split_indices(np.full(n, -1), training.seed)
    return [
        Split(np.concatenate([real[r], fakes.images[f]]), np.repeat([1, 0], [len(r), len(f)]))
        for r, f in zip(real_parts, fake_parts, strict=True)
    ]


def train(store: Store, training: Training, fakes: ImageSet, label: str = "discriminators") -> Trained:
    """Train the members, resuming at the last finished epoch if a run was interrupted."""
    training = replace(training, precision=resolve_precision(training.precision))
    inputs = {
        "fakes": fakes.digest,
        "real": datasets.dataset_digest(training.dataset, "train"),
        "feature_extractor": checkpoints.weights_digest(training.feature_extractor),
    }
    artifact = store.artifact("train", VERSIONS["train"], dataclasses.asdict(training), inputs, label)
    partial = store.root / "partial" / f"train-{artifact.digest[:16]}.safetensors"

    def checkpoint(tensors, info):
        partial.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_tensors(partial, tensors, {"info": json.dumps(info)})

    def make(folder: Path):
        resume = None
        if partial.is_file():
            tensors, metadata = checkpoints.read_tensors(partial)
            resume = tensors, json.loads(metadata["info"])
        learn, validate, _ = splits(training, fakes)
        extractor = checkpoints.load_feature_extractor(training.feature_extractor).to(device())
        done = sum(len(h) for h in resume[1]["histories"]) if resume else 0
        with tqdm(total=sum(m.epochs for m in training.members), initial=done, desc=label, unit=" epochs") as bar:

            def progress(name, row):
                bar.set_postfix_str(f"{name} {row['val_loss']:.3f}")
                bar.update()

            members = train_discriminators(
                extractor, training.head, learn.images, learn.labels, validate.images, validate.labels,
                training.members, training.batch_size, training.seed, training.precision, training.sequential,
                progress, checkpoint, resume,
            )  # fmt: skip
        states = {f"{m}.{which}.{k}": v for m, member in enumerate(members)
                  for which, state in (("last", member.last_state), ("best", member.best_state))
                  for k, v in state.items()}  # fmt: skip
        checkpoints.write_tensors(folder / "heads.safetensors", states, {})
        (folder / "history.json").write_text(json.dumps([member.history for member in members]))
        return {"seed": training.seed}

    artifact.compute(make)
    partial.unlink(missing_ok=True)
    return Trained(training, fakes, artifact)


def held_out_logits(store: Store, trained: Trained, vp_times) -> tuple[np.ndarray, np.ndarray]:
    """Logits [M, levels, N] of all members on the test split at each VP time, and its labels [N]."""
    config = {"vp_times": [float(t) for t in vp_times], "state": "last"}
    inputs = {"discriminators": trained.digest}
    artifact = store.artifact("logits", VERSIONS["logits"], config, inputs, "held-out logits")

    def make(folder):
        ensemble = trained.ensemble().to(device())
        logits = evaluate_logits(ensemble, trained.test_split.images, vp_times, trained.config.seed,
                                 trained.config.batch_size, trained.config.precision)  # fmt: skip
        np.save(folder / "logits.npy", logits)

    path = artifact.compute(make).path / "logits.npy"
    return np.load(path, allow_pickle=False), trained.test_split.labels


# ---- scores ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealSet:
    """`n` images of a dataset's split from `start` on, in canonical order; used like an ImageSet."""

    dataset: str
    split: str
    n: int
    start: int = 0

    seeds = range(0)  # real images have none

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
        if self.start + self.n > len(images):
            raise UserError(f"{self.dataset} has {len(images)} {self.split} images, not {self.start + self.n}")
        return images[self.start : self.start + self.n]


def _extractor_features(name: str):
    """The frozen extractor's features of clean images, averaged over positions: [B, F]."""
    extractor = checkpoints.load_feature_extractor(name).to(device())

    def encode(x):
        return extractor.features(x, torch.zeros(len(x), device=x.device)).mean((2, 3))

    return encode


def space_name(space: str) -> str:
    """A feature space in words, for captions: only Inception's distance is called FID."""
    known = space == "inception" or space.startswith("efficientnet")
    return metrics.metric_name(space) if known else f"FD ({space} features)"


def features(store: Store, images: ImageSet | RealSet, space: str) -> np.ndarray:
    """Features float32 [n, d] in `space`: "efficientnet-lite0@128", "inception", or a shipped extractor."""
    inputs = {"images": images.digest}
    own = not (space == "inception" or space.startswith("efficientnet"))
    if own:
        inputs["feature_extractor"] = checkpoints.weights_digest(space)
    artifact = store.artifact("features", VERSIONS["features"], {"space": space}, inputs, f"{images.label}, {space}")

    def make(folder):
        with tqdm(total=images.n, desc=f"{images.label}, {space}", unit=" images") as bar:

            def progress(done, total):
                bar.update(done - bar.n)

            if own:
                values = metrics.extract(images.images, _extractor_features(space), 250, progress, device())
            else:
                values = metrics.image_features(images.images, space, progress=progress, device=str(device()))
        np.save(folder / "features.npy", values)

    path = artifact.compute(make).path / "features.npy"
    return np.load(path, allow_pickle=False)


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


def evaluate(store: Store, arm: ImageSet | RealSet, reference: RealSet, space: str, num_resamples: int = 200,
             seed: int = 0) -> Scores:  # fmt: skip
    """Fréchet distance, unbiased KID (both with bootstrap draws), precision/recall, density/coverage of an arm."""
    inputs = {"arm": arm.digest, "reference": reference.digest}
    config = {"space": space, "num_resamples": num_resamples, "seed": seed}
    artifact = store.artifact("evaluate", VERSIONS["evaluate"], config, inputs, f"{arm.label}, {space}")

    def make(folder):
        x, real = features(store, arm, space), features(store, reference, space)
        record = {"manifold": metrics.precision_recall(real, x) | metrics.density_coverage(real, x)}
        for name, distance in (("fd", metrics.FrechetReference(real)), ("kid", metrics.KernelReference(real))):
            resampled = metrics.resample(distance, x, num_resamples, seed)
            record[name] = {"value": resampled.value, "draws": resampled.draws.tolist()}
        (folder / "scores.json").write_text(json.dumps(record))

    record = json.loads((artifact.compute(make).path / "scores.json").read_text())
    fd, kid = (metrics.Resampled(record[k]["value"], np.array(record[k]["draws"])) for k in ("fd", "kid"))
    return Scores(arm, space, artifact.digest, fd, kid, record["manifold"])


# ---- the study ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What the six notebooks share: one profile's data, networks, tables 1 and 2, and sizes.

    Its fields are the parameters of the notebooks' first cell, one for one. Everything else follows from
    them: a notebook asks for `fakes`, `trained`, an `arm` or its `scores`, and what exists is found.
    """

    profile: str
    dataset: str
    score_network: str
    feature_extractor: str
    feature_spaces: list
    precision: str
    num_steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    dg_weight_1st_order: float
    dg_weight_2nd_order: float
    time_min: float
    time_max: float
    boosting: str
    batch_size: int
    shard_size: int
    num_fake: int
    num_eval: int
    eval_seed: int
    num_reference: int
    num_resamples: int
    member_names: list
    learning_rates: list
    weight_decays: list
    epochs: list
    min_times: list
    epoch_scale: float
    discriminator_batch_size: int
    training_seed: int
    head_width: int
    head_blocks: int
    head_channels: int

    @classmethod
    def from_parameters(cls, namespace: dict) -> "Study":
        """The study that a notebook's parameters describe: `Study.from_parameters(globals())`."""
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in namespace]:
            raise UserError(f"parameters missing from the notebook's first cell: {', '.join(missing)}")
        return cls(**{name: namespace[name] for name in names})

    @cached_property
    def store(self) -> Store:
        return open_store(self.profile)

    @property
    def sampling(self) -> Sampling:
        """Table 2's schedule, unguided."""
        return Sampling(self.score_network, self.num_steps, self.sigma_min, self.sigma_max, self.rho,
                        self.batch_size, self.shard_size, self.precision)  # fmt: skip

    @cached_property
    def fakes(self) -> ImageSet:
        """The generated images that discriminators learn from: seeds 0 ... num_fake - 1, unguided."""
        return generate(self.store, self.sampling, self.num_fake, label="fake set")

    def training(self, **changes) -> Training:
        """Table 1 with this profile's epoch_scale; `changes` replaces Study fields (epoch_scale=..., ...)."""
        s = replace(self, **changes)
        members = scaled_members(s.member_names, s.learning_rates, s.weight_decays, s.epochs, s.min_times,
                                 s.epoch_scale)  # fmt: skip
        head = head_config(s.feature_extractor, s.head_width, s.head_blocks, s.head_channels)
        return Training(s.dataset, s.feature_extractor, head, members, s.num_fake, s.discriminator_batch_size,
                        s.training_seed, precision=s.precision)  # fmt: skip

    @cached_property
    def trained(self) -> Trained:
        """The six discriminators of table 1, trained on `fakes` against as many real images."""
        return train(self.store, self.training(), self.fakes, "six discriminators")

    def guidance(self, members=(0,), rule: str = "mean_logit", **changes) -> Guidance:
        """Table 2's guidance by these members; `changes` replaces fields of Guidance (weight_1st_order=...)."""
        settings = dict(
            discriminators=self.trained, members=tuple(members), rule=rule,
            weight_1st_order=self.dg_weight_1st_order, weight_2nd_order=self.dg_weight_2nd_order,
            time_min=self.time_min, time_max=self.time_max, boosting=self.boosting,
        )  # fmt: skip
        return Guidance(**(settings | changes))

    def arm(self, label: str, guidance: Guidance | None = None, n: int | None = None, **sampling) -> ImageSet:
        """The evaluation images of one arm: the same seeds in every arm. `sampling` replaces Sampling fields."""
        config = replace(self.sampling, **sampling)
        return generate(self.store, config, n or self.num_eval, self.eval_seed, guidance, label)

    @property
    def reference(self) -> RealSet:
        """The real images that arms are scored against: test images, which no network was trained on."""
        return RealSet(self.dataset, "test", self.num_reference)

    @property
    def floor(self) -> RealSet:
        """As many other real images as an arm has: what a perfect sampler would score at this n."""
        return RealSet(self.dataset, "test", self.num_eval, start=self.num_reference)

    def scores(self, arm: ImageSet | RealSet, space: str | None = None) -> Scores:
        """Scores of an arm in a feature space (default: the first of `feature_spaces`)."""
        return evaluate(self.store, arm, self.reference, space or self.feature_spaces[0], self.num_resamples)
