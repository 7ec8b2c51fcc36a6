"""Host memory: how much is available, and anonymous mappings of it."""

import contextlib
import mmap
import os
import sys
from pathlib import Path


def available_host_bytes() -> int:
    """Bytes of host memory that can be used now without swapping.

    Respects the memory limits of containers (cgroup v2). Where the system does not report available
    memory, all physical memory counts as available.
    """
    available = _meminfo("MemAvailable")
    if available is None:
        available = _physical_bytes()
    for limit, used in _limits():
        available = min(available, max(0, limit - used))
    return available


def total_host_bytes() -> int:
    """Bytes of host memory that this process may use at most.

    All physical memory, or the least memory limit of the containers that it is in; divided by the
    processes that torchrun has started on this machine (LOCAL_WORLD_SIZE).
    """
    limits = [limit for limit, _ in _limits()]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min([_physical_bytes(), *limits]) // (int(processes) if processes.isdigit() else 1)


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def _limits() -> list[tuple[int, int]]:
    """(limit, used) of each control group with a limit: the process's own, and those around it.

    Of cgroup v2, or of the memory controller of v1.
    """
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            root, names = _GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / own.lstrip("/")
        for at in [group, *group.parents]:
            if at != root and root not in at.parents:
                break
            limit, used = (_number(at / name) for name in names)
            if limit is not None and used is not None:
                found.append((limit, used))
    return found


def _meminfo(name: str) -> int | None:
    """A field of /proc/meminfo in bytes, or None where the system has no such field."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _number(path: Path) -> int | None:
    """The number that a file holds, or None."""
    try:
        return int(path.read_text())
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
