"""The study that the six notebooks share: one profile's parameters, and the arms that each notebook compares.

Arms are declared here, by name, so that a notebook draws them, `make plan` lists what they would cost, and both
mean the same images.
"""

import dataclasses
from dataclasses import dataclass, replace
from functools import cached_property

from dgutils import datasets
from dgutils.discriminator import RULES
from dgutils.errors import UserError
from dgutils.pipeline.jobs import (
    Guidance,
    ImageSet,
    Joint,
    Published,
    RealSet,
    Sampling,
    Scores,
    Trained,
    Training,
    discriminators,
    evaluate,
    evaluation,
    head_config,
    image_set,
    open_store,
    scaled_members,
)
from dgutils.pipeline.store import Store

# Notebook 05's own parameters, the arguments of `Study.sweep_arms`.
SWEEP = ("num_sweep", "sweep_weights", "sweep_time_mins", "sweep_time_maxs", "sweep_epoch_scales")

# The faults of the study's ensemble, in the order in which the ladder mends them (`Study.faulty_arm`). The steps come
# first because they are no fault of the ensemble, and double the cost of every rung that still has them.
FAULTS = {
    "steps": "steps for evaluations",
    "raw_logits": "raw logits taken for probabilities",
    "sequential": "one network through all six settings",
    "wrong_file": "wrong file in slot 3",
    "last_epoch": "last instead of best epochs",
    "boosting": "boosting, unconditional",
    "batch_size": "half the training batch",
}
WRONG_SLOT, WRONG_MEMBER, WRONG_EPOCH = 3, 1, 15  # the wrong file: its slot, and whose state at which epoch it held

# Parameters that count something there must be.
COUNTS = ("num_eval", "num_fake", "num_reference", "num_resamples", "num_key", "repeats", "seed_blocks", "worse_steps")

# Ensembles beyond the study's (`Study.variant_arms`).
VARIANTS = {
    "bootstrap": "members on bootstrap samples",
    "disjoint": "members on disjoint parts of the data",
    "best": "members at their least held-out loss",
    "long": "members trained as long as the one network had been",
    "overfitted": "Paper overfitted: all of table 1's epochs",
    "overfitted_best": "the same at its least held-out loss",
    "full": "all six for all of table 1's epochs",
    "full_best": "those six at their least held-out loss",
    "full_raw": "those six, raw logits taken for probabilities",
    "worse": "generated against worse generated images",
    "tasks": "real against generated, and generated against worse",
}


