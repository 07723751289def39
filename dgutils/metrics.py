"""Scores of generated images: Fréchet and kernel distances, manifold scores, copies, intervals, classifier scores.

Everything works on features, float arrays [N,d], with memory linear in N: moments in float64, products of pairs
in the features' own precision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import binomtest, mannwhitneyu

from dgutils.arrays import as_array, as_features, blocks, on_device, same_dim, whole
from dgutils.errors import UserError, require

# ---- Fréchet distance ------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureStats:
    """Mean [d] and scatter [d,d] of n rows of features, in float64; memory [d,d] whatever n."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, given) -> "FeatureStats":
        """The statistics of features [N,d]; statistics stay as they are."""
        if isinstance(given, cls):
            return given
        x = as_features(given)
        mean, scatter = x.mean(axis=0, dtype=np.float64), np.zeros((x.shape[1], x.shape[1]))
        for _, rows in blocks(x, 4096):
            centred = rows - mean
            scatter += centred.T @ centred
        return cls(len(x), mean, scatter)

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance [d,d]."""
        require(self.n >= 2, f"a covariance needs at least 2 images, got {self.n}")
        return self.scatter / (self.n - 1)


def _above_rounding(eigenvalues: np.ndarray) -> np.ndarray:
    """Which eigenvalues are not 0: one that should be comes out near eps * largest, and its root as 1e-8."""
    return eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues.max(initial=0)


def _sum_sqrt(eigenvalues: np.ndarray) -> float:
    return float(np.sqrt(eigenvalues[_above_rounding(eigenvalues)]).sum())


class FrechetReference:
    """The reference side of many Fréchet distances, factored once: C_ref = R R^T, R [d,r], r = rank(C_ref).

    |m - m_ref|^2 + tr C + tr C_ref - 2 tr sqrt(C_ref C) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6); C_ref C and
    the symmetric R^T C R [r,r] share their non-zero eigenvalues. As a callable it is `distance`, for `resample`.

    Biased upward at small n, and not alike for all sets: 1000 real CIFAR-10 images, their features (d = 1280)
    pulled 10 % towards their mean, score *better* than untouched. Read it beside the unbiased `kid`.
    linear_from: rows a dimension from which on resamples are linear (`bootstrap_distances`).
    """

    def __init__(self, features_or_stats, linear_from: float = 20):
        self.linear_from = linear_from
        stats = FeatureStats.of(features_or_stats)
        self.mean, self.trace = stats.mean, float(np.trace(stats.cov))
        values, vectors = np.linalg.eigh(stats.cov)
        keep = _above_rounding(values)
        self.root = vectors[:, keep] * np.sqrt(values[keep])  # [d,r]

    def distance(self, features_or_stats) -> float:
        """Squared Fréchet distance to the reference, in squared feature units."""
        stats = FeatureStats.of(features_or_stats)
        same_dim(self.mean, stats.mean)
        cov, delta = stats.cov, stats.mean - self.mean
        cross = _sum_sqrt(np.linalg.eigvalsh(self.root.T @ cov @ self.root))
        return float(delta @ delta + np.trace(cov) + self.trace - 2 * cross)

    __call__ = distance

    def at_infinity(self, features, splits: int = 4, seed: int = 0) -> float:
        """The distance extrapolated to infinitely many images (Chong & Forsyth 2020): a line in 1/n, at 0.

        It goes through FD of all and the mean FD of random halves, both halves of each split: so it spreads as FD does.
        What the reference's own number of images adds stays. Raises UserError below 5 rows a dimension: there the bias
        is no line (near n = d, FD falls below 0).
        """
        x, rng = as_features(features, like=self.mean), np.random.default_rng(seed)
        require(len(x) >= 5 * x.shape[1], f"{len(x)} images with {x.shape[1]} features: give at least 5 a feature")
        halves = [half for _ in range(splits) for half in np.array_split(rng.permutation(len(x)), 2)]
        return 2 * self.distance(x) - float(np.mean([self.distance(x[half]) for half in halves]))

    def bootstrap_distances(self, features, indices) -> np.ndarray:
        """The distance of features[i] for every row i of indices [R,n]: exact, or linear from so many rows a dimension.

        Linear is the sum of the rows' influences, where an exact resample takes seconds (d = 2048). On toys of 32 and
        128 dimensions with 20 and 40 rows each, its spread was 0.85 to 0.96 of the exact, 0.95 to 1.4 of the true one.
        """
        x, indices = as_features(features, at_least=2, like=self.mean), as_array(indices)
        require(indices.ndim == 2 and indices.dtype.kind in "iu" and indices.size and
                0 <= indices.min() <= indices.max() < len(x),
                f"resamples are rows [R,n] of numbers from 0 to {len(x) - 1}, got shape {indices.shape}")
        linear = len(x) >= self.linear_from * x.shape[1]
        return self._linear_distances(x, indices) if linear else self._exact_distances(x, indices)

    # A resample weights its u distinct rows (about 63 % of n), projected by R once for all; the eigenvalues come from
    # the smaller of their u x u and r x r Gram matrices.
    def _exact_distances(self, x: np.ndarray, indices) -> np.ndarray:
        mean = x.mean(axis=0, dtype=np.float64)  # [d]
        x, delta = x - mean, mean - self.mean  # [n,d]; centred, so that the weighted moments lose no digits
        projected, square = x @ self.root, np.einsum("nd,nd->n", x, x)  # [n,r], [n]
        out = np.empty(len(indices))
        for row, index in enumerate(indices):
            count = np.bincount(index, minlength=len(x)).astype(np.float64)  # [n]
            n, kept = count.sum(), count > 0
            shift = count @ x / n  # [d]
            trace = (count @ square - n * shift @ shift) / (n - 1)
            q = projected[kept] - count @ projected / n  # [u,r]
            q *= np.sqrt(count[kept] / (n - 1))[:, None]
            cross = _sum_sqrt(np.linalg.eigvalsh(q @ q.T if len(q) < q.shape[1] else q.T @ q))
            out[row] = (delta + shift) @ (delta + shift) + trace + self.trace - 2 * cross
        return out

    # Influence of one row z = x - mean, with M = R^T C R:  2 delta.z + |z|^2 - z^T R M^(-1/2) R^T z,
    # since d tr sqrt(M) = tr(M^(-1/2) dM) / 2.
    def _linear_distances(self, x: np.ndarray, indices) -> np.ndarray:
        stats = FeatureStats.of(x)
        values, vectors = np.linalg.eigh(self.root.T @ stats.cov @ self.root)
        keep, influence = _above_rounding(values), np.empty(len(x))
        whiten = self.root @ (vectors[:, keep] * values[keep] ** -0.25)  # [d,r]
        for start, rows in blocks(x, 4096):
            z = rows - stats.mean
            influence[start : start + len(z)] = (
                2 * z @ (stats.mean - self.mean) + np.square(z).sum(axis=1) - np.square(z @ whiten).sum(axis=1))
        influence -= influence.mean()  # a resample has as many rows
        return self.distance(stats) + np.array([influence[index].mean() for index in indices])


def frechet_distance(stats_a, stats_b) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features, each a FeatureStats or an array [N,d]."""
    return FrechetReference(stats_a).distance(stats_b)


