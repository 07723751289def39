"""From scores to recorded statements, and the members' gradients by noise level (notebooks 04 to 06).

Words follow intervals by one rule, so that a sentence cannot say more than its number: "lower than" if the
whole interval lies below zero, "higher than" if above, else "not distinguishable from".
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy import stats

from dgutils.discriminator import EVALUATION, Ensemble, perturb
from dgutils.guidance import grad_log_density_ratio
from dgutils.metrics import Interval, Resampled
from dgutils.noise import keyed_rng, sigma_to_vp_time, vp_scale, vp_time_to_sigma
from dgutils.pipeline import jobs
from dgutils.pipeline.experiment import Experiment
from dgutils.pipeline.jobs import Guidance, Scores, Trained, device
from dgutils.pipeline.parameters import Parameters
from dgutils.pipeline.store import Store
from dgutils.results.records import Recorder

SCORES = {"fd": ("FD", 1), "kid": ("KID x 1000", 1000)}  # name in print, and factor
GRADIENTS_VERSION = 1  # raise it when the numbers of `member_gradients` change


# ---- statements --------------------------------------------------------------------------


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in another unit."""
    return replace(interval, value=factor * interval.value, low=factor * interval.low, high=factor * interval.high)


def direction(interval: Interval) -> str:
    """What the interval of a difference allows to say."""
    if interval.high < 0:
        return "lower than"
    return "higher than" if interval.low > 0 else "not distinguishable from"


def verdict(published_change: float, interval: Interval) -> str:
    """Our interval of a change against the published one: its sign is all that scales can share."""
    if direction(interval) == "not distinguishable from":
        return "not distinguishable"
    return "same sign" if (interval.value < 0) == (published_change < 0) else "opposite"


def summary(verdicts: list[str]) -> str:
    """One word for the verdicts of all feature spaces."""
    if all(word == "same sign" for word in verdicts):
        return "reproduced"
    return "partly reproduced" if "same sign" in verdicts and "opposite" not in verdicts else "not reproduced"


def mean_scores(members: list[Scores], label: str) -> Scores:
    """The mean of several arms' scores, as the scores of one: what a member reaches on average."""
    def mean(score):
        return Resampled(float(np.mean([getattr(m, score).value for m in members])),
                         np.mean([getattr(m, score).draws for m in members], axis=0))  # fmt: skip

    manifold = {k: float(np.mean([m.manifold[k] for m in members])) for k in members[0].manifold}
    return Scores(replace(members[0].arm, label=label), members[0].space, "+".join(m.digest for m in members),
                  mean("fd"), mean("kid"), manifold)  # fmt: skip


def excess(arm: Scores, unguided: Scores) -> Scores:
    """What guidance does to an arm: its scores less those of as many steps without it, as scores of their own.

    More steps make better images without any guidance. To compare the *guidance* of arms of different numbers of steps
    is to compare these, a difference of differences; of equal numbers it is the plain difference.
    """
    def less(score):
        a, b = getattr(arm, score), getattr(unguided, score)
        arm.minus(unguided, score)  # raises unless the two are of the same seeds
        return Resampled(a.value - b.value, a.draws - b.draws)

    manifold = {k: value - unguided.manifold[k] for k, value in arm.manifold.items()}
    return Scores(replace(arm.arm, label=f"effect of {arm.arm.label}"), arm.space, f"{arm.digest}+{unguided.digest}",
                  less("fd"), less("kid"), manifold)  # fmt: skip


def held_out(history: list[dict]) -> dict[str, float]:
    """Of a member's history: epochs, the best one (of least held-out loss), and its losses there and at the end."""
    best = min(history, key=lambda row: row["val_loss"])
    return {"epochs": history[-1]["epoch"], "best_epoch": best["epoch"], "best_loss": best["val_loss"],
            "last_loss": history[-1]["val_loss"], "last_train_loss": history[-1]["train_loss"]}  # fmt: skip


