"""Pages that were once touched are kept: on Linux, fresh large allocations cost a page fault for every 4 KiB."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_pages() -> bool:
    """Tell glibc's malloc to serve large tensors from its heap and not to give memory back between steps.

    Returns whether it took effect; elsewhere nothing happens and training is only slower.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    keep = 2**31 - 1
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, keep), (_M_TOP_PAD, 256 * 2**20))
    taken = [mallopt(option, value) for option, value in settings]
    return all(taken)
