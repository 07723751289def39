"""What a notebook begins with: its profile's parameters, a store, and the few verbs by which arms are declared.

Nothing is drawn or trained by naming it. `work` and `plan`, which run a notebook's declaring cells alone, know it too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from dgutils import datasets
from dgutils.discriminator import MemberConfig
from dgutils.networks.checkpoints import head_config
from dgutils.pipeline import jobs
from dgutils.pipeline.jobs import Guidance, ImageSet, Likelihood, RealSet, Sampling, Score, Scores, Trained, Training
from dgutils.pipeline.parameters import Parameters, load

# The faults of the study's ensemble (`faulty_ensemble`), in words.
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


class Experiment:
    """One notebook's parameters and store, and what it declares: `scored`, and what is made without being scored.

    reference: the real images that arms are scored against. floor: other real images, test images, as many as an arm
    has or there are: what a perfect sampler would score.
    """

    def __init__(self, namespace: Mapping[str, Any], notebook: str = "notebook"):
        """namespace: where the parameters are, `globals()` in a notebook; what is None there is the profile's."""
        said = {name: namespace[name] for name in Parameters.model_fields if namespace.get(name) is not None}
        self.parameters = p = load(said.pop("profile", None) or "quick", said, f"notebook {notebook}")
        self.notebook, self.store = notebook, jobs.open_store(p.profile)
        self.reference = self.real(p.reference_split)
        self.floor = self.real("test", p.num_eval, p.num_reference if p.reference_split == "test" else 0)
        self.scored: list[Score] = []
        self.made: list[ImageSet | Likelihood | Trained] = []
        self.sampling(), self.training(), self.guide(None)  # what is impossible is said now, not hours later

    # --- how images are drawn and discriminators trained: the profile's settings, with changes

    def sampling(self, **changes) -> Sampling:
        """Table 2's schedule; `changes` replaces fields of Sampling."""
        shared = "score_network", "num_steps", "sigma_min", "sigma_max", "rho", "batch_size", "shard_size", "precision"
        return Sampling(**{name: getattr(self.parameters, name) for name in shared} | changes)

    def training(self, epoch_scale: float | None = None, **changes) -> Training:
        """Table 1, its epochs times the profile's epoch_scale or this one; `changes` replaces fields of Training."""
        p = self.parameters
        columns = zip(p.member_names, p.learning_rates, p.weight_decays, p.epochs, p.min_times, strict=True)
        members = tuple(MemberConfig(name, rate, decay, max(1, round(epochs * (epoch_scale or p.epoch_scale))), time)
                        for name, rate, decay, epochs, time in columns)
        head = head_config(p.feature_extractor, p.head_width, p.head_blocks, p.head_channels)
        settings = dict(
            dataset=p.dataset, feature_extractor=p.feature_extractor, head=head, members=members, num_real=p.num_fake,
            batch_size=p.discriminator_batch_size, seed=p.training_seed, sequential=p.sequential, precision=p.precision,
            held_out_every=p.held_out_every, parts=p.training_parts, start=p.head_start)
        return Training(**settings | changes)

    def guide(self, discriminators, members: Iterable = (0,), rule: str = "mean_logit", **changes) -> Guidance:
        """Table 2's guidance by these members; `changes` replaces fields of Guidance (weight_1st_order=...)."""
        p = self.parameters
        settings = dict(weight_1st_order=p.dg_weight_1st_order, weight_2nd_order=p.dg_weight_2nd_order,
                        time_min=p.time_min, time_max=p.time_max, boosting=p.boosting, log_ratio=p.log_ratio)
        return Guidance(discriminators, tuple(members), rule, **settings | changes)

    # --- what there is to compare

    def images(self, label: str, guide: Guidance | None = None, n: int | None = None, block: int = 0,
               **sampling) -> ImageSet:
        """Images of the evaluation seeds, the same in every arm: num_eval of them, or the first n.

        Block b has the seeds from eval_seed + b num_eval on; `sampling` replaces fields of Sampling.
        """
        p = self.parameters
        return ImageSet(self.store, self.sampling(**sampling), n or p.num_eval, p.eval_seed + block * p.num_eval,
                        guide, label)

    def unguided_as(self, arm: ImageSet) -> ImageSet:
        """What guidance in an arm is to be compared with: as many unguided images, of as many steps."""
        steps = arm.sampling.num_steps
        label = "unguided sampling" + (f", {steps} steps" if steps != self.parameters.num_steps else "")
        return self.images(label, n=arm.n, num_steps=steps)

    def real(self, split: str, n: int | None = None, start: int = 0) -> RealSet:
        """n real images of a split (default: as many as the reference has, or there are) from number `start` on."""
        n = n or self.parameters.num_reference
        n = min(n, datasets.TEST_IMAGES - start) if split == "test" else n
        return RealSet(self.parameters.dataset, split, n, start)

    def discriminators(self, label: str, training: Training, fakes: ImageSet,
                       better: ImageSet | None = None) -> Trained:
        """Discriminators that learn to tell generated images from as many real ones, or from `better` ones."""
        return Trained(self.store, training, fakes, label, better)

    def likelihoods(self, guides: Mapping[str, Guidance | None]) -> dict[str, Likelihood]:
        """Label -> the likelihood, guided so, of the first num_likelihood test images; nothing if that is 0."""
        return {label: Likelihood(self.store, self.real("test", n), self.sampling(), guide, label)
                for label, guide in guides.items() if (n := self.parameters.num_likelihood)}

    # --- what is to be made

    def declare(self, arms: Mapping[str, Any], spaces: Iterable[str] | None = None,
                reference: RealSet | None = None) -> None:
        """Say what this notebook will use: image sets, to be scored, and discriminators, to be trained.

        arms: name -> an image set, discriminators, or a list of them. spaces: in which feature spaces they are scored
        (default: all; [] for none: only made). reference: the real images that they are scored against.
        """
        spaces = self.parameters.feature_spaces if spaces is None else spaces
        for one in (one for arm in arms.values() for one in (arm if isinstance(arm, list) else [arm])):
            self.scored += [self._score(one, space, reference) for space in spaces if not isinstance(one, Trained)]
            self.made += [one] if isinstance(one, Trained) or not spaces else []

    def scores(self, arm: ImageSet | RealSet, space: str | None = None, reference: RealSet | None = None) -> Scores:
        """Scores of an arm in a feature space (default: the first) against a reference (default: `reference`)."""
        return self._score(arm, space or self.parameters.feature_spaces[0], reference).ensure()

    def _score(self, arm: ImageSet | RealSet, space: str, reference: RealSet | None) -> Score:
        p = self.parameters
        return Score(self.store, arm, reference or self.reference, space, p.num_resamples, p.linear_from)


