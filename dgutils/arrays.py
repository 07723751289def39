"""What users hand over, as arrays: numbers, features and whole numbers, or one line that says why not."""

from collections.abc import Iterator

import numpy as np
import torch

from dgutils.errors import UserError, require

LARGEST = 1e45  # of a feature: its sixth power, summed over pairs, is still a float64


class NotFiniteRows(UserError):
    """For who knows better what the rows are: their numbers are in `rows`."""

    def __init__(self, rows: np.ndarray):
        self.rows, some = rows.tolist(), ", ".join(map(str, rows[:8])) + (" ..." if len(rows) > 8 else "")
        super().__init__(f"{len(rows)} feature rows are not finite (rows {some}): check those images")


def as_array(given) -> np.ndarray:
    """Numbers as an array: of an array, a tensor of any precision or device, with gradient or not, or a list."""
    try:
        if isinstance(given, (list, tuple)):
            given = [as_array(item) if isinstance(item, torch.Tensor) else item for item in given]
        if isinstance(given, torch.Tensor):
            given = given.detach().cpu()
            given = (given.double() if given.dtype == torch.bfloat16 else given).numpy()
        x = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"not numbers ({error}): give an array, a tensor, or a list of equal shapes") from error
    require(x.dtype.kind in "biuf",
            f"an array of {x.dtype} is no array of real numbers: give an array, a tensor, or a list")
    return x


def as_features(given, at_least: int = 1, like=None) -> np.ndarray:
    """Features [N,d] in their own float32 or float64, all else as float64.

    Raises UserError for what is no matrix, has too few rows, is not finite, too large or, unlike `like`, of another d.
    """
    x = as_array(given)
    x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)
    x = x.copy() if min(x.strides, default=0) < 0 else x  # torch knows no backward strides
    require(x.ndim == 2 and x.shape[1], f"features must be a matrix [N,d], got shape {x.shape}")
    require(len(x) >= at_least, f"need at least {at_least} feature rows, got {len(x)}: score more images")
    if len(bad := np.flatnonzero(~np.isfinite(x).all(axis=1))):
        raise NotFiniteRows(bad)
    largest = float(max(x.max(), -x.min()))
    require(largest <= LARGEST, f"features as large as {largest:.3g}: scale them below {LARGEST:g}")
    if like is not None:
        same_dim(like, x)
    return x


def same_dim(a, b) -> None:
    """Raises UserError unless the last axes of two arrays are of one length."""
    d, other = a.shape[-1], b.shape[-1]
    require(d == other, f"feature dimensions differ ({d} and {other}): use one feature space")


def on_device(device) -> None:
    """Raises UserError unless torch can compute on a device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {device!r}: {reason[:100]}: give 'cpu', or 'cuda' where there is one") from error


def whole(least: int, **numbers) -> None:
    """Raises UserError unless each is a whole number, at least `least`."""
    for name, value in numbers.items():
        require(isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least,
                f"{name} {value!r}: give a whole number, at least {least}")


def blocks(x: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of x, at most `size` at once, each time with the number of the first."""
    return ((start, x[start : start + size]) for start in range(0, len(x), size))