def change(arm: Scores, baseline: Scores, score: str) -> Interval:
    """Paired difference arm - baseline in "fd" or "kid", in the unit of print (KID x 1000)."""
    return scaled(arm.minus(baseline, score), SCORES[score][1])


def record_interval(recorder: Recorder, key: str, interval: Interval, **about) -> None:
    """Record a value with its interval; `about` as in Recorder.record."""
    recorder.record(key, interval.value, interval=(interval.low, interval.high), level=interval.level, **about)


def two_digits(interval: Interval) -> int | None:
    """Decimals that show two digits of the half width: of a difference one reads whether it reaches zero."""
    half = (interval.high - interval.low) / 2
    return max(0, 1 - math.floor(math.log10(half))) if half else None


def record_change(recorder: Recorder, key: str, cell: str, arm: Scores, baseline: Scores) -> None:
    """Record <key>.fd_change and .kid_change, paired, and their words <key>.fd_direction and .kid_direction."""
    about = dict(cell=cell, n=arm.arm.n, seeds=arm.arm.seeds, artifacts=f"{arm.digest}+{baseline.digest}".split("+"))
    for score, (name, _) in SCORES.items():
        interval = change(arm, baseline, score)
        label = f"{name} of {arm.arm.label} minus {baseline.arm.label}, {arm.space}"
        record_interval(recorder, f"{key}.{score}_change", interval, label=label, digits=two_digits(interval), **about)
        recorder.record(f"{key}.{score}_direction", direction(interval), label=f"{label}, in words", **about)


def over_trainings(values, level: float = 0.95) -> Interval:
    """Mean of a value over independent trainings, with Student's interval; of one training, the value alone."""
    values = np.asarray(values, np.float64)
    mean, half = values.mean(), 0.0
    if len(values) > 1:
        half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(mean), float(mean - half), float(mean + half), level, 0)


def change_over_trainings(pairs: list[tuple[Scores, Scores]], score: str) -> Interval:
    """Change from baseline to arm: over trainings Student's interval, of one training the paired bootstrap's.

    pairs: for each training the scores of an arm and of its baseline. The unit is that of print.
    """
    changes = [change(*pair, score) for pair in pairs]
    return changes[0] if len(pairs) == 1 else over_trainings([interval.value for interval in changes])


def record_trainings(recorder: Recorder, key: str, cell: str, pairs: list[tuple[Scores, Scores]]) -> None:
    """Record arm - baseline over trainings: <key>.<score>_change, its _direction, and its SD between trainings, _sd.

    pairs: for each training the scores of an arm and of its baseline. Of one training the change has its paired
    bootstrap interval, no SD, and says nothing of others.
    """
    if len(pairs) == 1:
        record_change(recorder, key, cell, *pairs[0])
        return
    digests = [digest for pair in pairs for scores in pair for digest in scores.digest.split("+")]
    arm, baseline = (scores.arm.label.partition(", training")[0] for scores in pairs[0])
    about = dict(cell=cell, n=pairs[0][0].arm.n, seeds=pairs[0][0].arm.seeds, artifacts=list(dict.fromkeys(digests)))
    for score, (name, _) in SCORES.items():
        values = [change(*pair, score).value for pair in pairs]
        interval = change_over_trainings(pairs, score)
        label = f"{name} of {arm} minus {baseline}, {pairs[0][0].space}, over {len(pairs)} trainings"
        record_interval(recorder, f"{key}.{score}_change", interval, label=label, digits=two_digits(interval), **about)
        recorder.record(f"{key}.{score}_direction", direction(interval), label=f"{label}, in words", **about)
        for number, value in enumerate(values, 1):
            recorder.record(f"{key}.{score}_change.training{number}", value, label=f"training {number}: {label}",
                            digits=two_digits(interval), **about)  # fmt: skip
        recorder.record(f"{key}.{score}_sd", float(np.std(values, ddof=1)), label=f"SD of {label}",
                        digits=two_digits(interval), **about)  # fmt: skip


