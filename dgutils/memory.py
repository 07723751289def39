"""Memory of the process: what one step frees, the next one takes, without asking the system again."""

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h; see mallopt(3)


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed: the same bits, in less time. False without glibc.

    By default glibc returns it, and a step that frees much pays for fetching and clearing the pages again. Blocks above
    32 MiB, the most that may be set, are still returned, so that one large array does not stay with the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    options = ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    return mallopt is not None and all([mallopt(option, value) for option, value in options])
