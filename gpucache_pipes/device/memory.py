"""Host memory: how much is available, and anonymous mappings of it."""

import contextlib
import mmap
import os
import sys
from pathlib import Path


def available_host_bytes() -> int:
    """Bytes of host memory that can be used now without swapping.

    Respects the memory limit of a container (cgroup v2). Where the system does not report available
    memory, all physical memory counts as available.
    """
    available = _meminfo("MemAvailable")
    if available is None:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _number("/sys/fs/cgroup/memory.max")
    used = _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _meminfo(name: str) -> int | None:
    """A field of /proc/meminfo in bytes, or None where the system has no such field."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _number(path: str) -> int | None:
    """The number that a file holds, or None."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such file, or "max", which means no limit
        return None


def map_memory(nbytes: int, *, inherited: bool = True) -> mmap.mmap:
    """Map zeroed anonymous memory, which the kernel provides as it is written.

    Args:
        nbytes: size of the mapping.
        inherited: whether a forked child process has the mapping, too.

    Raises:
        OSError: the system refuses a mapping of this size.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        # The mmap module defines the constant from Python 3.13 on.
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)
    region = mmap.mmap(-1, nbytes, flags=flags)
    # With huge pages a gather has far fewer TLB misses.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice) and not (inherited and advice == "MADV_DONTFORK"):
            with contextlib.suppress(OSError):
                region.madvise(getattr(mmap, advice))
    return region
