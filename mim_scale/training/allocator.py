"""Freed memory that stays with the process, on a CPU.

The C library gives every large block back to the system when it is freed, so each new tensor is paged in again, page by
page and filled with zeros: a third of a step's time. Kept, blocks are used again as they are.
"""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of mallopt's settings in glibc's malloc.h."""
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed from now on, to the process's end: call it before the first large tensor.

    The resident size stays at its peak. Returns whether it was done: only glibc has the setting, elsewhere nothing
    happens.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block by mmap, which would be unmapped at once; and the top of the heap is never given back.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
