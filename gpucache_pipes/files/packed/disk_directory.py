"""The directory of a disk cache, which all processes of a machine share.

    gpucache-disk-cache.json    marks the directory as ours, and has its budget
    lock                        held (flock) while claims are made, and segments removed
    segments/NAME.safetensors   complete segments; a process that has one open holds a shared lock
    writers/NAME.claims         held by its writer while that lives; the hashes of what it writes
    writers/NAME.part           the segment that it is writing

A lock ends with the process that holds it, however that ends. So what is left of a process that was
killed is found by its lock, and removed by the next one.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.claims import Claims, write_claims
from gpucache_pipes.files.packed.disk_marker import require_own, stored_budget, write_marker
from gpucache_pipes.files.packed.segment import DamagedSegmentError, Segment

_NAME = re.compile(r"[0-9]{20}-[0-9a-f]{16}")
_SUFFIX = ".safetensors"
_LOCK_SECONDS = 10
"""The lock is held for less than a millisecond, unless a process was stopped meanwhile."""

_MOST_SEGMENTS = 256
_LEAST_SEGMENT_BYTES = 64 << 20
_MOST_SEGMENT_BYTES = 4 << 30


class DiskDirectory:
    """Finds, adds and removes the segments of a directory. Not for several threads at a time.

    Args:
        path: of the directory, which is made if need be.
        max_bytes: what this process writes makes the segments no larger than this, all together;
            and the directory no larger than the largest such number. Both are a matter of whole
            segments. None is nine tenths of what the disk has.

    Attributes:
        path: of the directory, absolute.
        segment_bytes: the size at which a segment is full.
        writable: whether anything can be written.

    Raises:
        ValueError: the directory holds what is not of a disk cache, or belongs to another user.
        OSError: it cannot be made or read.
    """

    def __init__(self, path: str, max_bytes: int | None) -> None:
        self.path = os.path.abspath(path)
        self._lock_fd = -1
        self._claims_fd = -1
        self._segments_at = os.path.join(self.path, "segments")
        self._writers_at = os.path.join(self.path, "writers")
        self._id = f"{time.time_ns():020d}-{secrets.token_hex(8)}"
        self._claims: dict[str, Claims] = {}
        self._known: dict[str, Segment | None] = {}
        self._listed = -1
        self.writable = True
        self._make(max_bytes)
        usable = _disk_bytes(self.path) * 9 // 10
        self.max_bytes = usable if max_bytes is None else max_bytes
        share = self.max_bytes // _MOST_SEGMENTS
        least = min(_LEAST_SEGMENT_BYTES, max(1, self.max_bytes // 4))
        self.segment_bytes = max(least, min(share, _MOST_SEGMENT_BYTES))

    def _make(self, max_bytes: int | None) -> None:
        """Make what is not there."""
        require_own(self.path, self._id, max_bytes)
        try:
            for directory in (self._segments_at, self._writers_at):
                os.makedirs(directory, mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._lock_fd = os.open(os.path.join(self.path, "lock"), flags, 0o600)
            with self._locked():
                if max_bytes is not None and max_bytes > (stored_budget(self.path) or 0):
                    write_marker(self.path, self._id, max_bytes)
                self._remove_remains()
        except OSError:
            self.writable = False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {self.path!r} locked") from None
                time.sleep(0.002)
        try:
            yield
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)

    # Segments

    def changed(self) -> bool:
        """Whether segments may have come or gone since `segments`."""
        try:
            changed = os.stat(self._segments_at).st_mtime_ns
            # Clocks are coarse: there may be another change at the same time.
            return changed != self._listed or time.time_ns() - changed < 1_000_000_000
        except OSError:
            return False

    def segments(self) -> list[Segment]:
        """All segments that can be read, from the oldest to the newest. Raises nothing."""
        try:
            self._listed = os.stat(self._segments_at).st_mtime_ns
            names = sorted(name for name in os.listdir(self._segments_at) if _is_segment(name))
        except OSError:
            names = []
        for name in set(self._known) - set(names):
            del self._known[name]
        for name in names:
            if name not in self._known:
                try:
                    self._known[name] = Segment(os.path.join(self._segments_at, name))
                except FileNotFoundError:  # another process has made room meanwhile
                    continue
                except (OSError, DamagedSegmentError):
                    self._known[name] = None
        return [one for name in names if (one := self._known.get(name)) is not None]

    def damaged(self) -> list[str]:
        """The names of segments that cannot be read, as `segments` has found."""
        return [name for name, segment in self._known.items() if segment is None]

    def used(self, segment: Segment) -> None:
        """Note that a segment is in use by a run. Raises nothing."""
        with contextlib.suppress(OSError):
            os.utime(segment.path)

    def segment_path(self) -> str:
        """The path for a new segment."""
        return os.path.join(self._segments_at, f"{time.time_ns():020d}-{self._id[-16:]}{_SUFFIX}")

    def partial_path(self) -> str:
        """The path of a segment that is being written."""
        return os.path.join(self._writers_at, f"{self._id}.part")

    def reserve(self, nbytes: int, needed: int) -> int:
        """Make room for a new segment, and keep it by the size of the file at `partial_path`.

        Removes segments that no process uses, the longest unused ones first, if the budget of the
        directory is used up; not if only the smaller one of this process is.

        Args:
            nbytes: the size of the segment.
            needed: a smaller one that would do.

        Returns:
            How many bytes it may have: `nbytes` or less; 0 if there is no room.

        Raises:
            OSError: the directory cannot be written.
        """
        with self._locked():
            stored = stored_budget(self.path) or self.max_bytes
            self._hold_claims()
            self._remove_remains()
            sizes = self._sizes()
            total = sum(size for _, size, _ in sizes)
            budget = min(self.max_bytes, stored)
            if needed > budget:
                return 0
            if self.max_bytes >= stored:
                for _, size, path in sorted(sizes):
                    if total + nbytes <= budget:
                        break
                    if path.endswith(_SUFFIX) and _remove_unused(path):
                        total -= size
            free = shutil.disk_usage(self.path).free
            room = min(nbytes, budget - total, free - (free >> 6))
            return room if room >= max(needed, self.segment_bytes // 8) else 0

    def _sizes(self) -> list[tuple[int, int, str]]:
        """When they were used last, sizes and paths of segments and of parts."""
        found = []
        # In this order: a part that is completed meanwhile is counted twice, and not nowhere.
        for directory, is_ours in ((self._writers_at, _is_part), (self._segments_at, _is_segment)):
            with os.scandir(directory) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if is_ours(entry.name):
                            status = entry.stat(follow_symlinks=False)
                            found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    @property
    def nbytes(self) -> int:
        """The bytes of all segments that this process knows."""
        return sum(segment.file_bytes for segment in list(self._known.values()) if segment)

    # Claims

    def claim(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of these names this process is to write: those that no other is writing.

        Raises OSError if the directory cannot be written.
        """
        with self._locked():
            self._hold_claims()
            self._read_claims()
            free = self._unclaimed(hashes)
            if not free.all():  # perhaps by processes that live no more
                self._remove_remains()
                self._read_claims()
                free = self._unclaimed(hashes)
            if free.any():
                write_claims(self._claims_fd, hashes[free, 0])
        return free

    def _unclaimed(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        free = np.ones(len(hashes), np.bool_)
        for claims in self._claims.values():
            free &= ~claims.have(hashes[:, 0])
        return free

    def _hold_claims(self) -> None:
        """Show that this process lives, from before it writes anything. With the lock."""
        if self._claims_fd < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            path = os.path.join(self._writers_at, f"{self._id}.claims")
            self._claims_fd = os.open(path, flags, 0o600)
            fcntl.flock(self._claims_fd, fcntl.LOCK_EX)

    def _read_claims(self) -> None:
        """What other processes that live have claimed since the last look. With the lock."""
        names = {name for name in os.listdir(self._writers_at) if name.endswith(".claims")}
        names.discard(f"{self._id}.claims")
        for name in set(self._claims) - names:
            del self._claims[name]
        for name in names:
            path = os.path.join(self._writers_at, name)
            if name not in self._claims and _is_abandoned(path):
                continue  # `_remove_remains` removes it
            self._claims.setdefault(name, Claims()).read(path)

    def _remove_remains(self) -> None:
        """Remove what processes have left that do not live any more. With the lock."""
        for name in os.listdir(self._writers_at):
            stem, _, kind = name.partition(".")
            if not _NAME.fullmatch(stem) or kind != "claims" or stem == self._id:
                continue
            path = os.path.join(self._writers_at, name)
            if _is_abandoned(path):
                for end in ("part", "claims"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self._writers_at, f"{stem}.{end}"))

    def close(self) -> None:
        """Give the claims up, and write nothing any more. Raises nothing."""
        self.writable = False
        claims, self._claims_fd = self._claims_fd, -1
        lock, self._lock_fd = self._lock_fd, -1
        if claims >= 0:
            for end in ("part", "claims"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self._writers_at, f"{self._id}.{end}"))
            os.close(claims)
        if lock >= 0:
            os.close(lock)

    def forget(self) -> None:
        """In a forked child: close what the locks of the parent are held by. Raises nothing."""
        for fd in (self._claims_fd, self._lock_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._claims_fd = self._lock_fd = -1
        self.writable = False


def _is_segment(name: str) -> bool:
    return name.endswith(_SUFFIX) and _NAME.fullmatch(name.removesuffix(_SUFFIX)) is not None


def _is_part(name: str) -> bool:
    return name.endswith(".part")


def _disk_bytes(path: str) -> int:
    return shutil.disk_usage(path).total


def _is_abandoned(path: str) -> bool:
    """Whether the process that held the lock of this file has ended."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _remove_unused(path: str) -> bool:
    """Remove a segment unless a process has it open. Whether it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
