"""How many reader threads there are, and how many files each of them takes at a time."""

import os
import threading
import time
from collections.abc import Callable

MOST_READERS = 128
"""Threads that a store starts by itself, at most."""

LEAST_AHEAD = 2
"""Requests that are pending ahead of the consumer, where the storage does not ask for more."""

_FILES_AHEAD = 8
"""Files that should be pending for each reader, so that a task has several: a task costs a few
hundred microseconds under the interpreter lock."""

_MOST_AHEAD_BYTES = 256 << 20
"""Bytes of the features that are pending, if more than LEAST_AHEAD requests are, at most."""

_MOST_FILES = 256
_MOST_IN_A_BOX = 32
_FIRST_FILES = 2
"""Files of a task, before it is known how long one takes."""

_TASK_SECONDS = (0.002, 0.03)
"""What a read task should take, at least, since it has costs of its own; and at most, so that other
readers have work, and batches do not wait for files of others."""

_MOST_LEAST_FILES = 8
_LOCK_SHARES = (0.1, 0.5)
"""Readers that wait for the storage compute under the interpreter lock, most of it once a task. If
all of them together hold it for more than the second part of the time, tasks get more files; if for
less than the first one, fewer. The time that a file takes does not tell: it includes waiting for
the lock."""

_TRYING_SECONDS = 0.008
"""What a read task should take at most while another number of readers may be better, which is
found sooner then."""

_WAITING = 0.5
"""Readers that spend less than this share of their time computing wait for the storage."""

_WORTH_IT = 1.2
"""How much faster files must arrive for more readers to be kept."""

_FEWEST_TASKS = 4
"""Tasks by which a number of readers is judged, at least; and one for each reader."""

_NO_WORSE = 0.9
"""What part of the rate must be left for fewer readers to be kept."""

_CHANGED = 2.0
"""If a file takes this many times as long as before, or a part of it, readers are tried again."""