@dataclass(frozen=True)
class Study:
    """What the six notebooks share: one profile's data, networks, tables 1 and 2, and sizes.

    Its fields are the parameters of the notebooks' first cell, one for one. Everything else follows from
    them: a notebook asks for `fakes`, `trained`, its arms or their `scores`, and what exists is found.
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
    log_ratio: str
    batch_size: int
    shard_size: int
    num_fake: int
    fake_seed: int
    num_eval: int
    eval_seed: int
    seed_blocks: int
    reference_split: str
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
    training_parts: int
    held_out_every: int
    sequential: bool
    head_width: int
    head_blocks: int
    head_channels: int
    published_discriminator: str
    conditional_network: str
    conditional_discriminator: str
    cfg_weights: list
    ancestral_steps: int
    ladder: list
    as_run: dict
    repeats: int
    num_key: int
    variants: list
    worse_steps: int
    watermark: str

    @classmethod
    def from_parameters(cls, namespace: dict) -> "Study":
        """The study that a notebook's parameters describe: `Study.from_parameters(globals())`."""
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in namespace]:
            raise UserError(f"parameters missing from the notebook's first cell: {', '.join(missing)}")
        study = cls(**{name: namespace[name] for name in names})
        # What is impossible is said now, not hours later.
        for name in COUNTS:
            if namespace[name] < 1:
                raise UserError(f"{name} is {namespace[name]}: at least 1")
        for what, names, known in (("fault", study.ladder, FAULTS), ("variant", study.variants, VARIANTS)):
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(known)}")
        study.guidance(discriminators=None)
        study.training()
        return study

    @cached_property
    def store(self) -> Store:
        return open_store(self.profile)

    @property
    def sampling(self) -> Sampling:
        """Table 2's schedule, unguided."""
        return Sampling(self.score_network, self.num_steps, self.sigma_min, self.sigma_max, self.rho,
                        batch_size=self.batch_size, shard_size=self.shard_size, precision=self.precision)  # fmt: skip

    @cached_property
    def fakes(self) -> ImageSet:
        """The generated images that discriminators learn from: num_fake seeds from fake_seed on, unguided."""
        return image_set(self.store, self.sampling, self.num_fake, self.fake_seed, label="fake set")

    def training(self, **changes) -> Training:
        """Table 1 with this profile's epoch_scale; `changes` replaces Study fields (epoch_scale=..., ...)."""
        s = replace(self, **changes)
        members = scaled_members(s.member_names, s.learning_rates, s.weight_decays, s.epochs, s.min_times,
                                 s.epoch_scale)  # fmt: skip
        head = head_config(s.feature_extractor, s.head_width, s.head_blocks, s.head_channels)
        return Training(s.dataset, s.feature_extractor, head, members, s.num_fake, s.discriminator_batch_size,
                        s.training_seed, s.sequential, s.precision, s.held_out_every,
                        (s.wrong_state,) if "wrong_file" in s.ladder else (), parts=s.training_parts)  # fmt: skip

    @cached_property
    def trained(self) -> Trained:
        """The six discriminators of table 1, trained on `fakes` against as many real images."""
        return discriminators(self.store, self.training(), self.fakes, "six discriminators")

    def first_alone(self, **changes) -> Training:
        """The training of the first member without the others; `changes` as in `training`."""
        training = self.training(**changes)
        return replace(training, members=training.members[:1], kept=())

    def guidance(self, members=(0,), rule: str = "mean_logit", **changes) -> Guidance:
        """Table 2's guidance by these members; `changes` replaces fields of Guidance (weight_1st_order=...)."""
        if "discriminators" not in changes:
            changes = changes | {"discriminators": self.trained}
        settings = dict(
            members=tuple(members), rule=rule,
            weight_1st_order=self.dg_weight_1st_order, weight_2nd_order=self.dg_weight_2nd_order,
            time_min=self.time_min, time_max=self.time_max, boosting=self.boosting, log_ratio=self.log_ratio,
        )  # fmt: skip
        return Guidance(**(settings | changes))

    def arm(self, label: str, guidance: Guidance | None = None, n: int | None = None, block: int = 0,
            **sampling) -> ImageSet:  # fmt: skip
        """The evaluation images of one arm: the same seeds in every arm. `sampling` replaces Sampling fields.

        Block b of n images has the seeds from eval_seed + b num_eval on.
        """
        config = replace(self.sampling, **sampling)
        first_seed = self.eval_seed + block * self.num_eval
        return image_set(self.store, config, n or self.num_eval, first_seed, guidance, label)

    def unguided_as(self, arm: ImageSet) -> ImageSet:
        """What guidance in an arm is to be compared with: as many unguided images, of as many steps."""
        steps = arm.rows.artifact.identity["config"]["num_steps"]
        label = "unguided sampling" + (f", {steps} steps" if steps != self.num_steps else "")
        return self.arm(label, n=arm.n, num_steps=steps)

    # ---- the arms of each notebook

    @property
    def everyone(self) -> range:
        """All members."""
        return range(len(self.member_names))

    def evaluation_arms(self) -> dict[str, ImageSet | RealSet]:
        """Notebook 04: the floor, unguided, one discriminator, its untrained self as control, the ensemble."""
        return {
            "floor": self.floor,
            "unguided": self.arm("unguided sampling"),
            "paper": self.arm("guidance by Paper", self.guidance((0,))),
            "control": self.arm("guidance by Paper, untrained", self.guidance((0,), state="initial")),
            "ensemble": self.arm("guidance by the ensemble", self.guidance(self.everyone, "mean_probability")),
        }

    def published_arms(self) -> dict[str, ImageSet]:
        """Notebook 04: what the published weights and the other samplers of the literature add; {} without them.

        "authors": guidance by the published discriminator; "ancestral": DDPM's sampler, unguided; "conditional",
        "conditional_guided" and "cfg_<w>": the class-conditional network, with its discriminator, with
        classifier-free guidance of weight w.
        """
        arms = {}
        if self.published_discriminator:
            published = Published(self.feature_extractor, (self.published_discriminator,))
            arms["authors"] = self.arm("guidance by the published discriminator",
                                       self.guidance(discriminators=published))  # fmt: skip
        if self.ancestral_steps:
            arms["ancestral"] = self.arm("DDPM's ancestral sampler", sampler="ancestral",
                                         num_steps=self.ancestral_steps)  # fmt: skip
        if self.conditional_network:
            conditional = dict(score_network=self.conditional_network, conditional=True)
            arms["conditional"] = self.arm("class-conditional, unguided", **conditional)
            if self.conditional_discriminator:
                published = Published(self.feature_extractor, (self.conditional_discriminator,))
                arms["conditional_guided"] = self.arm("class-conditional, guided", self.guidance(
                    discriminators=published), **conditional)  # fmt: skip
            for weight in self.cfg_weights:
                arms[f"cfg_{weight:g}"] = self.arm(f"classifier-free guidance, weight {weight:g}", **conditional,
                                                   cfg_network=self.score_network, cfg_weight=weight)  # fmt: skip
        return arms

    def seed_block_arms(self) -> dict[str, list[ImageSet]]:
        """Notebook 04: the arms of EDM's protocol, each in `seed_blocks` disjoint blocks of num_eval seeds."""
        guidance = {"unguided": None, "paper": self.guidance((0,))}
        if self.published_discriminator:
            guidance["authors"] = self.guidance(
                discriminators=Published(self.feature_extractor, (self.published_discriminator,)))
        return {name: [self.arm(f"{name}, block {b + 1}", rule, block=b) for b in range(self.seed_blocks)]
                for name, rule in guidance.items()}

    def claim_arms(self) -> dict[str, ImageSet]:
        """Notebook 05: the arms that the published claims are about."""
        return {
            "unguided": self.arm("unguided sampling"),
            "paper": self.arm("guidance by Paper", self.guidance((0,))),
            "fault": self.arm("raw logits of all members",
                              self.guidance(self.everyone, "raw_logits_as_probabilities")),
        }  # fmt: skip

    def sweep_trainings(self, epoch_scales) -> dict[int, Trained]:
        """Epochs of the first member -> discriminators trained so long: all members at the default, then it alone."""
        trained = {}
        for scale in (self.epoch_scale, *epoch_scales):
            first = self.first_alone(epoch_scale=scale)  # epochs of one member need no others
            epochs = first.members[0].epochs
            trained[epochs] = self.trained if scale == self.epoch_scale else discriminators(
                self.store, first, self.fakes, f"Paper, {epochs} epochs")  # fmt: skip
        return trained

    def sweep_arms(self, n: int, weights, time_mins, time_maxs, epoch_scales) -> dict[str, dict[str, ImageSet]]:
        """Notebook 05: one discriminator, one setting changed at a time, n images an arm; the default comes first.

        {"weight" | "window" | "epochs": {setting: arm}}; weight "0" is unguided.
        """

        def paper(label, **changes):
            return self.arm(f"Paper, {label}", self.guidance((0,), **changes), n)

        settings = [w for w in (self.dg_weight_1st_order, *weights) if w]
        by_weight = {f"{w:g}": paper(f"weight {w:g}", weight_1st_order=w) for w in settings}
        windows = [(self.time_min, self.time_max), *((t, self.time_max) for t in time_mins),
                   *((self.time_min, t) for t in time_maxs)]  # fmt: skip
        by_window = {f"{a:g}-{b:g}": paper(f"window {a:g} to {b:g}", time_min=a, time_max=b) for a, b in windows}
        by_epochs = {f"{epochs}": paper(f"{epochs} epochs", discriminators=trained)
                     for epochs, trained in self.sweep_trainings(epoch_scales).items()}  # fmt: skip
        by_weight["0"] = self.arm("unguided sampling", n=n)
        return {"weight": by_weight, "window": by_window, "epochs": by_epochs}

    def ensemble_arms(self) -> dict[str, ImageSet]:
        """Notebook 06: every member alone, every correct rule, and the raw-logit fault with all and with one."""
        rules = [rule for rule in RULES if rule != "raw_logits_as_probabilities"]
        guidance = {"unguided": None}
        guidance |= {name.lower(): self.guidance((i,)) for i, name in enumerate(self.member_names)}
        guidance |= {rule: self.guidance(self.everyone, rule) for rule in rules}
        guidance |= {"raw_all": self.guidance(self.everyone, "raw_logits_as_probabilities"),
                     "raw_one": self.guidance((0,), "raw_logits_as_probabilities")}
        words = {"unguided": "unguided sampling", "raw_all": "raw logits of all members",
                 "raw_one": f"raw logits of {self.member_names[0]}"}
        words |= {name.lower(): f"guidance by {name}" for name in self.member_names}
        return {name: self.arm(words.get(name, f"ensemble, {name}"), rule) for name, rule in guidance.items()}

    # ---- why the ensemble failed

    def trained_with(self, label: str, **changes) -> Trained:
        """Discriminators on `fakes`, trained with other Study fields than this profile's (training_seed=...)."""
        training = self.training(**changes)
        return self.trained if training == self.training() else discriminators(self.store, training, self.fakes, label)

    @property
    def wrong_state(self) -> tuple[int, int]:
        """(member, epoch), scaled as all epochs are, of the file that lay in slot 3."""
        return WRONG_MEMBER, max(1, round(WRONG_EPOCH * self.epoch_scale))

    def faulty_arm(self, faults, name: str, n: int | None = None, repeat: int = 0) -> ImageSet:
        """The ensemble with some of FAULTS; without any, the correct one: all members by their mean probability.

        `as_run` has the settings of the study's that faults stand for. repeat: which training, of other seeds.
        """
        changes = {"sequential": "sequential" in faults, "training_seed": self.training_seed + repeat}
        if "batch_size" in faults:
            changes["discriminator_batch_size"] = self.as_run["discriminator_batch_size"]
        label = "one network, six settings" if "sequential" in faults else "six discriminators"
        label += f", batches of {changes.get('discriminator_batch_size', self.discriminator_batch_size)}"
        trained = self.trained_with(f"{label}, training {repeat + 1}", **changes)
        members = list(self.everyone)
        if "wrong_file" in faults:
            members[WRONG_SLOT] = self.wrong_state
        guidance = self.guidance(
            members, "raw_logits_as_probabilities" if "raw_logits" in faults else "mean_probability",
            discriminators=trained, state="last" if "last_epoch" in faults else "best",
            boosting=self.as_run["boosting"] if "boosting" in faults else self.boosting,
        )  # fmt: skip
        return self.arm(name, guidance, n, num_steps=self.as_run["num_steps"] if "steps" in faults else self.num_steps)

    def ladder_arms(self) -> dict[str, ImageSet]:
        """Notebook 06: from the study's ensemble to the correct one, a fault mended at a time, and back.

        "as_run"; "without_<fault>": this fault and those before it mended; "correct"; "only_<fault>". {} for no ladder.
        """
        if not self.ladder:
            return {}
        arms = {"as_run": self.faulty_arm(self.ladder, "as the study ran it")}
        for i, fault in enumerate(self.ladder[:-1], 1):
            arms[f"without_{fault}"] = self.faulty_arm(self.ladder[i:], f"mended: {FAULTS[fault]}")
        arms["correct"] = self.faulty_arm([], "the correct ensemble")
        return arms | {f"only_{fault}": self.faulty_arm([fault], f"only: {FAULTS[fault]}") for fault in self.ladder}

    def repeat_arms(self) -> dict[str, list[ImageSet]]:
        """Notebook 06: the key arms, num_key images for each of `repeats` trainings."""
        settings = {"correct": [], "as_run": self.ladder}
        arms = {name: [] for name in ("paper", *settings)}
        for repeat in range(self.repeats):
            trained = self.trained_with(f"six discriminators, training {repeat + 1}",
                                        training_seed=self.training_seed + repeat)  # fmt: skip
            guidance = self.guidance((0,), discriminators=trained, state="best")
            arms["paper"].append(self.arm(f"Paper, training {repeat + 1}", guidance, self.num_key))
            for name, faults in settings.items():
                arms[name].append(self.faulty_arm(faults, f"{name}, training {repeat + 1}", self.num_key, repeat))
        return arms

    def variant_arms(self) -> dict[str, ImageSet]:
        """Notebook 06: ensembles beyond the study's, those of VARIANTS that the profile names.

        "worse" needs a second generated set, at worse_steps steps: the log-ratio of two samplers, not of data and
        model; guidance along it leads on from the worse to the better. "tasks" joins it with Paper's (FairGAN).
        """
        arms = {}
        for name in self.variants:
            if name in ("bootstrap", "disjoint"):
                training = replace(self.training(), resampling=name)
                trained = discriminators(self.store, training, self.fakes, VARIANTS[name])
                guidance = self.guidance(self.everyone, "mean_probability", discriminators=trained)
            elif name == "long":
                guidance = self.guidance(self.everyone, "mean_probability", discriminators=self.long_trained)
            elif name == "best":
                guidance = self.guidance(self.everyone, "mean_probability", state="best")
            elif name in ("overfitted", "overfitted_best"):
                guidance = self.guidance((0,), discriminators=self.full_trained,
                                         state="best" if name == "overfitted_best" else "last")  # fmt: skip
            elif name in ("full", "full_best", "full_raw"):
                rule = "raw_logits_as_probabilities" if name == "full_raw" else "mean_probability"
                guidance = self.guidance(self.everyone, rule, discriminators=self.full_trained,
                                         state="best" if name == "full_best" else "last")  # fmt: skip
            else:  # "worse" or "tasks"
                against = self.worse_trained
                joint = Joint((self.trained, against)) if name == "tasks" else against
                guidance = self.guidance((0, 1) if name == "tasks" else (0,), discriminators=joint)
            arms[name] = self.arm(VARIANTS[name], guidance)
        return arms

    @cached_property
    def long_trained(self) -> Trained:
        """Independent members, each trained for as many epochs as the one network had been at that member's turn.

        The sequence's members have two things that the correct ones lack: a common past, and a longer one. These
        have the length alone.
        """
        training, total = self.training(), 0
        members = [replace(m, epochs=(total := total + m.epochs)) for m in training.members]
        training = replace(training, members=tuple(members), kept=())
        return discriminators(self.store, training, self.fakes, VARIANTS["long"])

    @cached_property
    def full_trained(self) -> Trained:
        """The six discriminators for all of table 1's epochs, by which they learn few images by heart."""
        training = replace(self.training(epoch_scale=1.0), kept=())
        return discriminators(self.store, training, self.fakes, VARIANTS["full"])

    @cached_property
    def worse_fakes(self) -> ImageSet:
        """As many images as `fakes`, of the same seeds, by the worse sampler: worse_steps steps."""
        return image_set(self.store, replace(self.sampling, num_steps=self.worse_steps), self.num_fake, self.fake_seed,
                        label=f"fake set of {self.worse_steps} steps")  # fmt: skip

    @cached_property
    def worse_trained(self) -> Trained:
        """The first member's settings, trained to tell `fakes` (label 1) from `worse_fakes` (label 0)."""
        return discriminators(self.store, self.first_alone(), self.worse_fakes, "generated against worse",
                              better=self.fakes)  # fmt: skip

    def courses(self) -> dict[str, Trained]:
        """Notebook 06: the longer trainings whose course it shows, those that the profile's variants have."""
        longer = {"long": lambda: self.long_trained, "full": lambda: self.full_trained}
        wanted = {"full" if name.startswith(("full", "overfitted")) else name for name in self.variants}
        return {name: training() for name, training in longer.items() if name in wanted}

    def looked_into(self) -> list[Trained]:
        """The trainings whose course the notebooks show, and which they need whatever scores are kept."""
        return [self.trained, *self.courses().values()]

    def learnt(self) -> list[ImageSet]:
        """All generated images that discriminators learn from, drawn or found."""
        return [self.fakes] + [self.worse_fakes] * bool({"worse", "tasks"} & set(self.variants))

    # ---- scores

    def scored(self, parameters: dict) -> list[tuple[ImageSet | RealSet, str]]:
        """What notebooks 04 to 06 score: (image set, feature space), each once. parameters: those of all notebooks."""
        sweep = self.sweep_arms(*(parameters[name] for name in SWEEP))
        declared = [self.evaluation_arms(), self.claim_arms(), self.ensemble_arms(), self.ladder_arms(),
                    self.variant_arms()]  # fmt: skip
        arms = [arm for group in declared for arm in group.values()]
        if self.ladder:
            why = [*self.ladder_arms().values(), *(arm for group in self.repeat_arms().values() for arm in group)]
            arms += why + [self.unguided_as(arm) for arm in why]
        arms += [arm for group in (self.published_arms(), *sweep.values()) for arm in group.values()]
        pairs = [(arm, space) for arm in arms for space in self.feature_spaces]
        pairs += [(arm, self.feature_spaces[0]) for group in self.seed_block_arms().values() for arm in group]
        found: dict[tuple, tuple] = {}
        for arm, space in pairs:
            found.setdefault((arm.digest, space), (arm, space))  # under the first of its labels
        return list(found.values())

    @property
    def reference(self) -> RealSet:
        """The real images that arms are scored against."""
        return RealSet(self.dataset, self.reference_split, self.num_reference)

    @property
    def other_reference(self) -> RealSet:
        """As many real images of the other split: is what was measured true of training and of test images?"""
        if self.reference_split == "test":
            return RealSet(self.dataset, "train", self.num_reference)
        return RealSet(self.dataset, "test", min(self.num_reference, datasets.TEST_IMAGES))

    @property
    def floor(self) -> RealSet:
        """Other real images, test images, as many as an arm has or there are: what a perfect sampler would score."""
        start = self.num_reference if self.reference_split == "test" else 0
        return RealSet(self.dataset, "test", min(self.num_eval, datasets.TEST_IMAGES - start), start)

    def lacks(self, arm: ImageSet | RealSet, space: str) -> bool:
        """Whether the scores of an arm are still to be computed."""
        artifact = evaluation(self.store, arm, self.reference, space, self.num_resamples)
        return artifact.digest not in self.store.kept and not artifact.status().hit

    def scores(self, arm: ImageSet | RealSet, space: str | None = None, reference: RealSet | None = None) -> Scores:
        """Scores of an arm in a feature space (default: the first) against a reference (default: `reference`)."""
        return evaluate(self.store, arm, reference or self.reference, space or self.feature_spaces[0],
                        self.num_resamples)  # fmt: skip
