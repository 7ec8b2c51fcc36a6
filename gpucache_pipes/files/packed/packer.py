"""Writes segments of a disk cache in the background."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np

from gpucache_pipes.files.packed.disk_directory import DiskDirectory
from gpucache_pipes.files.packed.index import Index
from gpucache_pipes.files.packed.segment_files import SegmentFiles
from gpucache_pipes.files.packed.segment_writer import Records, SegmentWriter, joined_records

_log = logging.getLogger("gpucache_pipes")

_MOST_WAITING = 256 << 20
"""Bytes of records that wait to be written. Readers wait when there are more."""

_WORTH_BYTES = 4 << 20
_WORTH_RECORDS = 256
_GATHER_SECONDS = 0.2
"""What waits is written together: that much of it, or what has come in this time."""

_SEGMENT_SECONDS = 60.0
"""A kill loses what was read in this time, at most."""

_REFRESH_SECONDS = 0.5
_LOOK_SECONDS = 2.0
END_SECONDS = 30.0


class Packer:
    """A thread that writes records into segments, and finds those that other processes write.

    It writes to the directory in its thread alone. What goes wrong there is logged once, and ends
    the writing; reading goes on.

    Args:
        directory: where the segments are.
        files: holds those open that this process uses.

    Attributes:
        index: over the segments that are known. Replaced as a whole.
        written: how many records this process has written.
    """

    def __init__(self, directory: DiskDirectory, files: SegmentFiles) -> None:
        self._directory = directory
        self._files = files
        self.index = Index(directory.segments())
        self.written = 0
        self._writer: SegmentWriter | None = None
        self._written: set[tuple[int, ...]] = set()  # hashes and versions of its records
        self._room = 0
        self._begun = 0.0
        self._refreshed = time.monotonic()
        # What the directory held when there was no room for so many bytes.
        self._full_at: tuple[int, int] | None = None
        # All below with the condition held.
        self._changed = threading.Condition()
        self._waiting: deque[Records] = deque()
        self._nbytes = 0
        self._flushes = self._looked = self._flushed = 0
        self._ending = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="gpucache-packer", daemon=True)
        self._is_started = False
        if damaged := directory.damaged():
            _log.warning(
                "%s: %d segments cannot be read, such as %r; what they held is read from its files",
                directory.path, len(damaged), damaged[0],
            )  # fmt: skip
        if not directory.writable:
            _log.warning("%s cannot be written: the disk cache is only read", directory.path)
        _packers.add(self)

    # Called by reader threads

    @property
    def takes(self) -> bool:
        """Whether records are written."""
        return self._directory.writable and not self._ending

    def put(self, records: Records) -> None:
        """Have records written. Waits while too much is waiting to be written."""
        with self._changed:
            self._start()
            while self._nbytes > _MOST_WAITING and self.takes:
                self._changed.wait(1.0)
            if self.takes:
                self._waiting.append(records)
                self._nbytes += len(records.data)
                # The thread is not woken for each: it takes the interpreter from others.
                if len(self._waiting) == 1 or self._is_worth_it():
                    self._changed.notify_all()

    def flush(self) -> None:
        """Have the segment at hand completed, and find those of others.

        Waits for the latter, for two seconds at most, and not for the former.
        """
        with self._changed:
            if not self._ending:
                self._start()
                self._flushes += 1
                wanted = self._flushes
                self._changed.notify_all()
                if self._directory.changed():
                    self._changed.wait_for(
                        lambda: self._looked >= wanted or not self._is_started, _LOOK_SECONDS
                    )

    def wait(self, seconds: float) -> bool:
        """Wait until what was put and flushed before is done. Whether it is."""
        with self._changed:
            wanted = self._flushes
            return self._changed.wait_for(
                lambda: (self._flushed >= wanted and not self._waiting) or not self._is_started,
                seconds,
            )

    def _start(self) -> None:
        if not self._is_started and not self._ending:
            self._thread.start()
            self._is_started = True

    def end(self) -> None:
        """Have the thread complete its segment and end. Does not wait, and takes no lock."""
        self._ending = True
        if not self._is_started:
            self._directory.close()
            return
        # Not with the lock, which a finalizer must not take: the thread looks again after a while.
        if self._changed.acquire(blocking=False):
            try:
                self._changed.notify_all()
            finally:
                self._changed.release()

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended, at most this long. Raises nothing."""
        if self._is_started and os.getpid() == self._pid:
            self._thread.join(seconds)
            if self._thread.is_alive():
                _log.warning(
                    "%s: the last segment was not written within %g seconds",
                    self._directory.path, seconds,
                )  # fmt: skip

    # In the thread

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            self._give_up(error)
        finally:
            self._directory.close()
            with self._changed:
                self._ending = True  # a thread starts once
                self._is_started = False
                self._waiting.clear()
                self._nbytes = 0
                self._changed.notify_all()

    def _step(self) -> bool:
        """Write what has come. Returns False at the end."""
        with self._changed:
            if self._changed.wait_for(
                lambda: self._has_work() or self._waiting, self._seconds_left()
            ):
                self._changed.wait_for(self._has_work, _GATHER_SECONDS)
            ending, flushes = self._ending, self._flushes
            waiting = list(self._waiting)
        try:
            if not ending and (
                flushes > self._looked or time.monotonic() - self._refreshed > _REFRESH_SECONDS
            ):
                self._refresh()
                with self._changed:
                    self._looked = flushes
                    self._changed.notify_all()
            if waiting:
                if self._directory.writable:
                    self._write(joined_records(waiting))
                self._taken(waiting)
            if self._writer is not None and (
                ending or flushes > self._flushed or self._seconds_left() == 0
            ):
                self._complete()
        except Exception as error:
            self._give_up(error)
        with self._changed:
            self._flushed = flushes
            self._changed.notify_all()
            return not (ending and not self._waiting)

    def _has_work(self) -> bool:
        return self._is_worth_it() or self._flushes > self._flushed or self._ending

    def _is_worth_it(self) -> bool:
        return self._nbytes > _WORTH_BYTES or len(self._waiting) > _WORTH_RECORDS

    def _seconds_left(self) -> float | None:
        """Until the segment at hand is completed. Without one, until the end is looked for."""
        if self._writer is None:
            return _LOOK_SECONDS
        return max(0.0, self._begun + _SEGMENT_SECONDS - time.monotonic())

    def _taken(self, waiting: Sequence[Records]) -> None:
        with self._changed:
            for records in waiting:
                self._waiting.popleft()
                self._nbytes -= len(records.data)
            self._changed.notify_all()

    def _write(self, records: Records) -> None:
        # Another process may have completed them meanwhile.
        wanted = ~self.index.has(records.hashes, records.versions)
        wanted &= [one not in self._written for one in _identities(records)]
        records = records.only(wanted)
        if not records.names:
            return
        records = records.only(self._directory.claim(records.hashes))
        if self._directory.changed():
            # One that has just ended has given its claims up, and completed its segments before.
            self._refresh()
            records = records.only(~self.index.has(records.hashes, records.versions))
        self._append(records)

    def _append(self, records: Records) -> None:
        """Write these into one or more segments, as far as there is room."""
        count = len(records.names)
        if not count:
            return
        if not self._has_room(records.file_bytes):
            if count > 1:  # a part of them may fit
                first = np.arange(count) < count // 2
                self._append(records.only(first))
                self._append(records.only(~first))
            return
        assert self._writer is not None
        self._writer.append(records)
        self._written.update(_identities(records))
        if self._writer.file_bytes >= self._room:
            self._complete()

    def _has_room(self, nbytes: int) -> bool:
        """Whether there is a segment that takes so many bytes."""
        if self._writer is not None and self._writer.file_bytes + nbytes > self._room:
            self._complete()
        if self._writer is not None:
            return True
        nbytes += SegmentWriter.LEAST_BYTES
        if self._full_at is not None and self._full_at <= (self._directory.nbytes, nbytes):
            return False
        self._room = self._directory.reserve(max(self._directory.segment_bytes, nbytes), nbytes)
        if self._room < nbytes:
            self._full_at = self._directory.nbytes, nbytes
            return False
        self._writer = SegmentWriter(self._directory.partial_path(), self._room)
        self._begun = time.monotonic()
        return True

    def _complete(self) -> None:
        """Complete the segment at hand."""
        writer = self._writer
        assert writer is not None
        path = self._directory.segment_path()
        writer.finish(path)
        self.written += writer.files
        self._writer = None
        self._written.clear()
        self._refresh(changed=True)
        for segment in self.index.segments:
            if segment.path == path:
                self.index.mark_current(segment)  # its files were looked at when they were read
                with contextlib.suppress(OSError):
                    self._files.file(segment)  # else it could make room for the next one

    def _refresh(self, changed: bool = False) -> None:
        """Find the segments that have come since the last look."""
        self._refreshed = time.monotonic()
        if changed or self._directory.changed():
            self.index = Index(self._directory.segments(), self.index)
            self.index.carry_over()  # what was noted meanwhile

    def _give_up(self, error: BaseException) -> None:
        """End the writing."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        if self._directory.writable:
            self._directory.close()
            _log.warning(
                "%s cannot be written (%s): what is not in it yet is read from its files",
                self._directory.path, error,
            )  # fmt: skip
        with self._changed:
            self._waiting.clear()
            self._nbytes = 0
            self._looked = self._flushes
            self._changed.notify_all()


def _identities(records: Records) -> list[tuple[int, ...]]:
    """Of each record, what no other one has."""
    hashes, versions = records.hashes[:, 0].tolist(), records.versions.tolist()
    return [(one, *version) for one, version in zip(hashes, versions, strict=True)]


_packers: "weakref.WeakSet[Packer]" = weakref.WeakSet()


def _in_child() -> None:
    for packer in list(_packers):
        packer._directory.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@atexit.register
def _at_exit() -> None:
    """Complete the segments of stores that were not closed."""
    deadline = time.monotonic() + END_SECONDS
    packers = list(_packers)
    for packer in packers:
        packer.end()
    for packer in packers:
        packer.join(max(0.0, deadline - time.monotonic()))