def record_scores(recorder: Recorder, key: str, cell: str, scores: Scores, baseline: Scores | None = None) -> None:
    """Record an arm in one space: <key>.fd, .kid, the manifold scores, and with a baseline its changes."""
    about = dict(cell=cell, n=scores.arm.n, seeds=scores.arm.seeds or None, artifacts=scores.digest.split("+"))
    for score, (name, factor) in SCORES.items():
        record_interval(recorder, f"{key}.{score}", scaled(getattr(scores, score).interval(), factor),
                        label=f"{name} of {scores.arm.label}, {scores.space}", **about)  # fmt: skip
    for name, value in scores.manifold.items():
        recorder.record(f"{key}.{name}", value, label=f"{name} of {scores.arm.label}, {scores.space}", digits=3,
                        **about)  # fmt: skip
    if baseline is not None:
        record_change(recorder, key, cell, scores, baseline)


def record_blocks(recorder: Recorder, key: str, cell: str, blocks: list[Scores]) -> None:
    """FD of every block of seeds, their mean, sample standard deviation (of more than one) and minimum."""
    values = np.array([scores.fd.value for scores in blocks])
    about = dict(cell=cell, n=blocks[0].arm.n, digits=2)
    for number, (value, scores) in enumerate(zip(values, blocks, strict=True), 1):
        recorder.record(f"{key}.block{number}", value, label=f"FD of {scores.arm.label}", seeds=scores.arm.seeds,
                        artifacts=[scores.digest], **about)  # fmt: skip
    for name, value in (("mean", values.mean()), ("min", values.min())):
        recorder.record(f"{key}.{name}", value, label=f"{name} of FD over {len(values)} blocks", **about)
    if len(values) > 1:
        recorder.record(f"{key}.sd", values.std(ddof=1), label=f"SD of FD over {len(values)} blocks", **about)


def statement(recorder: Recorder, key: str, subject: str, baseline: str) -> str:
    """A recorded change as a sentence, KID first."""
    text = recorder.results.text
    kid, fd = (f"**{text(f'{key}.{score}_direction')}** that of {baseline} (change {text(f'{key}.{score}_change')})"
               for score in ("kid", "fd"))  # fmt: skip
    return f"KID x 1000 of {subject} is {kid}; FD is {fd}."


def scores_table(recorder: Recorder, name: str, labels: dict[str, str], slot: str, caption: str) -> None:
    """A table of what `record_scores` recorded: one row for each key of `labels`, in the space of this slot."""
    columns = {"fd": "FD", "kid": "KID x 1000", "fd_change": "FD change", "kid_change": "KID change",
               "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"}  # fmt: skip
    rows = []
    for key, label in labels.items():
        cells = [f"{key}.{slot}.{column}" for column in columns]
        rows.append((label, *(cell if cell in recorder.records else None for cell in cells)))
    recorder.table(name, ["Arm", *columns.values()], rows, caption)


# ---- the members' gradients --------------------------------------------------------------


@dataclass(frozen=True)
class MemberGradients:
    """Logits [M,L,N] of M members on N noised images at L noise levels, and the Gram matrices [L,N,M,M] of
    their gradients, <grad_x log r_a, grad_x log r_b>. Cosines and norms under every rule follow from these."""

    sigmas: np.ndarray
    logits: np.ndarray
    gram: np.ndarray

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosine [L,N,M,M] between the gradients of two members at one image."""
        norm = np.sqrt(np.einsum("lnaa->lna", self.gram))
        return self.gram / (norm[..., :, None] * norm[..., None, :])

    @cached_property
    def cosines_to_mean(self) -> np.ndarray:
        """Cosine [L,N,M] between a member's gradient and the mean of all, which is the mean logit's gradient."""
        norm = np.sqrt(np.einsum("lnaa->lna", self.gram))
        return self.gram.mean(axis=-1) / (norm * self.mean_norm[..., None])

    @property
    def mean_norm(self) -> np.ndarray:
        """Norm [L,N] of the mean logit's gradient."""
        return np.sqrt(self.gram.mean(axis=(2, 3)))

    @property
    def fault_gain(self) -> np.ndarray:
        """Factor [L,N] by which raw logits taken for probabilities change that gradient (`fault_gain`)."""
        return fault_gain(self.logits.mean(axis=0))