# --- what several notebooks share


def fake_set(experiment: Experiment, block: int = 0, **sampling) -> ImageSet:
    """The generated images that discriminators learn from: num_fake unguided ones, from fake_seed on.

    Block b has the seeds from fake_seed + b num_fake on.
    """
    p = experiment.parameters
    label = "fake set" + (f" {block + 1}" if block else "")
    label += "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampling.items())
    first = p.fake_seed + block * p.num_fake
    return ImageSet(experiment.store, experiment.sampling(**sampling), p.num_fake, first, label=label)


def independent(experiment: Experiment, repeat: int, label: str = "six discriminators", sampling=None,
                **changes) -> Trained:
    """Discriminators of a training that shares nothing with another: fake set, real images, weights, order, noise.

    sampling: of the fake set, changes as in `Experiment.sampling`; changes: as in `Experiment.training`.
    """
    seed = experiment.parameters.training_seed + repeat
    training = experiment.training(**{"seed": seed, "real_seed": seed} | changes)
    fakes = fake_set(experiment, repeat, **sampling or {}).first(training.num_real)
    return experiment.discriminators(f"{label}, training {repeat + 1}", training, fakes)


def six_discriminators(experiment: Experiment, label: str = "six discriminators", **changes) -> Trained:
    """The discriminators of table 1; `changes` as in `Experiment.training`, the label for those that have some.

    They keep the state that lay in the wrong file, if the profile's ladder has that fault.
    """
    kept = (wrong_state(experiment),) if "wrong_file" in experiment.parameters.ladder else ()
    training = experiment.training(**({"kept": kept} | changes))
    return experiment.discriminators(label, training, fake_set(experiment))


def wrong_state(experiment: Experiment) -> tuple[int, int]:
    """(member, epoch), scaled as all epochs are, of the file that lay in slot 3."""
    return WRONG_MEMBER, max(1, round(WRONG_EPOCH * experiment.parameters.epoch_scale))


def faulty_ensemble(experiment: Experiment, faults: Iterable[str], label: str, n: int | None = None,
                    repeat: int = 0) -> ImageSet:
    """Images guided by the study's ensemble with some of FAULTS; without any, by the mean probability of its members.

    repeat: which training, of other seeds; the images' seeds are the same.
    """
    p, as_run = experiment.parameters, experiment.parameters.as_run
    batch = as_run.discriminator_batch_size if "batch_size" in faults else p.discriminator_batch_size
    kind = "one network, six settings" if "sequential" in faults else "six discriminators"
    trained = six_discriminators(experiment, f"{kind}, batches of {batch}, training {repeat + 1}", batch_size=batch,
                                 sequential="sequential" in faults, seed=p.training_seed + repeat)
    members: list = list(range(len(p.member_names)))
    if "wrong_file" in faults:
        members[WRONG_SLOT] = wrong_state(experiment)
    rule = "raw_logits_as_probabilities" if "raw_logits" in faults else "mean_probability"
    guide = experiment.guide(trained, members, rule, state="last" if "last_epoch" in faults else "best",
                             boosting=as_run.boosting if "boosting" in faults else p.boosting)
    return experiment.images(label, guide, n, num_steps=as_run.num_steps if "steps" in faults else p.num_steps)


def key_arms(experiment: Experiment) -> dict[str, list[ImageSet]]:
    """The arms that stand over several trainings, num_key images each: one discriminator, correct ensemble, as run."""
    p, repeats = experiment.parameters, range(experiment.parameters.repeats)

    def paper(repeat: int) -> ImageSet:
        label = f"training {repeat + 1}"
        trained = six_discriminators(experiment, f"six discriminators, {label}", seed=p.training_seed + repeat)
        return experiment.images(f"Paper, {label}", experiment.guide(trained, state="best"), p.num_key)

    def ensembles(name: str, faults: Iterable[str]) -> list[ImageSet]:
        return [faulty_ensemble(experiment, faults, f"{name}, training {i + 1}", p.num_key, i) for i in repeats]

    return {"paper": [paper(i) for i in repeats], "correct": ensembles("correct", []),
            "as_run": ensembles("as_run", p.ladder)}
