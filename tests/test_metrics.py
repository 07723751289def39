"""Closed forms, brute force and independent implementations for dgutils.metrics, in float64."""


import bench_metrics
import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import norm

from dgutils import metrics
from dgutils.errors import UserError
from dgutils.networks import features


def gaussian(seed, n, d, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * scale + shift


def stats_of(mean, cov, n=1001):
    return metrics.FeatureStats(n, np.asarray(mean, float), np.asarray(cov, float) * (n - 1))


def paired(statistic, a, b, n_resamples, seed, other_resamples=None):
    one = metrics.resample(statistic, a, n_resamples, seed)
    return one.minus(metrics.resample(statistic, b, other_resamples or n_resamples, seed))


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
    a, b = metrics.FeatureStats.of(gaussian(0, 300, 12)), metrics.FeatureStats.of(gaussian(1, 200, 12, 1.3, 0.5))
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


def test_stats_far_from_zero_lose_no_digits():
    x = gaussian(5, 500, 8, shift=1e6)  # a naive sum of squares loses 12 digits here
    stats, want = metrics.FeatureStats.of(x), np.cov(x, rowvar=False)
    assert stats.n == 500 and abs(stats.mean - x.mean(0)).max() < 1e-10 * 1e6
    assert abs(stats.cov - want).max() < 1e-10 * abs(want).max()


@pytest.mark.parametrize(("n", "d", "n_ref"), [(40, 60, 200), (120, 20, 200), (40, 60, 30)])
def test_bootstrap_distances_match_recomputation(n, d, n_ref):
    reference, x = metrics.FrechetReference(gaussian(6, n_ref, d)), gaussian(7, n, d, 1.1, 0.3)
    indices = np.random.default_rng(0).integers(0, n, (5, n))
    indices[0] = np.arange(n)
    naive = np.array([reference.distance(x[index]) for index in indices])
    assert abs(reference.bootstrap_distances(x, indices) / naive - 1).max() < 1e-8
    assert naive.std() > 1e-3  # the resamples do differ


def test_linear_bootstrap_is_the_derivative_of_the_distance():
    reference, x = metrics.FrechetReference(gaussian(6, 400, 8)), gaussian(7, 4000, 8, 1.1, 0.3)
    indices = np.tile(np.arange(4000), (8, 1))
    indices[1:, :40] = np.random.default_rng(1).integers(0, 4000, (7, 40))  # 1 % of the rows changed
    exact, linear = reference._exact_distances(x, indices), reference.bootstrap_distances(x, indices)
    assert abs(linear[0] / reference.distance(x) - 1) < 1e-12
    assert abs(linear - exact).max() < 0.02 * exact.std()


def test_linear_bootstrap_has_the_spread_of_the_exact_one():
    reference, x = metrics.FrechetReference(gaussian(6, 4000, 8)), gaussian(7, 320, 8, 1.1, 0.3)
    indices = np.random.default_rng(2).integers(0, 320, (400, 320))
    exact, linear = reference._exact_distances(x, indices), reference.bootstrap_distances(x, indices)
    assert 0.85 < linear.std() / exact.std() < 1.05
    assert np.corrcoef(exact, linear)[0, 1] > 0.9


@pytest.mark.parametrize(("n", "d", "scale", "shift"), [(400, 8, 1.2, 0.3), (2000, 64, 1, 0.1), (700, 32, 0.8, 0)])
def test_frechet_at_infinity_takes_most_of_the_bias_away(n, d, scale, shift):
    reference, rng = metrics.FrechetReference(stats_of(np.zeros(d), np.eye(d), 10**6)), np.random.default_rng(8)
    true = d * ((scale - 1) ** 2 + shift**2)
    sets = [scale * rng.standard_normal((n, d)) + shift for _ in range(40)]
    found, plain = [reference.at_infinity(x) for x in sets], [reference(x) for x in sets]
    bias = np.mean(plain) - true
    assert bias > 0.05 and abs(np.mean(found) - true) < 0.3 * bias
    assert np.std(found) < 1.15 * np.std(plain)  # so that FD's resamples give its interval


def test_frechet_at_infinity_is_a_line_through_all_and_halves():
    reference, x, rng = metrics.FrechetReference(gaussian(35, 300, 6)), gaussian(36, 200, 6), np.random.default_rng(3)
    halves = [half for _ in range(5) for half in np.split(rng.permutation(200), 2)]
    sizes, distances = [200] + [100] * 10, [reference(x)] + [reference(x[half]) for half in halves]
    by_hand = np.polyfit([1 / n for n in sizes], distances, 1)[1]
    assert abs(reference.at_infinity(x, 5, seed=3) / by_hand - 1) < 1e-8


# ---- copies and classifier two-sample tests

def test_nearest_rows_match_brute_force_and_copies_have_distance_zero():
    x, among = gaussian(30, 1100, 6).astype(np.float32), gaussian(31, 300, 6).astype(np.float32)  # two blocks of x
    x[5] = among[250]
    distances, which = metrics.nearest(x, among)
    want = np.linalg.norm(x[:, None] - among[None], axis=2)
    assert np.array_equal(which, want.argmin(1)) and np.allclose(distances, want.min(1), rtol=1e-5, atol=1e-6)
    assert distances[5] == 0 and which[5] == 250


def test_copying_is_a_share_of_pairs():
    assert metrics.copying([1.0, 2.0], [3.0, 4.0]) == 1 and metrics.copying([3.0, 4.0], [1.0, 2.0]) == 0
    assert metrics.copying([1.0, 4.0], [2.0, 2.0]) == 0.5 and metrics.copying([2.0], [2.0]) == 0.5
    rng = np.random.default_rng(32)
    training, unseen = rng.standard_normal((2, 800, 8))
    held_out = metrics.nearest(unseen[400:], training)[0]
    assert abs(metrics.copying(metrics.nearest(unseen[:400], training)[0], held_out) - 0.5) < 0.07
    noisy = training[:400] + 0.05 * rng.standard_normal((400, 8))
    assert metrics.copying(metrics.nearest(noisy, training)[0], held_out) > 0.95


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_two_sample_accuracy_is_that_of_the_best_classifier(shift):
    """Of N(0, I) and N(shift, I) in 4 dimensions the best is right with probability Phi(|shift| / 2)."""
    rng, best = np.random.default_rng(33), norm.cdf(shift * 2 / 2)
    found = [metrics.two_sample_test(rng.standard_normal((400, 4)), shift + rng.standard_normal((500, 4)))
             for _ in range(10)]
    assert abs(np.mean([one.value for one in found]) - best) < 0.015
    assert sum(one.low <= best <= one.high for one in found) >= 8 and all(one.low < one.high for one in found)


def test_two_sample_test_sees_no_difference_that_only_its_own_rows_have():
    """With more dimensions than rows every training set can be told apart: held-out rows decide."""
    rng = np.random.default_rng(34)
    x, y = rng.standard_normal((2, 80, 300))
    found = metrics.two_sample_test(x, y)
    assert found.low < 0.5 < found.high
    constant = np.column_stack([x, np.ones(80)])  # a feature without spread
    assert np.isfinite(metrics.two_sample_test(constant, constant + 0.0).value)


# ---- kernel distance

def test_kid_matches_double_loop_whatever_the_block():
    x, y = gaussian(8, 7, 3), gaussian(9, 5, 3, shift=0.5)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    want = xx + yy - 2 * np.mean([k(a, b) for a in x for b in y])
    for block in (1, 3, 100):
        assert abs(metrics.PairReference(y, 1, 1, block).compare(x).kid.value - want) < 1e-10 * abs(xx)
    assert abs(metrics.kid(x, y) - want) < 1e-10 * abs(xx)


def test_kid_matches_cleanfid():
    fid = pytest.importorskip("cleanfid.fid")
    x, y = gaussian(24, 80, 16), gaussian(25, 80, 16, 1.2, 0.3)
    np.random.seed(0)  # noqa: NPY002 (clean-fid draws its subset from the global generator; of all rows, here)
    assert abs(metrics.kid(x, y) / fid.kernel_distance(x, y, num_subsets=1, max_subset_size=80) - 1) < 1e-10


def test_kid_resamples_match_recomputation():
    x, y = gaussian(8, 40, 3), gaussian(9, 50, 3, shift=0.5)
    reference = metrics.PairReference(y, block=16)
    got = reference.compare(x, 6, seed=3).kid

    def k(a, b):
        return (a @ b.T / 3 + 1) ** 3

    for draw, index in zip(got.draws, np.random.default_rng(3).integers(0, 40, (6, 40)), strict=True):
        distinct = index[:, None] != index  # pairs of two different images
        want = k(x[index], x[index])[distinct].mean() + reference.kernel_mean - 2 * k(x[index], y).mean()
        assert abs(draw - want) < 1e-10
    assert got.value == reference.compare(x).kid.value and len(reference.compare(x).kid.draws) == 0


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


@pytest.mark.parametrize("block", [4, 7, 1000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_manifold_scores_match_brute_force(block, dtype):
    real, fake = gaussian(11, 60, 4, shift=50), gaussian(12, 45, 4, 0.7, 50.5)
    for k_pr, k_dc in ((1, 1), (3, 5), (5, 3)):
        few, many = brute_manifold(real, fake, k_pr), brute_manifold(real, fake, k_dc)
        want = {name: (few if name in ("precision", "recall") else many)[name] for name in few}
        got = metrics.PairReference(real.astype(dtype), k_pr, k_dc, block).compare(fake.astype(dtype)).manifold
        assert got == pytest.approx(want, abs=1e-12)
    assert 0 < want["precision"] < 1 and 0 < want["recall"] < 1 and want["precision"] != want["recall"]


def test_single_precision_suffices():
    real, fake = abs(gaussian(26, 700, 64)) / 8, abs(gaussian(27, 500, 64)) / 8
    exact = metrics.PairReference(real).compare(fake, 20)
    got = metrics.PairReference(real.astype(np.float32)).compare(fake.astype(np.float32), 20)
    assert abs(got.kid.value - exact.kid.value) < 1e-3 * exact.kid.draws.std()
    assert abs(got.kid.draws - exact.kid.draws).max() < 1e-2 * exact.kid.draws.std()
    assert got.manifold == pytest.approx(exact.manifold, abs=2 / 500)  # one image nearer or farther than a ball


def test_manifold_scores_of_extremes():
    real = gaussian(13, 30, 3)
    reference = metrics.PairReference(real)
    assert reference.compare(real + 1e4).manifold == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    same = reference.compare(real[::-1].copy()).manifold
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_benchmark_scores_agree_with_the_published_tools():
    pytest.importorskip("cleanfid.fid")
    for row in bench_metrics.agreement(n=80, d=12):
        assert row["ours_float64"] == pytest.approx(row["ours_float32"], rel=1e-2)
        compared = row["score"] in ("fd", "kid") or bench_metrics.PRDC
        assert (row["theirs"] is not None) == compared
        if compared:
            assert row["ours_float64"] == pytest.approx(row["theirs"], rel=1e-6)
    measured = bench_metrics._measure_here("_pairs", 50, 8)
    assert measured["seconds"] > 0 and measured["mib"] > 50


# ---- intervals

def test_identical_arms_differ_by_exactly_zero():
    x, reference = gaussian(14, 40, 6), metrics.FrechetReference(gaussian(15, 40, 6))
    for statistic in (reference, np.mean):
        got = paired(statistic, x, x.copy(), 20, seed=0)
        assert (got.value, got.low, got.high) == (0, 0, 0)


def test_arms_are_resampled_together():
    x = gaussian(16, 50, 3)
    got = paired(np.mean, x + 2.0, x, 50, seed=1)  # unpaired, the interval has some width
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
    one, same, other = (paired(reference, a, b, 50, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert one.low < one.value < one.high
    assert one.value == reference(a) - reference(b)
    slow = paired(lambda x: reference(x), a, b, 50, seed=1)
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
    images = np.random.default_rng(21).integers(0, 256, (5, 2, 3, 1), dtype=np.uint8)
    images[0, 0, 0, 0], images[0, 1, 1, 0] = 0, 255
    got = features.extract(images, lambda x: x.flatten(1), 2)
    assert got.dtype == np.float32 and got.min() == -1 and got.max() == 1
    assert abs(got - (images.reshape(5, 6) / 127.5 - 1)).max() < 1e-6


# ---- errors

GOOD, HOLED = np.eye(6), np.where(np.eye(6) > 0, np.nan, 1.0)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.frechet_distance(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.FrechetReference(GOOD).bootstrap_distances(GOOD[:, :4], [[0, 1]]), "dimensions differ"),
    (lambda: metrics.kid(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.nearest(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.two_sample_test(GOOD, GOOD[:, :4]), "dimensions differ"),
    (lambda: metrics.two_sample_test(GOOD, GOOD[:3]), "at least 4 feature rows, got 3"),
    (lambda: metrics.FrechetReference(GOOD).at_infinity(GOOD), "give at least 5 a feature"),
    (lambda: metrics.FeatureStats.of(np.empty((0, 3))), "need at least 1 feature rows, got 0"),
    (lambda: metrics.frechet_distance(GOOD, GOOD[:1]), "at least 2 images, got 1"),
    (lambda: metrics.kid(GOOD, GOOD[:1]), "at least 2"),
    (lambda: metrics.frechet_distance(GOOD, HOLED), "6 feature rows are not finite .rows 0, 1, 2, 3, 4, 5.: check"),
    (lambda: metrics.FeatureStats.of(np.repeat(HOLED, 2, axis=0)), r"12 feature rows .* 6, 7 \.\.\.\)"),
    (lambda: metrics.PairReference(np.where(np.eye(6) > 0, np.inf, 1)), "not finite"),
    (lambda: metrics.PairReference(GOOD).compare(np.diag([1, 1, np.nan, 1, 1, 1])), r"1 feature rows .*rows 2\)"),
    (lambda: metrics.PairReference(GOOD).compare(GOOD[:3]), "at least 4 feature rows, got 3"),
    (lambda: metrics.PairReference(GOOD[:5]), "at least 6 feature rows, got 5"),
    (lambda: metrics.PairReference(GOOD, k_pr=0), "k_pr 0"),
    (lambda: paired(np.mean, GOOD, GOOD, 10, seed=0, other_resamples=9), "equal resamples"),
    (lambda: metrics.binary_scores([0.0], [0.5]), "labels 0"),
    (lambda: features.extract(np.zeros((0, 4, 4, 3), np.uint8), lambda x: x), "N > 0"),
])
def test_errors_are_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows, others, dim", [(7, 5, 3), (1, 300, 64), (130, 1, 2048)])
def test_products_of_rows_are_right_in_either_precision(rows, others, dim):
    a, b = torch.randn(rows + 2, dim)[2:], torch.randn(others, dim)
    right = a.double() @ b.double().T
    assert torch.equal(metrics._products(a.double(), b.double()), right)
    assert (metrics._products(a, b) - right).abs().max() < 1e-5 * dim**0.5


# ---- what users hand over

X, Y = gaussian(31, 30, 4).astype(np.float32), gaussian(32, 30, 4).astype(np.float32)
IMAGES = np.random.default_rng(33).integers(0, 256, (5, 4, 4, 3), np.uint8)
AS = {
    "list of rows": lambda x: list(x), "list of lists": lambda x: x.tolist(), "tensor": torch.from_numpy,
    "tensor with gradient": lambda x: torch.from_numpy(x).requires_grad_(), "double": lambda x: x.astype(np.float64),
    "list of tensors with gradient": lambda x: [row for row in torch.from_numpy(x).requires_grad_()],
    "not contiguous": lambda x: np.asfortranarray(x), "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.broadcast_to(x, x.shape), "other byte order": lambda x: x.astype(">f4"),
    "transposed tensor": lambda x: torch.from_numpy(x.T.copy()).t(),
}  # fmt: skip


@pytest.mark.parametrize("form", AS.values(), ids=AS)
def test_features_come_in_any_reasonable_form(form):
    scores = [metrics.PairReference(y).compare(x, 3) for x, y in ((X, Y), (form(X), form(Y)))]
    assert scores[1].kid.value == pytest.approx(scores[0].kid.value, rel=1e-4)
    assert scores[1].manifold == scores[0].manifold
    assert metrics.frechet_distance(form(X), form(Y)) == pytest.approx(metrics.frechet_distance(X, Y), rel=1e-5)
    assert metrics.bootstrap(np.mean, form(X), 5, 0).value == pytest.approx(X.mean(), rel=1e-5)
    labels = X[:, 1] > 0
    assert metrics.binary_scores(form(X[:, 0]), labels)["bce"] == pytest.approx(
        metrics.binary_scores(X[:, 0], labels)["bce"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_features_of_any_precision_are_what_their_numbers_are(dtype):
    x, y = (torch.from_numpy(features).to(dtype) for features in (10 * X, 10 * Y))
    want = metrics.frechet_distance(x.double().numpy(), y.double().numpy())
    assert metrics.frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert metrics.kid(x, y) == pytest.approx(metrics.kid(x.double().numpy(), y.double().numpy()), rel=1e-9)


@pytest.mark.parametrize("form", [list, tuple, torch.from_numpy, lambda x: [torch.from_numpy(image) for image in x],
                                  lambda x: x[:, ::-1][:, ::-1], lambda x: x.transpose(0, 2, 1, 3).swapaxes(1, 2)])
def test_images_come_in_any_reasonable_form(form):
    def encode(x):
        return x.mean((2, 3)).to(torch.bfloat16).requires_grad_()

    assert np.array_equal(features.extract(form(IMAGES), encode, 2), features.extract(IMAGES, encode, 5))


def huge(size, dtype):
    return (gaussian(34, 30, 4) * size).astype(dtype)


@pytest.mark.parametrize(("size", "dtype"), [(1e7, np.float32), (1e12, np.float32), (1e30, np.float32), (1e46, float),
                                             (1e200, float)])
def test_features_too_large_for_a_score_are_refused(size, dtype):
    real = gaussian(35, 30, 4).astype(dtype)
    for call in (lambda: metrics.kid(huge(size, dtype), real), lambda: metrics.kid(real, huge(size, dtype)),
                 lambda: metrics.PairReference(real).compare(huge(size, dtype), 5)):
        with pytest.raises(UserError, match="features as large as .*scale them") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert np.isfinite(metrics.kid(huge(1e7, float), real.astype(float)))  # as the message says


@pytest.mark.parametrize(("call", "message"), [
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1), 0), "batch_size 0: give a whole number, at least 1"),
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1), -3), "batch_size -3"),
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1), 2.5), "batch_size 2.5"),
    (lambda: features.extract(IMAGES[0], lambda x: x), r"uint8 \[N,H,W,C\] with N > 0, got uint8 \(4, 4, 3\)"),
    (lambda: features.extract([IMAGES[0], IMAGES[0, :2]], lambda x: x), "list of equal shapes"),
    (lambda: features.extract(None, lambda x: x), "no array of real numbers"),
    (lambda: features.extract(IMAGES, lambda x: x), r"encode made \(5, 3, 4, 4\) of 5 images, not \[5,d\]"),
    (lambda: features.extract(IMAGES, lambda x: x.mean((0, 2, 3))), "encode made"),
    (lambda: features.extract(IMAGES, lambda x: None), "no array of real numbers"),
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1) / 0), "feature rows are not finite"),
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1), True), "batch_size True"),
    (lambda: features.extract(IMAGES, "encode"), "encode is 'encode': give a function"),
    (lambda: features.extract(IMAGES, lambda x: x.flatten(1), device="tpu"), "device 'tpu': .*: give 'cpu'"),
    (lambda: features.image_features(IMAGES, device=3.5), "device 3.5: "),
    (lambda: features.image_features(IMAGES, None), "unknown feature space None"),
    (lambda: features.image_features(IMAGES, ["inception"]), "unknown feature space"),
    (lambda: features.image_features(IMAGES, "efficientnet-lite0@99999999999968"), "pixels a multiple of 32"),
    (lambda: features.metric_name(None), "unknown feature space None: give its name"),
    (lambda: features.image_features(IMAGES, 3), "unknown feature space 3"),
    (lambda: metrics.PairReference(X, device="nowhere"), "device 'nowhere': "),
    (lambda: metrics.PairReference(X).compare(Y, True), "n_resamples True"),
    (lambda: metrics.bootstrap(np.mean, X, 5, 0, None), "level None: a confidence level"),
    (lambda: metrics.bootstrap(np.mean, X, 5, 0, "0.95"), "level '0.95': a confidence level"),
    (lambda: metrics.bootstrap("mean", X, 5, 0), "the statistic is 'mean': give a function"),
    (lambda: metrics.kid(X, "features"), "no array of real numbers"),
    (lambda: metrics.kid(X + 1j, Y), "an array of complex64 is no array of real numbers"),
    (lambda: metrics.kid([[1.0, 2.0], [3.0]], Y), "list of equal shapes"),
    (lambda: metrics.kid(torch.from_numpy(X).to_sparse(), Y), "give an array, a tensor"),
    (lambda: metrics.kid(X[:, 0], Y), "matrix"),
    (lambda: metrics.FeatureStats.of(X[None]), "matrix"),
    (lambda: metrics.PairReference(X, block=0), "block 0"),
    (lambda: metrics.PairReference(X, k_dc=2.5), "k_dc 2.5"),
    (lambda: metrics.PairReference(X).compare(Y, -1), "n_resamples -1"),
    (lambda: metrics.PairReference(X).compare(Y).kid.interval(), "needs resamples"),
    (lambda: metrics.resample(np.mean, X, 3, -1), "seed -1"),
    (lambda: metrics.resample(np.mean, X, 2.0, 0), "n_resamples 2.0"),
    (lambda: metrics.bootstrap(np.mean, X, 2, 0, "0.95"), "level '0.95': a confidence level lies between 0 and 1"),
    (lambda: metrics.resample(np.mean, 3.0, 3, 0), "at least 2 images"),
    (lambda: metrics.FrechetReference(X).bootstrap_distances(Y, [[0, 30]]), "numbers from 0 to 29"),
    (lambda: metrics.FrechetReference(X).bootstrap_distances(Y, [0, 1]), "rows"),
    (lambda: metrics.calibration_error([0.1], [1], bins=0), "bins 0"),
    (lambda: metrics.binary_scores(torch.zeros(2, 1), [0, 1]), "a logit and a label per image"),
])
def test_what_cannot_be_scored_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