# ---- scores over all pairs of images ---------------------------------------------------


@dataclass(frozen=True)
class PairScores:
    """kid: unbiased, with its resamples. manifold: precision, recall, density, coverage."""

    kid: "Resampled"
    manifold: dict[str, float]


class _Rows:
    """Features about a common centre c, where |a|^2 + |b|^2 - 2 a.b cancels less, cut into tiles for products.

    Of the features themselves, x.y = (x-c).(y-c) + share_x + share_y.
    """

    def __init__(self, features: np.ndarray, centre: torch.Tensor, block: int):
        x = torch.from_numpy(np.require(features, requirements="CW"))  # torch reads no other array
        self.x, self.centre, self.dtype = x.to(centre.device), centre, features.dtype
        self.slices = [slice(start, min(start + block, len(features))) for start in range(0, len(features), block)]
        self.square = torch.cat([self.tile(s).square().sum(1) for s in self.slices])  # [N]: |x-c|^2
        self.share = torch.cat([self.tile(s) @ centre for s in self.slices]) + centre @ centre / 2  # [N]

    def tile(self, rows: slice) -> torch.Tensor:
        return self.x[rows] - self.centre  # [B,d]


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T [B,B'] of rows [B,d] and [B',d].

    On a CPU in float32 by a 1 x 1 convolution, which is oneDNN's: on AMD twice as fast as MKL's product, a @ b.T.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return a @ b.T
    image = a[None, :, None].permute(0, 3, 1, 2)  # [1,d,B,1], channels-last as it lies
    return F.conv2d(image, b[:, :, None, None])[0, :, :, 0].T


