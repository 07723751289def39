"""What all tests share."""

import os

import pytest
from hypothesis import settings

from dgutils.paths import cores, environment

# As the commands do it: what the account configures for other programs changes no test.
ours = environment()
os.environ.clear()
os.environ.update(ours)
# A make that runs the tests passes its own state to every make below it; a test's make starts from none, as ours do.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)
# Before torch is imported, and through the environment, so that kernels and other processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "2")

# The same examples on every run, and no failure because a shared machine is slow.
settings.register_profile("dgutils", derandomize=True, deadline=None)
settings.load_profile("dgutils")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """How many run at once under `pytest -n auto`: the cores that we may use, at most 8, of 1.5 GB memory each."""
    return min(cores(), 8)
