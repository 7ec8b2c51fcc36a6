"""Reads segments in order of the disk, into the page cache, ahead of those who read at random."""

import io
import os
import threading
from collections import deque
from pathlib import Path

from gpucache_pipes.files.packed.segment import Segment, open_quickly

_PIECE = 1 << 20
_SAMPLES = 16
_SHARE = 4
"""Of the memory that is available, so many-th parts are filled at most."""


class ReadAhead:
    """Reads segments from the first byte to the last, in a thread of its own, once each.

    An epoch in random order reads a segment in random order, which takes many times as long as from
    one end to the other where it is not in the page cache. posix_fadvise would do, if the system
    did what it says: where this was measured, WILLNEED made no difference.

    The thread ends when there is nothing to read. Nothing is read that is cached, nor more than a
    quarter of the memory that is available.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Segment] = deque()
        self._seen: set[tuple[int, int, int]] = set()
        self._room = -1
        self._is_running = False
        self._is_closed = False

    def add(self, segment: Segment, fd: int) -> None:
        """A segment has been opened. Does nothing if it was before. Raises nothing."""
        if segment.identity in self._seen or self._is_closed or _is_cached(fd, segment.file_bytes):
            return
        with self._lock:
            if self._room < 0:
                self._room = _available_bytes() // _SHARE
            self._seen.add(segment.identity)
            if segment.file_bytes > self._room:
                return
            self._room -= segment.file_bytes
            self._waiting.append(segment)
            if self._is_running:
                return
            thread = threading.Thread(target=self._run, name="gpucache-readahead", daemon=True)
            try:
                thread.start()
                self._is_running = True
            except RuntimeError:  # there are too many threads
                self._waiting.clear()

    def close(self) -> None:
        """Read nothing any more. Does not wait for the piece at hand."""
        self._is_closed = True

    def _run(self) -> None:
        memory = bytearray(_PIECE)
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                segment = self._waiting.popleft()
            try:
                with io.FileIO(segment.path, opener=open_quickly) as file:
                    at = 0
                    while at < segment.file_bytes and not self._is_closed:
                        count = os.preadv(file.fileno(), [memory], at)
                        if not count:
                            break
                        at += count
            except OSError:
                pass  # those who need a record will say so


def _is_cached(fd: int, size: int) -> bool:
    """Whether all samples of a file are in the page cache; True if that cannot be found out."""
    nowait = getattr(os, "RWF_NOWAIT", None)
    if nowait is None:
        return True
    memory = bytearray(1)
    for n in range(_SAMPLES):
        try:
            os.preadv(fd, [memory], size * n // _SAMPLES, nowait)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _available_bytes() -> int:
    """Host memory that is available; 0 if that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 0
