"""Runs the parity tests and writes docs/parity.md, the error that each achieved: python tests/parity_table.py"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks: a second thread only costs

import pytest  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).parent
HEAD = """\
# Parity with the reference implementations

Written by `.venv/bin/python tests/parity_table.py`, with torch {torch}. Same weights, same inputs, same noise; both
sides in float64. An error is the largest absolute difference over the largest absolute value of the reference's
output; for times it is the largest relative error of any. `tests/fixtures/regenerate_*.py` ran the reference and
say which revision; the tests do not need it. A test fails far below the 1e-5 that we ask of ourselves.

The published weights themselves could not be compared: they were never on the machine that this was developed on.
What is compared is every option that they use, on small networks with random weights; the full-size networks are
compared by the number of their parameters and by the names and shapes of all of them, and run once:

| published network | parameters, equal to the reference's |
|---|---|
{counts}

One thing is deliberately not equal: the released code computes importance-sampled times in float32, where
1 - exp(-1e-6) keeps five digits or fewer; its smallest times are off by up to {released:.0%} of themselves. Ours
are float64.

| compared | case | relative error | test fails at |
|---|---|---|---|
"""
WORDS = {"test_denoisers": "denoiser D(x, sigma)", "test_encoders": "logits; of extractors also features",
         "test_trajectories": "sampled images, at all 18 or 35 steps", "test_guidance_term": "guidance term, log-ratio",
         "test_times": "tau(sigma), its cosine clock, sampled times"}  # fmt: skip


class Collect:
    """Keeps the error that each passed test recorded."""

    def __init__(self):
        self.rows = []

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties if report.when == "call" and report.passed else ():
            if name == "relative_error":
                test, _, case = report.nodeid.rpartition("::")[2].partition("[")
                self.rows.append((test, case.rstrip("]").replace("-", ", ", 1), value))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    import numpy as np
    import test_parity_networks as networks
    import test_parity_sampling as sampling

    collect = Collect()
    if pytest.main(["-q", networks.__file__, sampling.__file__], plugins=[collect]):
        sys.exit("the parity tests do not pass: no table")
    limits = {"test_times": sampling.TIMES_TOLERANCE, "test_denoisers": networks.TOLERANCE,
              "test_encoders": networks.TOLERANCE}  # fmt: skip
    reference = sampling.REFERENCE
    released = np.abs(reference["times_1e-05_float32"] / reference["times_1e-05"] - 1).max()
    rows = [f"| {WORDS[test]} | {case} | {value:.0e} | {limits.get(test, sampling.TOLERANCE):.0e} |"
            for test, case, value in collect.rows]  # fmt: skip
    counts = "\n".join(f"| {name} | {count:,} |" for name, (count, _) in networks.PUBLISHED.items())
    head = HEAD.format(torch=torch.__version__.partition("+")[0], released=released, counts=counts)
    text = head + "\n".join(rows) + "\n"
    (HERE.parent / "docs" / "parity.md").write_text(text)
    print(f"wrote docs/parity.md: {len(rows)} rows, the largest error {max(row[2] for row in collect.rows):.1e}")
