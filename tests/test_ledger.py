"""Words follow intervals, sentences and claims follow words."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from dgutils import metrics
from dgutils.errors import UserError
from dgutils.metrics import Resampled
from dgutils.pipeline import jobs
from dgutils.pipeline.jobs import RealSet, Scores
from dgutils.results.ledger import Ledger, excess, holm, mean_of, over_trainings
from dgutils.results.statements import direction, summary, verdict


@pytest.mark.parametrize("low, high, word, down, up", [
    (-2.0, -1.0, "lower than", "same sign", "opposite"),
    (1.0, 2.0, "higher than", "opposite", "same sign"),
    (-1.0, 2.0, "not distinguishable from", "not distinguishable", "not distinguishable"),
    (0.0, 2.0, "not distinguishable from", "not distinguishable", "not distinguishable")])
def test_words_follow_the_interval(low, high, word, down, up):
    assert direction(low, high) == word
    assert verdict(-0.26, low, high) == down and verdict(12.0, low, high) == up


@pytest.mark.parametrize("verdicts, word", [
    (["same sign", "same sign"], "reproduced"), (["same sign", "not distinguishable"], "partly reproduced"),
    (["same sign", "opposite"], "not reproduced"), (["not distinguishable"], "not reproduced"),
    ([], "not testable at this scale")])
def test_a_claim_gets_one_word(verdicts, word):
    assert summary(verdicts) == word


@dataclass
class Arm:
    """A set of images that only has seeds."""

    label: str
    n: int

    @property
    def seeds(self):
        return range(50, 50 + self.n)


def scores(label, fd, kid, n=20):
    spread = np.linspace(-1, 1, 11)
    manifold = {"precision": fd / 10, "recall": 0.5, "density": 1.0, "coverage": 0.25}
    return Scores(Arm(label, n), "space", f"digest-{label}", Resampled(fd, fd + spread),
                  Resampled(kid, kid + spread * kid), manifold)


PARAMETERS = SimpleNamespace(profile="quick", feature_spaces=["own"], num_reference=100, reference_split="test")


@pytest.fixture
def ledger():
    """The ledger of a notebook whose arms are their scores."""
    return Ledger(SimpleNamespace(parameters=PARAMETERS, notebook="04_evaluation",
                                  scores=lambda arm, space, reference: arm))


def test_arms_are_compared_recorded_and_shown(ledger):
    arms = {"unguided": scores("unguided sampling", 4.0, 0.002), "guided": scores("guidance", 3.0, 0.003)}
    shown = ledger.compare(ledger.scores(arms), "unguided", "arm", "The arms", ["arms"], {"guided": "Guided"})
    record = ledger.records["arm.guided.first.fd_change"]
    assert record["value"] == -1 and np.abs(np.array(record["interval"]) + 1).max() < 1e-12  # equal draws cancel
    assert record["n"] == 20 and record["seeds"] == {"first": 50, "count": 20} and record["cell"] == "The arms"
    assert record["artifacts"] == ["digest-guidance", "digest-unguided sampling"]
    assert ledger.records["arm.guided.first.kid"]["value"] == 3
    assert abs(ledger.records["arm.guided.first.kid_change"]["value"] - 1) < 1e-12
    assert ledger.records["arm.guided.first.precision"]["value"] == 0.3
    (label, *cells), (other, *changed) = ledger.tables["arms"]["rows"]
    assert (label, other) == ("Unguided sampling", "Guided")
    assert cells[2:4] == [None, None] and changed[2] == "arm.guided.first.fd_change", "a baseline has no change"
    assert "against 100 real test images" in shown.data and "| Guided " in shown.data
    assert ledger.agreement("arm.guided") == "KID of guidance against unguided sampling: all feature spaces agree, " \
        "**higher than**."
    assert "**do not agree**" in ledger.agreement("arm.guided", ["fd", "kid"])
    shown = ledger.show_by_space("changes", "Arm", {"arm.guided": "G"}, {"FD": "*.fd_change", "SD": "*.fd_sd"}, "")
    assert "| G   | -1." in shown.data and ledger.tables["changes"]["rows"][0][2] is None
    (sentence,) = ledger.sentences("arm.guided", "arm.unknown")
    assert sentence.startswith("**own**: KID x 1000 of guidance is **higher than** that of unguided sampling (change ")
    assert "; FD is **lower than** that of unguided sampling (change " in sentence
    level = ledger.text("arm.unguided.first.kid")
    assert ledger.told("from {arm.unguided.*.kid} on") == [f"**own**: from {level} on"]
    assert ledger.intervals({"arm.guided": "G"}, ["fd"])["change of FD\n(own)"]["G"].value == -1


def test_real_images_and_baselines_have_no_change(ledger):
    real = scores("real", 1.0, 0.0)
    real = replace(real, arm=RealSet("fashion_mnist", "test", 20))
    arms = {"floor": {"first": [real]}, "unguided": {"first": [scores("u", 4.0, 0.002)]}}
    ledger.compare(arms, "unguided", "arm", "A", ["arms"])
    assert not [key for key in ledger.records if key.endswith("_change")]
    with pytest.raises(UserError, match="a paired comparison needs equal"):
        ledger.change("x", {"first": [scores("a", 3.0, 0.001, n=10)]}, {"first": [scores("b", 3.0, 0.001)]}, "A")


def test_changes_over_trainings(ledger):
    arm = {"first": [scores(f"arm, training {i}", 3.0 + i, 0.001) for i in (1, 2, 3)]}
    base = {"first": [scores(f"base, training {i}", 2.0, 0.002) for i in (1, 2, 3)]}
    ledger.change("t", arm, base, "A", spread=True)
    record = ledger.records["t.first.fd_change"]
    assert record["value"] == 3 and abs(record["interval"][1] - (3 + 4.302653 / 3**0.5)) < 1e-5  # of 2, 3, 4
    assert record["label"] == "FD of arm minus base, space, over 3 trainings"
    assert ledger.records["t.first.fd_sd"]["value"] == 1
    assert [ledger.records[f"t.first.kid_change.training{i}"]["value"] for i in (1, 2, 3)] == [-1, -1, -1]
    ledger.change("one", {"first": arm["first"][:1]}, {"first": base["first"][:1]}, "A", spread=True)
    assert "one.first.fd_sd" not in ledger.records and ledger.records["one.first.fd_change"]["value"] == 2


def test_claims_of_a_family_need_holm(ledger):
    """Three trainings say -1 and hardly differ, or differ much: alone both are clear of zero, together one is not."""
    def arms(*values):
        return {"first": [replace(scores(f"arm, training {i}", 1.0, 0), kid=Resampled(value, np.full(11, value)))
                          for i, value in enumerate(values)]}

    base = arms(3, 3, 3)
    ledger.claim("clear", "clearly lower", arms(2.01, 2, 1.99), base, "A", sign=-1)
    ledger.claim("faint", "perhaps lower", arms(1.65, 2, 2.35), base, "A", sign=-1)
    ledger.claim("wrong", "clearly higher", arms(2.01, 2, 1.99), base, "A", sign=1)
    ledger.claim("level", "no lower", arms(2, 3, 4), base, "A", sign=-1)
    faint = ledger.p["claim.faint.first.kid"]
    assert ledger.claims["faint"]["verdicts"] == {"first": "same sign"} and 0.025 < faint < 0.05
    shown = ledger.family("claims", "Claims.", "A").data
    assert [ledger.text(f"claim.{key}.summary") for key in ("clear", "faint", "wrong", "level")] == [
        "supported", "not distinguishable", "opposite", "not distinguishable"]
    assert ledger.records["claim.faint.holm"]["value"] == 2 * faint
    assert "Holm's p" in shown


def test_claims_test_themselves(ledger):
    good, bad = {"first": [scores("good", 3.0, 0.001)]}, {"first": [scores("bad", 3.0, 0.003)]}
    ledger.claim("dg", "guidance lowers FID", good, bad, "A", published_as=("dg.edm.fid", "dg.edmgpp.fid"))
    ledger.claim("own", "ours is higher", good, bad, "A", sign=1)
    ledger.claim("none", "of other data", None, None, "A", published_as=("dg.edm.nll", "dg.edmgpp.nll"))
    assert [ledger.text(f"claim.{key}.summary") for key in ("dg", "own", "none")] == [
        "reproduced", "not supported", "not testable at this scale"]
    shown = ledger.claims_table("ledger", "Claims.").data
    assert "| guidance lowers FID | 2.03 " in shown and len(ledger.tables["ledger"]["rows"]) == 3
    lines = ledger.claim_sentences()
    assert lines[0].startswith("guidance lowers FID (published 2.03 to 1.77): **reproduced**; own: same sign, KID x ")
    assert lines[-1] == "1 claims are not testable at this scale: of other data."


def test_a_claim_on_likelihoods_tests_itself_by_their_change(ledger, monkeypatch):
    def likelihood(label, values):
        one = object.__new__(jobs.Likelihood)
        one.n, one.label, one.digest = len(values), label, f"digest-{label}"
        monkeypatch.setattr(one, "ensure", lambda: metrics.resample(np.mean, np.array(values), 200, 0), raising=False)
        return one

    bits = np.random.default_rng(0).normal(3, 0.5, 40)
    plain, better = likelihood("unguided", bits), likelihood("guided", bits - 0.05)
    ledger.claim("nll", "guidance lowers NLL", better, plain, "A", published_as=("dg.edm.nll", "dg.edmgpp.nll"))
    ledger.claim("worse", "guidance raises NLL", better, plain, "A", sign=1)
    record = ledger.records["claim.nll.nll_change"]
    assert abs(record["value"] + 0.05) < 1e-12 and np.allclose(record["interval"], -0.05) and record["n"] == 40
    assert record["unit"] == "bits/dim" and record["artifacts"] == ["digest-guided", "digest-unguided"]
    assert [ledger.text(f"claim.{key}.summary") for key in ("nll", "worse")] == ["reproduced", "not supported"]
    shown = ledger.claims_table("ledger", "Claims.").data
    assert re.search(r"guidance lowers NLL *\| 2.60 bits/dim *\| 2.55 bits/dim *\| -0.05", shown), shown
    (told, *_) = ledger.claim_sentences()
    assert "(published 2.60 bits/dim to 2.55 bits/dim): **reproduced**; test images: same sign, NLL changes by" in told


def test_excess_compares_guidance_of_unequal_steps():
    plain, better = scores("unguided", 4.0, 0.002), scores("unguided, more steps", 3.0, 0.001)
    (one,) = excess({"first": [scores("one", 3.0, 0.001)]}, {"first": [plain]})["first"]
    (other,) = excess({"first": [scores("other", 3.0, 0.001)]}, {"first": [better]})["first"]
    assert (one.fd.value, one.kid.value, other.fd.value) == (-1, -0.001, 0)
    assert one.digest == "digest-one+digest-unguided"
    assert one.minus(other).value == -1 and abs(one.minus(other).low + 1) < 1e-12  # fd: equal draws cancel
    # Of equal steps it is the difference.
    (same,) = excess({"first": [scores("other", 5.0, 0.003)]}, {"first": [plain]})["first"]
    direct = scores("one", 3.0, 0.001).minus(scores("other", 5.0, 0.003), "kid")
    assert np.allclose([same.minus(one, "kid").value, one.minus(same, "kid").low], [0.002, direct.low])
    with pytest.raises(UserError, match="a paired comparison needs equal"):
        excess({"first": [scores("one", 3.0, 0.001, n=10)]}, {"first": [plain]})


def test_mean_of_members():
    (mean,) = mean_of([{"first": [scores("a", 2.0, 0.001)]}, {"first": [scores("b", 4.0, 0.003)]}], "mean")["first"]
    assert (mean.fd.value, mean.kid.value, mean.arm.label) == (3, 0.002, "mean")
    assert abs(mean.manifold["precision"] - 0.3) < 1e-12 and mean.digest == "digest-a+digest-b"
    interval = mean.minus(scores("c", 1.0, 0.002))
    assert abs(interval.value - 2) < 1e-12 and interval.high - interval.low < 1e-12


def test_over_trainings_without_image_error_is_students_interval():
    """Of 1, 2, 3: mean 2, SD 1, t(0.975; 2) = 4.302653 and t(0.995; 2) = 9.924843 (any table of the distribution)."""
    interval, p = over_trainings([Resampled(value, np.full(9, value)) for value in (1.0, 2.0, 3.0)])
    assert abs(interval.value - 2) < 1e-12 and abs(interval.high - (2 + 4.302653 / 3**0.5)) < 1e-5
    assert abs(interval.low + interval.high - 4) < 1e-12
    t = 9.924843 / 3**0.5
    assert abs(over_trainings([Resampled(t + d, np.zeros(9)) for d in (-1, 0, 1)])[1] - 0.01) < 1e-6
    assert over_trainings([Resampled(0.0, np.zeros(9))] * 3)[1] == 1  # the same images: no change at all


def test_over_trainings_adds_the_error_of_the_images():
    """Images that all trainings share: their error does not shrink with the number of trainings."""
    rng = np.random.default_rng(0)
    draws = rng.normal(0, 3, 100_000)
    interval, _ = over_trainings([Resampled(value, value + draws) for value in (1.0, 2.0, 3.0)])
    variance = 1 / 3 + 9
    df = 2 * (variance * 3) ** 2
    assert abs((interval.high - interval.low) / 2 - stats.t.ppf(0.975, df) * variance**0.5) < 0.05
    apart, _ = over_trainings([Resampled(value, value + rng.normal(0, 3, 100_000)) for value in (1.0, 2.0, 3.0)])
    assert (interval.high - interval.low) > 1.3 * (apart.high - apart.low)  # independent error does
    alone, p = over_trainings([Resampled(5.0, 5 + draws)])
    bootstrap = Resampled(5.0, 5 + draws).interval()
    assert (alone.low, alone.high) == (bootstrap.low, bootstrap.high)
    assert abs(p - 2 * stats.norm.sf(5 / 3)) < 0.01


def test_intervals_over_trainings_hold_the_mean_as_often_as_they_say():
    """Trainings and images both vary, images alike in all trainings; 95 % intervals of 600 such studies of zero."""
    rng, held, rejected = np.random.default_rng(1), 0, 0
    for _ in range(600):
        trainings, images, draws = rng.normal(0, 1, 5), rng.normal(0, 1), rng.normal(0, 1, 200)
        interval, p = over_trainings([Resampled(a + images, a + images + draws) for a in trainings])
        held += interval.low <= 0 <= interval.high
        rejected += p < 0.05
    assert 0.90 < held / 600 < 0.99 and abs(held + rejected - 600) <= 1


def test_holm():
    """Holm 1979: 0.01, 0.02, 0.03, 0.04 of four tests become 0.04, 0.06, 0.06, 0.06."""
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert [round(adjusted[key], 9) for key in "abcd"] == [0.04, 0.06, 0.06, 0.06]
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0} and holm({}) == {}