def requests_ahead(files: int, readers: int, file_bytes: float, budget: int | None) -> int:
    """How many requests should be pending ahead of the consumer, so that all readers have work.

    Readers become more where the storage has latency (see Pace), and so do these. What is pending
    takes memory.

    Args:
        files: of each request.
        readers: threads that read.
        file_bytes: the mean size of a feature; 0 if it is not known.
        budget: bytes that the cache may take.
    """
    wanted = -(-_FILES_AHEAD * readers // max(1, files)) if readers > 1 else 0
    if wanted <= LEAST_AHEAD or not file_bytes:
        return LEAST_AHEAD
    room = _MOST_AHEAD_BYTES if budget is None else min(_MOST_AHEAD_BYTES, budget // 8)
    return max(LEAST_AHEAD, min(wanted, int(room / (file_bytes * max(1, files)))))


class Pace:
    """Finds the number of readers by trying, as long as more files wait than are being read.

    Readers that wait for the storage want company, and those that compute want it as long as there
    are idle cores and they hold no interpreter lock. Wall time far above CPU time is the sign of
    the former, but also of readers that wait for the interpreter lock, and who holds that cannot be
    asked. So the number is doubled or quadrupled, and if files do not arrive faster for it, the
    former number is restored, and nothing more is tried until they take another time than before.
    The consumer may have been the reason why they arrived faster. So where readers use more than
    one core together, and wait most of the time, half of them are tried.

    For any number of threads. Of readers that come at the same time one decides.

    Args:
        readers: how many there are.
        most: how many there may be.
        start: starts one more. Raises RuntimeError if the system has no more threads. One ends
            when `dismissed` says so to it.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        readers: int,
        most: int,
        start: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._readers = readers
        self._most = most
        self._start = start
        self._deciding = threading.Lock()
        # Seconds that a file takes a reader, of late. None before the first one.
        self._each: float | None = None
        # Files that a task should have because of the interpreter lock.
        self._least = 1
        # Tasks that have to finish before others count, since they may have begun under other
        # conditions; when those that count began to finish; how many, their files and their time.
        self._ignored: int | None = None
        self._since = 0.0
        self._tasks = self._files = 0
        self._wall = self._cpu = 0.0
        # While another number of readers is being tried: the number before, and files a second.
        self._before: tuple[int, float] | None = None
        # Threads that are to end, and the number of which half were too few.
        self._surplus = self._needed = 0
        # Whether more readers did not help, and what a file has taken since, once that is known.
        self._gave_up = False
        self._gave_up_at: float | None = None

    def files_per_task(self, waiting: int) -> int:
        """How many of `waiting` files a reader should take."""
        if self._each is None:
            return _FIRST_FILES
        settled = self._readers >= self._most or self._gave_up
        longest = _TASK_SECONDS[1] if settled else _TRYING_SECONDS
        each = max(self._each, 1e-6)
        share = -(-waiting // self._readers)
        least = max(self._least, int(_TASK_SECONDS[0] / each))
        most = max(self._least, int(longest / each))
        return max(1, min(max(share, least), most, _MOST_FILES))

    def files_per_box(self, files: int) -> int:
        """How many of `files` are handed over together: the least that a reader can take."""
        return min(self.files_per_task(files), _MOST_IN_A_BOX)

    def finished(self, files: int, wall: float, cpu: float, native: bool, waiting: bool) -> None:
        """A reader has finished a task.

        Args:
            files: that it had.
            wall: seconds that it took.
            cpu: seconds of them in which it computed.
            native: whether it held no interpreter lock, for the most part.
            waiting: whether other files wait for a reader.
        """
        if not files or not self._deciding.acquire(blocking=False):
            return
        try:
            each = wall / files
            self._each = each if self._each is None else 0.75 * self._each + 0.25 * each
            if cpu < _WAITING * wall:
                share = self._readers * cpu / max(wall, 1e-9)
                if share > _LOCK_SHARES[1] and files >= self._least:
                    self._least = min(2 * self._least, _MOST_LEAST_FILES)
                elif share < _LOCK_SHARES[0]:
                    self._least = max(1, self._least // 2)
            now = self._clock()
            if not waiting or self._ignored is None:
                # The consumer is the limit, or was until now: what arrived says nothing.
                self._begin()
            elif self._ignored:
                self._ignored -= 1
                self._since = now
            else:
                self._tasks += 1
                self._files += files
                self._wall += wall
                self._cpu += cpu
                if self._tasks >= max(_FEWEST_TASKS, self._readers):
                    self._decide(native, now - self._since)
                    self._begin()
        finally:
            self._deciding.release()

    def dismissed(self) -> bool:
        """Whether the reader that asks is to end. Once for each that is too many."""
        if not self._surplus:
            return False
        with self._deciding:
            if not self._surplus:
                return False
            self._surplus -= 1
            return True

    def _begin(self) -> None:
        self._ignored = self._readers + self._surplus
        self._tasks = self._files = 0
        self._wall = self._cpu = 0.0

    def _decide(self, native: bool, elapsed: float) -> None:
        if self._surplus:  # those that are to end still read
            return
        each = self._wall / self._files
        # Not from how many readers there are and what a file takes: not all of them need be busy.
        rate = self._files / max(elapsed, 1e-9)
        busy = self._cpu / max(self._wall, 1e-9)
        if self._before is not None:
            self._judge(rate, *self._before)
            return
        if self._gave_up and self._gave_up_at is None:
            self._gave_up_at = each
        elif self._gave_up_at is not None and not (
            1 / _CHANGED < each / self._gave_up_at < _CHANGED
        ):
            self._gave_up, self._gave_up_at, self._needed = False, None, 0
        crowded = not native and busy < _WAITING and self._readers * busy > 1
        if crowded and self._readers > max(1, self._needed):
            self._try(self._readers // 2, rate)
        elif not self._gave_up:
            most = self._most if busy < _WAITING else _idle_cores()
            factor = 4 if busy < _WAITING / 4 else 2
            wanted = min(factor * self._readers, most, self._most)
            if wanted > self._readers:
                self._try(wanted, rate)

    def _try(self, readers: int, rate: float) -> None:
        self._before = (self._readers, rate)
        self._set_readers(readers)

    def _judge(self, rate: float, readers: int, rate_before: float) -> None:
        """Keep the number that was tried, or restore the one before."""
        self._before = None
        if self._readers < readers:
            if rate < _NO_WORSE * rate_before:
                self._needed = readers
                self._set_readers(readers)
        elif rate < _WORTH_IT * rate_before:
            self._gave_up, self._gave_up_at = True, None
            self._set_readers(readers)

    def _set_readers(self, wanted: int) -> None:
        if wanted < self._readers:
            self._surplus += self._readers - wanted
            self._readers = wanted
            return
        spared = min(self._surplus, wanted - self._readers)
        self._surplus -= spared
        self._readers += spared
        while self._readers < wanted:
            try:
                self._start()
            except RuntimeError:
                self._most = self._readers
                return
            self._readers += 1


def _idle_cores() -> int:
    """Cores that this process may use, without one for the consumer and one for others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) - 2)
