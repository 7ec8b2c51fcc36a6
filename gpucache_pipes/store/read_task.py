"""The files that one reader thread reads, and how another takes them over when it hangs."""

import time
from collections.abc import Sequence
from threading import Thread, current_thread
from typing import NamedTuple

from gpucache_pipes.files import OpenFeature


class Revoked(BaseException):
    """Raised in a reader thread whose task another has taken over: it must not touch anything."""


class OpenFile(NamedTuple):
    """A file that is open.

    Attributes:
        number: of its entry, which is LOADING.
        feature: what was opened.
        version: of the file before it was opened, where the store revalidates.
    """

    number: int
    feature: OpenFeature
    version: bytes | None


class ReadTask:
    """What one reader thread does, file by file.

    The watcher may take a task away from its reader only in the middle of a file, between `begin`
    and `end`, where the reader touches nothing of the cache. Whichever comes first wins, `end` by
    the reader or `revoke` by the watcher, because both pop the one item of a list, which is atomic
    with and without the global interpreter lock.

    Attributes:
        left: the numbers of the entries that are LOADING because of this task, in order. Others may
            load an entry again once it has left. Changed with the lock of the store held.
        opened: what is open for them. Items are taken out one at a time (`dict.popitem`, which is
            atomic), so each is closed once.
        thread: the reader.
        abandoned: the number of the entry to whose pages a reader may still write after `revoke`.
    """

    __slots__ = ("_current", "_since", "abandoned", "left", "opened", "thread")

    def __init__(self, numbers: Sequence[int]) -> None:
        self.left = dict.fromkeys(numbers)
        self.opened: dict[int, OpenFeature] = {}
        self.thread: Thread = current_thread()
        self.abandoned: int | None = None
        self._current: list[int] = []
        self._since = 0.0

    def begin(self, number: int) -> None:
        """The reader begins with the file of this entry."""
        self._since = time.monotonic()
        self._current = [number]

    def end(self, feature: OpenFeature | None = None) -> None:
        """The reader has finished with the file. Raises Revoked if the task was taken away.

        Then `feature`, from which it has read or which it has just opened, is closed here.
        """
        try:
            self._current.pop()
        except IndexError:
            if feature is not None:
                feature.close()
            raise Revoked from None

    def close_opened(self) -> None:
        """Close every open file once, whichever threads call this."""
        while self.opened:
            try:
                _, feature = self.opened.popitem()
            except KeyError:
                return
            feature.close()

    def is_overdue(self, seconds: float) -> bool:
        """Whether the reader has been at one file for longer than `seconds`."""
        return bool(self._current) and time.monotonic() - self._since > seconds

    def revoke(self, seconds: float) -> int | None:
        """Take the task away if the reader is overdue; the number of the entry that it is at."""
        current = self._current
        if not self.is_overdue(seconds):
            return None
        try:
            return current.pop()
        except IndexError:
            return None