def _pairs(a: _Rows, b: _Rows):
    """Tiles of all pairs: rows of a, rows of b, kernel (x.y/d + 1)^3, squared distances. One product each.

    For a set with itself (a is b) half of the tiles, those with rows of b not before rows of a.
    """
    dim = a.x.shape[1]
    for i in a.slices:
        p = a.tile(i)
        for j in b.slices:
            if a is not b or j.start >= i.start:
                gram = _products(p, b.tile(j))  # [B,B']
                kernel = torch.add(a.share[i, None] / dim + 1, gram, alpha=1 / dim).add_(b.share[j] / dim).pow_(3)
                yield i, j, kernel, torch.add(a.square[i, None], gram, alpha=-2).add_(b.square[j])


def _within(rows: _Rows, neighbours: int, counts: torch.Tensor):
    """Of a set's pairs with itself: sum of the kernel, the same for every resample (a column of counts [N,R] each;
    pairs of copies of one row left out), and squared distances to the nearest other rows [N,neighbours].
    """
    total, draws = 0.0, torch.zeros(counts.shape[1], dtype=torch.float64, device=rows.x.device)
    nearest = torch.full((len(rows.x), neighbours), torch.inf, dtype=rows.x.dtype, device=rows.x.device)
    for i, j, kernel, d2 in _pairs(rows, rows):
        if i == j:
            kernel.fill_diagonal_(0)
            d2.fill_diagonal_(torch.inf)
        times = 1 if i == j else 2
        total += times * kernel.sum(1).double().sum().item()
        draws += times * (counts[i] * (kernel @ counts[j])).sum(0)
        for mine, distances in ((i, d2), (j, d2.T.contiguous()))[:times]:
            near = distances.topk(min(neighbours, distances.shape[1]), largest=False).values
            nearest[mine] = torch.cat([nearest[mine], near], 1).topk(neighbours, largest=False).values
    return total, draws, nearest


class PairReference:
    """The real side of the scores over all pairs of images: KID, precision, recall, density, coverage.

    Each pair is met once, for all of the scores, in tiles of block x block, in the features' precision, on `device`.
    k_pr and k_dc: the neighbour that a ball reaches to, for precision and recall and for density and coverage.
    """

    def __init__(self, features, k_pr: int = 3, k_dc: int = 5, block: int = 1024, device="cpu"):
        whole(1, k_pr=k_pr, k_dc=k_dc, block=block)
        on_device(device)
        self.k_pr, self.k_dc, self.block = k_pr, k_dc, block
        real = as_features(features, at_least=max(k_pr, k_dc) + 1)
        centre = torch.from_numpy(real.mean(axis=0, dtype=np.float64).astype(real.dtype)).to(device)
        self.rows = _Rows(real, centre, block)
        total, _, self.nearest = _within(self.rows, max(k_pr, k_dc), centre.new_empty(len(real), 0))
        self.kernel_mean = total / (len(real) * (len(real) - 1))
        self._refuse_overflow(self.kernel_mean, real)

    def _refuse_overflow(self, score, features) -> None:
        if not np.isfinite(score).all():
            raise UserError(f"features as large as {np.abs(features).max():.3g} overflow the kernel in "
                            f"{self.rows.dtype}: give both sets in float64, or scale them")

    # KID: Binkowski et al. 2018, eq. 4, the unbiased squared MMD of the kernel (x.y/d + 1)^3, which may be negative;
    # from all pairs, but those of copies of one image in a resample, which say nothing of the distribution.
    # Precision, recall: Kynkäänniemi et al. 2019, eq. 1-2; density, coverage: Naeem et al. 2020, eq. 3-4.
    def compare(self, features, n_resamples: int = 0, seed: int = 0) -> PairScores:
        """Scores of generated features [M,d] against the real ones; KID resampled as `resample` does.

        precision: share of fakes inside a real ball; recall: share of reals inside a fake ball; density: mean
        number of real balls around a fake, over k_dc; coverage: share of real balls that hold a fake.
        """
        whole(0, n_resamples=n_resamples, seed=seed)
        real, given = self.rows, as_features(features, at_least=self.k_pr + 1, like=self.rows.centre)
        fake = _Rows(given.astype(real.dtype, copy=False), real.centre, self.block)
        n, m, device = len(real.x), len(fake.x), real.centre.device
        counts = np.empty((n_resamples, m), real.dtype)
        for row, index in enumerate(_resample_indices(m, n_resamples, seed)):
            counts[row] = np.bincount(index, minlength=m)
        counts = torch.from_numpy(counts.T).to(device)  # [M,R]
        total, draws, nearest = _within(fake, self.k_pr, counts)
        ball_pr, ball_dc = self.nearest[:, self.k_pr - 1], self.nearest[:, self.k_dc - 1]  # [N], squared radii
        fake_ball = nearest[:, -1]  # [M]

        across = torch.zeros(m, dtype=torch.float64, device=device)
        precise, recalled, covered = (torch.zeros(k, dtype=torch.bool, device=device) for k in (m, n, n))
        inside = torch.zeros((), dtype=torch.int64, device=device)
        for i, j, kernel, d2 in _pairs(real, fake):
            across[j] += kernel.sum(0) / n
            # a <= b for any pair, as min(a - b) <= 0: vectorised, where bool.any() is not
            precise[j] |= (d2 - ball_pr[i, None]).amin(0) <= 0
            recalled[i] |= (d2 - fake_ball[j]).amin(1) <= 0
            covered[i] |= d2.amin(1) <= ball_dc[i]
            inside += torch.count_nonzero(d2 <= ball_dc[i, None])

        counts = counts.double()
        draws = draws / (m**2 - counts.square().sum(0)) + self.kernel_mean - 2 * (across @ counts) / m  # [R]
        value, draws = total / (m * (m - 1)) + self.kernel_mean - 2 * across.mean().item(), draws.numpy(force=True)
        self._refuse_overflow([value, *draws], given)
        precision, recall, coverage = (share.double().mean().item() for share in (precise, recalled, covered))
        return PairScores(Resampled(value, draws), {"precision": precision, "recall": recall,
                                                    "density": inside.item() / (self.k_dc * m), "coverage": coverage})


