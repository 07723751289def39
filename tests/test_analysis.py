"""Words follow intervals; gradients of linear members have known inner products."""

import numpy as np
import pytest
import torch

from dgutils.discriminator import Ensemble, raw_logits_as_probabilities
from dgutils.errors import UserError
from dgutils.metrics import Interval, Resampled
from dgutils.pipeline.jobs import ImageSet, Scores
from dgutils.results import analysis
from dgutils.results.records import Recorder


@pytest.mark.parametrize("low, high, word, down, up", [
    (-2.0, -1.0, "lower than", "same sign", "opposite"),
    (1.0, 2.0, "higher than", "opposite", "same sign"),
    (-1.0, 2.0, "not distinguishable from", "not distinguishable", "not distinguishable"),
    (0.0, 2.0, "not distinguishable from", "not distinguishable", "not distinguishable")])  # fmt: skip
def test_words_follow_the_interval(low, high, word, down, up):
    interval = Interval((low + high) / 2, low, high, 0.95, 100)
    assert analysis.direction(interval) == word
    assert analysis.verdict(-0.26, interval) == down and analysis.verdict(12.0, interval) == up


class Rows:
    """A set of images that only has seeds."""

    first_seed = 50


def scores(label, fd, kid, n=20):
    spread = np.linspace(-1, 1, 11)
    manifold = {"precision": fd / 10, "recall": 0.5, "density": 1.0, "coverage": 0.25}
    return Scores(ImageSet(label, n, Rows()), "space", f"digest-{label}", Resampled(fd, fd + spread),
                  Resampled(kid, kid + spread * kid), manifold)  # fmt: skip


def test_changes_are_paired_scaled_and_recorded_with_their_words(tmp_path):
    recorder = Recorder("quick", "04_evaluation", tmp_path)
    unguided, guided = scores("unguided", 4.0, 0.002), scores("guided", 3.0, 0.003)
    analysis.record_scores(recorder, "arm.guided", "The arms", guided, unguided)
    record = recorder.records["arm.guided.fd_change"]
    assert record["value"] == -1 and np.abs(np.array(record["interval"]) + 1).max() < 1e-12  # equal draws cancel
    assert record["n"] == 20 and record["seeds"] == {"first": 50, "count": 20}
    assert record["artifacts"] == ["digest-guided", "digest-unguided"]
    assert recorder.records["arm.guided.fd_direction"]["value"] == "lower than"
    assert recorder.records["arm.guided.kid"]["value"] == 3
    assert abs(recorder.records["arm.guided.kid_change"]["value"] - 1) < 1e-12
    assert recorder.records["arm.guided.precision"]["value"] == 0.3
    sentence = analysis.statement(recorder, "arm.guided", "guidance", "no guidance")
    assert "KID x 1000 of guidance is **higher than** that of no guidance" in sentence and "**lower than**" in sentence
    analysis.scores_table(recorder, "arms", {"arm.guided": "Guided", "arm.other": "Other"}, "none", "Caption.")
    assert recorder.tables["arms"]["rows"][1] == ("Other", *[None] * 8)


def test_excess_compares_guidance_of_unequal_steps():
    plain, better = scores("unguided", 4.0, 0.002), scores("unguided, more steps", 3.0, 0.001)
    one = analysis.excess(scores("one", 3.0, 0.001), plain)
    other = analysis.excess(scores("other", 3.0, 0.001), better)
    assert (one.fd.value, one.kid.value, other.fd.value) == (-1, -0.001, 0)
    assert one.digest == "digest-one+digest-unguided"
    assert one.minus(other).value == -1 and abs(one.minus(other).low + 1) < 1e-12  # fd: equal draws cancel
    same = analysis.excess(scores("other", 5.0, 0.003), plain)  # of equal steps: the plain difference
    direct = scores("one", 3.0, 0.001).minus(scores("other", 5.0, 0.003), "kid")
    assert np.allclose([same.minus(one, "kid").value, one.minus(same, "kid").low], [0.002, direct.low])
    with pytest.raises(UserError, match="a paired comparison needs equal"):
        analysis.excess(scores("one", 3.0, 0.001, n=10), plain)


def test_mean_of_members():
    mean = analysis.mean_scores([scores("a", 2.0, 0.001), scores("b", 4.0, 0.003)], "mean")
    assert (mean.fd.value, mean.kid.value, mean.arm.label) == (3, 0.002, "mean")
    assert abs(mean.manifold["precision"] - 0.3) < 1e-12 and mean.digest == "digest-a+digest-b"
    interval = mean.minus(scores("c", 1.0, 0.002))
    assert abs(interval.value - 2) < 1e-12 and interval.high - interval.low < 1e-12


class Pass(torch.nn.Module):
    """An extractor that leaves images alone."""

    def features(self, x_vp, vp_time):
        return x_vp


class Linear(torch.nn.Module):
    """The logit <w, x_vp>, whose gradient by x is w / sqrt(1 + sigma^2)."""

    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, features, vp_time, class_labels=None):
        return features.flatten(1) @ self.w[:, None]


def test_gram_of_linear_members():
    w = np.array([[1.0, 0, 0, 0], [0, 2, 0, 0], [3, 4, 0, 0]])
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 1), dtype=np.uint8)
    found = analysis.gradient_gram(Ensemble(Pass(), [Linear(row) for row in w], "mean_logit"), images, [0.5, 2.0], 7)
    assert found.logits.shape == (3, 2, 5)
    for level, sigma in enumerate((0.5, 2.0)):
        assert np.abs(found.gram[level] - w @ w.T / (1 + sigma**2)).max() < 1e-6
        mean = w.mean(0) / np.sqrt(1 + sigma**2)
        assert np.abs(found.mean_norm[level] - np.linalg.norm(mean)).max() < 1e-6
    cosines = [[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1]]
    assert np.abs(found.cosines - cosines).max() < 1e-6
    to_mean = w @ w.mean(0) / np.linalg.norm(w, axis=1) / np.linalg.norm(w.mean(0))
    assert np.abs(found.cosines_to_mean - to_mean).max() < 1e-6


def test_fault_gain_is_the_slope_of_the_faulty_rule():
    logit = torch.tensor([-3.0, -1e-6, 1e-6, 1e-3, 0.5, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(raw_logits_as_probabilities(logit[None]).sum(), logit)
    gain = analysis.fault_gain(logit.detach().numpy())
    assert np.abs(gain / np.maximum(slope.numpy(), 1) - slope.numpy().clip(max=1)).max() < 1e-9
    assert gain.tolist()[:3] == [0, 0, 0] and gain[4] == 4 and gain[6] == 0


def test_over_trainings_is_students_interval():
    """Of 1, 2, 3: mean 2, SD 1, and t(0.975; 2) = 4.302653 (any table of Student's distribution)."""
    interval = analysis.over_trainings([1.0, 2.0, 3.0])
    assert abs(interval.value - 2) < 1e-12 and abs(interval.high - (2 + 4.302653 / 3**0.5)) < 1e-5
    assert abs(interval.low + interval.high - 4) < 1e-12
    alone = analysis.over_trainings([5.0])
    assert (alone.value, alone.low, alone.high) == (5, 5, 5)


def test_held_out_finds_the_best_epoch():
    history = [dict(epoch=e, val_loss=v, train_loss=t) for e, v, t in ((1, 0.7, 0.7), (2, 0.6, 0.6), (3, 0.9, 0.3))]
    assert analysis.held_out(history) == {
        "epochs": 3, "best_epoch": 2, "best_loss": 0.6, "last_loss": 0.9, "last_train_loss": 0.3}
