"""The files that one reader thread reads, and how another takes them over when it hangs."""

import time
from collections.abc import Container, Sequence
from itertools import compress
from threading import Thread, current_thread
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from gpucache_pipes.cache import Numbers
from gpucache_pipes.files import Layout, OpenFeature, Progress

_FIRST = Progress()
"""Of one file."""


class Revoked(BaseException):
    """Raised in a reader thread whose task another has taken over: it must not touch anything."""


class FileGroup(Protocol):
    """Features whose bytes are at hand: of open files, or in another tier.

    Attributes:
        numbers: of their entries, which are LOADING.
        versions: of their files; empty unless the store revalidates.
    """

    @property
    def numbers(self) -> list[int]:
        """See above."""

    @property
    def versions(self) -> list[bytes | None]:
        """See above."""

    def layouts(self) -> tuple[list[Layout], Numbers]:
        """Different layouts, and which of them each feature has."""

    def values(self) -> list[tuple[Any, ...]]:
        """The plain values of each feature; empty if none has any."""

    def bytes_read(self) -> int:
        """Bytes that were read from storage for them."""

    def without(self, numbers: Container[int]) -> Self:
        """Those that do not have these numbers."""


class OpenFiles(NamedTuple):
    """Files that are open, in columns.

    Attributes:
        numbers: of their entries, which are LOADING.
        features: what was opened.
        versions: of the files before they were opened; empty unless the store revalidates.
    """

    numbers: list[int]
    features: list[OpenFeature]
    versions: list[bytes | None]

    def layouts(self) -> tuple[list[Layout], Numbers]:
        """Different layouts, and which of them each feature has."""
        which: dict[int, int] = {}
        layouts: list[Layout] = []
        found = []
        for feature in self.features:
            layout = feature.layout
            number = which.setdefault(id(layout), len(layouts))
            if number == len(layouts):
                layouts.append(layout)
            found.append(number)
        return layouts, np.array(found, np.intp)

    def values(self) -> list[tuple[Any, ...]]:
        """The plain values of each feature."""
        return [feature.values for feature in self.features]

    def bytes_read(self) -> int:
        """Bytes that were read from storage for them."""
        return sum([feature.bytes_read for feature in self.features])

    def without(self, numbers: Container[int]) -> "OpenFiles":
        """Those that do not have these numbers."""
        kept = [number not in numbers for number in self.numbers]
        return OpenFiles(
            list(compress(self.numbers, kept)),
            list(compress(self.features, kept)),
            list(compress(self.versions, kept)),
        )


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
        # The entries at hand, and how far the reader is in them.
        self._current: list[tuple[Sequence[int], Progress]] = []
        self._since = 0.0

    def begin(self, number: int) -> None:
        """The reader begins with the file of this entry."""
        self._since = time.monotonic()
        self._current = [((number,), _FIRST)]

    def begin_many(self, numbers: Sequence[int]) -> Progress:
        """The reader begins with the files of these entries, one after the other.

        Until `end` it touches nothing of the cache. Returns what it has to keep up to date.
        """
        progress = Progress()
        self._since = time.monotonic()
        self._current = [(numbers, progress)]
        return progress

    def stop(self) -> None:
        """Have the reader return early from opening many files."""
        for _, progress in self._current.copy():
            if progress is not _FIRST:
                progress.stop()

    def end(self, *features: OpenFeature | None) -> None:
        """The reader has finished with the file. Raises Revoked if the task was taken away.

        Then `features`, from which it has read or which it has just opened, are closed here.
        """
        try:
            self._current.pop()
        except IndexError:
            for feature in features:
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

    def overdue(self, seconds: float) -> int | None:
        """The number of the entry that the reader has been at for longer than `seconds`."""
        since, current = self._since, self._current.copy()
        for numbers, progress in current:
            number = numbers[progress.current]
            # Read after the number: it is earlier if the reader goes on in between.
            if time.monotonic() - since - progress.since > seconds:
                return number
        return None

    def revoke(self, seconds: float) -> int | None:
        """Take the task away if the reader is overdue; the number of the entry that it is at."""
        current = self._current
        number = self.overdue(seconds)
        if number is not None:
            self.stop()
            try:
                current.pop()
            except IndexError:
                return None
        return number
