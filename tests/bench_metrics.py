"""Time and memory of the evaluation beside clean-fid and prdc, on random correlated features.

Every measurement is a process of its own, so that the peak memory is its own: that of the whole process, with
Python, libraries and both feature sets. prdc is needed for the comparison only: without it its rows say so.
"""

import contextlib
import importlib.util
import io
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dgutils import metrics
from dgutils.paths import repo_root

PRDC = importlib.util.find_spec("prdc") is not None
PRDC_ABSENT = "prdc is not installed: `pip install prdc==0.2` in this environment adds the comparison"


def features(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated features float32 [n,d], not negative, as Inception's: 256 factors of falling weight, and noise."""
    rng = np.random.default_rng(0)
    mix = (rng.standard_normal((256, d)) * np.geomspace(0.25, 0.0125, 256)[:, None]).astype(np.float32)
    out = np.empty((n, d), np.float32)
    for start in range(0, n, 4096):
        rng, rows = np.random.default_rng((seed, start)), out[start : start + 4096]
        noise = rng.standard_normal(rows.shape, np.float32)
        rows[:] = np.abs(rng.standard_normal((len(rows), 256), np.float32) @ mix + 0.05 * noise + 0.02 * seed)
    return out


def _fd(real, fake):
    return metrics.frechet_distance(real, fake)


def _fd_resampled(real, fake):
    return metrics.resample(metrics.FrechetReference(real), fake, 200, 0).value


def _pairs(real, fake, n_resamples=0):
    scores = metrics.PairReference(real).compare(fake, n_resamples)
    return {"kid": scores.kid.value} | scores.manifold


def _pairs_resampled(real, fake):
    return _pairs(real, fake, 200)


def _cleanfid_fd(real, fake):
    from cleanfid.fid import fid_from_feats

    return float(fid_from_feats(real, fake))


def _cleanfid_kid(real, fake, **subsets):
    from cleanfid.fid import kernel_distance

    np.random.seed(0)  # noqa: NPY002 (clean-fid draws its subsets from the global generator)
    return kernel_distance(real, fake, **subsets)


def _prdc(real, fake, k=5):
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return {name: float(value) for name, value in compute_prdc(real, fake, k).items()}


JOBS = {job.__name__: job for job in (_fd, _fd_resampled, _pairs, _pairs_resampled, _cleanfid_fd, _cleanfid_kid, _prdc)}


def _peak_mib() -> float:
    """Peak memory of this process. Linux's ru_maxrss begins with that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _measure_here(job: str, n: int, d: int) -> dict:
    """One job in this process: wall and CPU seconds, and the process's peak memory so far in MiB."""
    real, fake = features(1, n, d), features(2, n, d)
    wall, cpu = time.perf_counter(), time.process_time()
    JOBS[job](real, fake)
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "mib": _peak_mib()}


def _measure(job: str, n: int, d: int, runs: int) -> dict:
    """Medians of several processes of a job (the largest peak)."""
    command = [sys.executable, __file__, job, str(n), str(d)]
    found = [json.loads(subprocess.run(command, cwd=repo_root(), check=True, stdout=subprocess.PIPE).stdout)
             for _ in range(runs)]  # fmt: skip
    return {"seconds": statistics.median(f["seconds"] for f in found),
            "cpu": statistics.median(f["cpu"] for f in found), "mib": max(f["mib"] for f in found)}  # fmt: skip


def _sum(*measured: dict) -> dict:
    return {"seconds": sum(m["seconds"] for m in measured), "cpu": sum(m["cpu"] for m in measured),
            "mib": max(m["mib"] for m in measured)}  # fmt: skip


def _row(what: str, n: int, d: int, runs: int, ours: dict, theirs: dict | None = None, note: str = "") -> dict:
    row = {"what": what, "n": n, "d": d, "runs": runs, "ours_seconds": ours["seconds"], "ours_mib": ours["mib"],
           "theirs_seconds": None, "theirs_mib": None, "ratio": None, "cpu_ratio": None, "note": note}  # fmt: skip
    if theirs:
        row |= {"theirs_seconds": theirs["seconds"], "theirs_mib": theirs["mib"],
                "ratio": theirs["seconds"] / ours["seconds"], "cpu_ratio": theirs["cpu"] / ours["cpu"]}  # fmt: skip
    return row


