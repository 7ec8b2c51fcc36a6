"""Host memory: how much there is, and ranges of it."""

import contextlib
import mmap
import os
import sys
from pathlib import Path


def available_host_bytes() -> int:
    """Host memory that could be used now without swapping, within the limits of a container."""
    available = _meminfo("MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number("/sys/fs/cgroup/memory.max")
    used = _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _meminfo(name: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def map_memory(nbytes: int, *, inherited: bool = True) -> mmap.mmap:
    """Zeroed memory that takes no room before it is written to. Raises OSError if refused.

    Unless it is `inherited`, it does not exist in the child of a fork.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        # The module names it from Python 3.13 on.
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)
    region = mmap.mmap(-1, nbytes, flags=flags)
    # Large kernel pages spare a gather most TLB misses.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice) and not (inherited and advice == "MADV_DONTFORK"):
            with contextlib.suppress(OSError):
                region.madvise(getattr(mmap, advice))
    return region