def guided_sigmas(parameters: Parameters, levels: int) -> np.ndarray:
    """Noise levels [levels], evenly spaced in log sigma over the part of the sampler's range that is guided."""
    window = vp_time_to_sigma(torch.tensor([parameters.time_min, parameters.time_max], dtype=torch.float64)).tolist()
    return np.geomspace(max(window[0], parameters.sigma_min), min(window[1], parameters.sigma_max), levels)


def guidance_norms(experiment: Experiment, guidance: Guidance, seeds) -> np.ndarray:
    """Norm of what guidance adds to the denoised image at each Euler predictor, [steps, N], zero outside the window.

    Follows the guided trajectories of these seeds in one batch; nothing is stored. Pixels span -1 to 1.
    """
    denoise, norms = jobs.make_denoiser(experiment.sampling(), guidance), []

    def watched(x, sigma, step, order):
        denoised = denoise(x, sigma, step, order)
        if order == 1:
            norms.append(denoise.last_guidance.flatten(1).norm(dim=1).cpu().numpy())
        return denoised

    jobs.draw(experiment.sampling(), watched, seeds, denoise.churn)
    return np.stack(norms)


def fault_gain(mean_logit) -> np.ndarray:
    """Derivative of log(m / (1 - m)) by the mean logit m, clipped to [1e-5, 1 - 1e-5]: 0, or 1/(m(1 - m)) >= 4."""
    m = np.asarray(mean_logit, np.float64)
    inside = (m > 1e-5) & (m < 1 - 1e-5)
    safe = np.where(inside, m, 0.5)
    return np.where(inside, 1 / (safe * (1 - safe)), 0.0)


def gradient_gram(ensemble: Ensemble, images, sigmas, seed: int) -> MemberGradients:
    """MemberGradients of an ensemble's members on images uint8 [N,H,W,C], noised to each sigma, in float32."""
    members = [Ensemble(ensemble.extractor, [head], "mean_logit") for head in ensemble.heads]
    logits, gram = [], []
    for level, sigma in enumerate(np.asarray(sigmas, np.float64)):
        sigma = torch.full((len(images),), sigma, dtype=torch.float64)
        x_vp = perturb(images, sigma_to_vp_time(sigma), keyed_rng(seed, level, 0, EVALUATION))
        x, sigma = (x_vp / vp_scale(sigma)[:, None, None, None]).to(device()), sigma.to(device())
        grads, ratios = zip(*(grad_log_density_ratio(m, x, sigma) for m in members), strict=True)
        grads = torch.stack(grads).flatten(2)  # [M,N,CHW]
        logits.append(torch.stack(ratios).cpu().numpy())  # [M,N]
        gram.append(torch.einsum("and,bnd->nab", grads, grads).cpu().numpy())  # [N,M,M]
    return MemberGradients(np.asarray(sigmas, np.float64), np.stack(logits, axis=1), np.stack(gram))


def member_gradients(store: Store, trained: Trained, sigmas, num_images: int) -> MemberGradients:
    """`gradient_gram` of all members on at most num_images *generated* test images, found or computed.

    Generated, because that is where the sampler walks; of the test split, because no member knows them.
    """
    config = {"sigmas": [float(s) for s in sigmas], "num_images": num_images}
    artifact = store.artifact("gradients", GRADIENTS_VERSION, config, {"discriminators": trained.digest},
                              "members' gradients")  # fmt: skip

    def make(folder):
        images = trained.test_split.images[trained.test_split.labels == 0][:num_images]
        found = gradient_gram(trained.ensemble().to(device()), images, sigmas, trained.config.seed)
        np.save(folder / "logits.npy", found.logits)
        np.save(folder / "gram.npy", found.gram)

    path = artifact.ensure(make).path
    logits, gram = (np.load(path / f"{name}.npy", allow_pickle=False) for name in ("logits", "gram"))
    return MemberGradients(np.asarray(sigmas, np.float64), logits, gram)