def compare(n: int, d: int, runs: int) -> list[dict]:
    """Rows of ours beside theirs for n real and n generated images; prdc's arrays take 12 n^2 bytes."""
    fd, pairs = _measure("_fd", n, d, runs), _measure("_pairs", n, d, runs)
    their_fd = _measure("_cleanfid_fd", n, d, runs)
    rows = [_row("Fréchet distance", n, d, runs, fd, their_fd, "clean-fid")]
    four = "KID, precision, recall, density, coverage"
    if not PRDC:
        return [*rows, _row(four, n, d, runs, pairs, note=PRDC_ABSENT)]
    their_kid, prdc = _measure("_cleanfid_kid", n, d, runs), _measure("_prdc", n, d, runs)
    twice = "clean-fid (100 subsets of 1,000), prdc for k = 3 and for k = 5"
    return [
        *rows,
        _row(four, n, d, runs, pairs, _sum(their_kid, prdc, prdc), twice),
        _row("all six scores", n, d, runs, _sum(fd, pairs), _sum(their_fd, their_kid, prdc, prdc), twice),
        _row("all six scores, one k", n, d, runs, _sum(fd, pairs), _sum(their_fd, their_kid, prdc), "prdc once"),
    ]


def agreement(n: int = 1500, d: int = 256) -> list[dict]:
    """The scores of one pair of sets by ours in float32 and float64 and by clean-fid (KID of all pairs) and prdc."""
    real, fake = features(1, n, d), features(2, n, d)
    wide = real.astype(np.float64), fake.astype(np.float64)
    ours, exact = ({"fd": _fd(*pair)} | _pairs(*pair) for pair in ((real, fake), wide))
    theirs = {"fd": _cleanfid_fd(*wide), "kid": _cleanfid_kid(*wide, num_subsets=1, max_subset_size=n)}
    if PRDC:
        three, five = _prdc(*wide, k=3), _prdc(*wide, k=5)
        theirs |= {k: three[k] for k in ("precision", "recall")} | {k: five[k] for k in ("density", "coverage")}
    return [{"score": k, "n": n, "d": d, "ours_float32": ours[k], "ours_float64": exact[k], "theirs": theirs.get(k)}
            for k in ours]  # fmt: skip


def run(quick: bool, n_theirs: int = 25_000) -> list[dict]:
    """Rows (what, n, d, runs, seconds, peak MiB, ratios, note) of ours and theirs; prints the scores' agreement.

    quick: small sizes, medians of five, about two minutes. Else the sizes of the paper: medians of five at 4,000
    images, one run at n_theirs (7.5 GB for prdc at 25,000), and ours alone up to 50,000 with 200 resamples.
    """
    print(f"{'score':<10} {'ours, float32':>15} {'ours, float64':>15} {'theirs':>15}")
    for row in agreement():
        numbers = (row["ours_float32"], row["ours_float64"], row["theirs"])
        print(f"{row['score']:<10} " + " ".join(f"{'-' if v is None else f'{v:.9g}':>15}" for v in numbers))
    if not PRDC:
        print(PRDC_ABSENT)
    if quick:
        return compare(2000, 512, runs=5)
    rows = compare(4000, 2048, runs=5) + compare(n_theirs, 2048, runs=1)
    for n in (12_500, 25_000, 50_000):
        all_six = _sum(_measure("_fd", n, 2048, 1), _measure("_pairs", n, 2048, 1))
        rows.append(_row("all six scores", n, 2048, 1, all_six))
    for what, job in (("Fréchet distance, 200 resamples", "_fd_resampled"),
                      ("KID, 200 resamples, and the other four", "_pairs_resampled")):  # fmt: skip
        rows.append(_row(what, 50_000, 2048, 1, _measure(job, 50_000, 2048, 1)))
    return rows


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