def kid(x, y) -> float:
    """Unbiased squared MMD of two feature sets [N,d], [M,d] (see PairReference)."""
    return PairReference(y, 1, 1).compare(x).kid.value


# ---- copies ----------------------------------------------------------------------------


def nearest(x, among, device="cpu") -> tuple[np.ndarray, np.ndarray]:
    """For each row of x [N,d] its distance [N] to the nearest row of `among` [M,d], and that row's number [N]."""
    on_device(device)
    among = as_features(among)
    x, rows = as_features(x, like=among[0]), torch.from_numpy(np.require(among, requirements="CW")).to(device)
    parts = (torch.from_numpy(np.array(part)).to(rows) for _, part in blocks(x, 1024))
    which = torch.cat([torch.cdist(part, rows).argmin(1).cpu() for part in parts]).numpy()
    return np.linalg.norm(x - among[which], axis=1), which  # anew, since products lose digits where rows are alike


def copying(distances, held_out) -> float:
    """The share of pairs in which a generated image is nearer to the training images than a held-out real one.

    Given the distances of both (`nearest`). 0.5: as near as unseen images are; 1: copies (Meehan et al. 2020).
    """
    return float(mannwhitneyu(held_out, distances).statistic / (len(held_out) * len(distances)))


# ---- intervals -------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval [low, high] at `level`."""

    value: float
    low: float
    high: float
    level: float
    n_resamples: int


