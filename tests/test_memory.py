"""What is freed is kept: the system is not asked for the same memory twice."""

import subprocess
import sys
import textwrap

import pytest

from dgutils.memory import keep_freed_memory

FAULTS = """
    import resource, sys, torch
    from dgutils.memory import keep_freed_memory

    if sys.argv[1] == "keep":
        keep_freed_memory()
    for turn in range(4):  # glibc's defaults adapt in the first turns
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2**21) for _ in range(12)]  # 8 MiB each
        del held
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="for glibc")
def test_freed_memory_is_kept():
    faults = {how: int(subprocess.run([sys.executable, "-c", textwrap.dedent(FAULTS), how], check=True, text=True,
                                      stdout=subprocess.PIPE).stdout) for how in ("keep", "return")}
    assert faults["keep"] * 10 < faults["return"], faults
