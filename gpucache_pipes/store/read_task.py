"""The files that one reader reads, and how another takes them over from a reader that is stuck."""

import time
from collections.abc import Sequence
from threading import Thread, current_thread

from gpucache_pipes.cache import Entry
from gpucache_pipes.files import OpenFeature


class Revoked(BaseException):
    """For a reader: its task has gone to another one, and it may touch nothing any more."""


class Task:
    """What one reader does, in the order in which it does it.

    A reader may be taken out of a task only while it is in the middle of a file, between `begin`
    and `end`: there it touches nothing of the cache. Whichever of `end` and `revoke` comes first
    wins, since taking the last item out of a list happens at once.

    Attributes:
        left: the entries that are LOADING because of it.
        opened: what was opened for them and not closed.
        thread: the reader.
        forsaken: the entry whose pages a reader may yet write to, after it was revoked.
    """

    __slots__ = ("_hand", "_since", "forsaken", "left", "opened", "thread")

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.left = dict.fromkeys(entries)
        self.opened: dict[Entry, OpenFeature] = {}
        self.thread: Thread = current_thread()
        self.forsaken: Entry | None = None
        self._hand: list[Entry] = []
        self._since = 0.0

    def begin(self, entry: Entry) -> None:
        """The reader turns to that file."""
        self._since = time.monotonic()
        self._hand = [entry]

    def end(self, feature: OpenFeature | None = None) -> None:
        """The reader is through with it. Raises Revoked if that came too late.

        Then `feature`, which it has read from or just opened, is closed: it is nobody else's.
        """
        try:
            self._hand.pop()
        except IndexError:
            if feature is not None:
                feature.close()
            raise Revoked from None

    def close_opened(self) -> None:
        """Close each once, whoever calls this how often."""
        while self.opened:
            try:
                _, feature = self.opened.popitem()
            except KeyError:
                return
            feature.close()

    def is_overdue(self, seconds: float) -> bool:
        """Whether the reader has been at one file for so long."""
        return bool(self._hand) and time.monotonic() - self._since > seconds

    def revoke(self, seconds: float) -> Entry | None:
        """Take the task away if the reader has been at one file for so long: that one."""
        hand = self._hand
        if not self.is_overdue(seconds):
            return None
        try:
            return hand.pop()
        except IndexError:
            return None