@dataclass(frozen=True)
class Resampled:
    """A statistic of one arm, and of its resamples, draws [R]; arms of equal n and seed were resampled alike."""

    value: float
    draws: np.ndarray

    # The basic interval (Davison & Hinkley 1997, eq. 5.6), with the resamples centred first: a resample has fewer
    # distinct images, which moves a Fréchet distance as a smaller n would. On Gaussian toys this held the expected
    # difference in 96 to 100 % of trials; where n < d, percentile and basic intervals fell as low as 0 %.
    def interval(self, level: float = 0.95) -> Interval:
        """Interval for the statistic's expectation at this n."""
        require(isinstance(level, float) and 0 < level < 1, f"level {level!r}: a confidence level lies between 0 and 1")
        require(len(self.draws), "an interval needs resamples: ask for some")
        low, high = np.quantile(self.draws - self.draws.mean(), [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.value, float(self.value - high), float(self.value - low), level, len(self.draws))

    def __sub__(self, other: "Resampled") -> "Resampled":
        """The difference between two arms whose rows are of the same seeds: what they share cancels."""
        r, others = len(self.draws), len(other.draws)
        require(r == others, f"a paired bootstrap needs equal resamples, got {r}, {others}")
        return Resampled(self.value - other.value, self.draws - other.draws)

    def minus(self, other: "Resampled", level: float = 0.95) -> Interval:
        """Interval of the paired difference."""
        return (self - other).interval(level)


def _resample_indices(n: int, n_resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, size=(n_resamples, n))  # [R,n]


def resample(statistic: Callable, arm, n_resamples: int, seed: int) -> Resampled:
    """statistic(arm) and its value on resamples of the arm's rows, which depend on (n, n_resamples, seed) only.

    A FrechetReference as the statistic takes its fast path; for KID see `PairReference.compare`.
    """
    arm = as_array(arm)
    require(arm.ndim and len(arm) >= 2, f"a bootstrap needs at least 2 images, got shape {arm.shape}")
    whole(1, n_resamples=n_resamples)
    whole(0, seed=seed)
    require(callable(statistic), f"the statistic is {statistic!r}: give a function of an arm's rows")
    indices = _resample_indices(len(arm), n_resamples, seed)
    if hasattr(statistic, "bootstrap_distances"):
        draws = statistic.bootstrap_distances(arm, indices)
    else:
        draws = np.array([float(statistic(arm[index])) for index in indices])
    return Resampled(float(statistic(arm)), draws)


def bootstrap(statistic: Callable, arm, n_resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Interval of statistic(arm), for its expectation at this n; arms are compared by `Resampled.minus`."""
    return resample(statistic, arm, n_resamples, seed).interval(level)


# ---- classifier scores -----------------------------------------------------------------


def _logits_labels(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = (as_array(given).astype(np.float64) for given in (logits, labels))
    require(logits.shape == labels.shape and logits.ndim == 1 and len(logits),
            f"need a logit and a label per image, got shapes {logits.shape} and {labels.shape}")
    require(np.isfinite(logits).all() and np.isin(labels, (0, 1)).all(),
            "logits must be finite and labels 0 (fake) or 1 (real)")
    return logits, labels


# Naeini et al. 2015 for a binary classifier: sum over bins of share * |mean label - mean probability|
def calibration_error(logits, labels, bins: int = 10) -> float:
    """Expected calibration error of the probability of "real", in equal bins of [0,1]; logits, labels [N]."""
    whole(1, bins=bins)
    logits, labels = _logits_labels(logits, labels)
    probability = 0.5 * (1 + np.tanh(logits / 2))  # the sigmoid, without overflow
    which = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=labels - probability, minlength=bins)  # [bins]: share * gap * N
    return float(np.abs(gaps).sum() / len(labels))


def binary_scores(logits, labels) -> dict[str, float]:
    """Scores of "real" (label 1) against "fake" (0), decided at logit > 0; nan where a score divides by 0."""
    logits, labels = _logits_labels(logits, labels)
    said_real, real = logits > 0, labels == 1
    hits = float((said_real & real).sum())
    return {
        "bce": float((np.logaddexp(0, logits) - labels * logits).mean()),  # nats
        "accuracy": float((said_real == real).mean()),
        "classifier_precision": hits / said_real.sum() if said_real.any() else float("nan"),
        "classifier_recall": hits / real.sum() if real.any() else float("nan"),
    }


def _logistic(x: np.ndarray, signs: np.ndarray, ridge: float) -> np.ndarray:
    """Weights [d+1] of a logistic regression of signs, -1 or 1, on x [N,d], the last of them the constant's."""
    x = np.column_stack([x, np.ones(len(x))])

    def loss(w):  # mean cross-entropy and ridge |w|^2 / 2, and the gradient
        margin, shrunk = signs * (x @ w), ridge * np.append(w[:-1], 0)
        pull = -0.5 * (1 - np.tanh(margin / 2)) * signs / len(x)
        return np.logaddexp(0, -margin).mean() + shrunk @ w / 2, x.T @ pull + shrunk

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def two_sample_test(x, y, ridge: float = 0.01, level: float = 0.95) -> Interval:
    """Accuracy of a linear classifier that tells x [N,d] from y [M,d], on rows that it has not seen: 0.5 is chance.

    The classifier two-sample test (Lopez-Paz & Oquab 2017), by logistic regression on features of variance 1/d. Even
    rows are judged by what odd ones taught, and the other way round, as many of both sets. The interval is Wilson's.
    """
    x, n = as_features(x, at_least=4), min(len(x), len(y))
    x, y = x[:n], as_features(y, at_least=4, like=x[0])[:n]
    both, signs, odd, right = np.concatenate([x, y]), np.repeat([1.0, -1.0], n), np.tile(np.arange(n) % 2, 2) == 1, 0
    for test in (odd, ~odd):
        mean, scale = both[~test].mean(0), both[~test].std(0) * both.shape[1] ** 0.5
        scaled = (both - mean) / np.where(scale > 0, scale, 1)
        w = _logistic(scaled[~test], signs[~test], ridge)
        right += int((signs[test] * (scaled[test] @ w[:-1] + w[-1]) > 0).sum())
    bounds = binomtest(right, 2 * n).proportion_ci(level, "wilson")
    return Interval(right / (2 * n), float(bounds.low), float(bounds.high), level, 0)
