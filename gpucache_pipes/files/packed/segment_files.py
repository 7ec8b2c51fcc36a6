"""The open files of segments."""

import contextlib
import fcntl
import io
import os
from collections import OrderedDict
from collections.abc import Callable

from gpucache_pipes.files.packed.readahead import ReadAhead
from gpucache_pipes.files.packed.segment import Segment, open_quickly

_MAX_OPEN = 400
"""Of the 1024 descriptors that a process may have on most systems."""


class SegmentFile(io.FileIO):
    """The open file of a segment. Closed with its last user."""

    def __del__(self) -> None:
        self.close()  # without this there is a ResourceWarning


class SegmentFiles:
    """The open files of segments. For any number of threads.

    A file that is open is locked (shared), so that no process removes it; it is closed once it is
    not among the last ones used, and no thread reads from it.

    Args:
        opened: called with each segment that is opened.
    """

    def __init__(self, opened: Callable[[Segment], None] | None = None) -> None:
        self._files: OrderedDict[Segment, SegmentFile] = OrderedDict()
        self._opened = opened
        self._ahead = ReadAhead()

    def file(self, segment: Segment) -> SegmentFile:
        """The open file. Raises OSError if it is not there, or is another one by now."""
        file = self._files.get(segment)
        if file is not None:
            with contextlib.suppress(KeyError):  # another thread has closed it
                self._files.move_to_end(segment)
            return file
        file = SegmentFile(segment.path, opener=open_quickly)
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino, status.st_size) != segment.identity:
            raise FileNotFoundError(f"{segment.path!r} is another file by now")
        # Where that fails, it is about to be removed, or the file system has no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._ahead.add(segment, file.fileno())
        self._files[segment] = file
        while len(self._files) > _MAX_OPEN:
            with contextlib.suppress(KeyError):  # another thread was faster
                self._files.popitem(last=False)
        if self._opened is not None:
            self._opened(segment)
        return file

    def end(self) -> None:
        """Read nothing ahead any more. Takes no lock."""
        self._ahead.close()

    def close(self) -> None:
        """Close those that no thread reads from."""
        self._ahead.close()
        self._files.clear()
