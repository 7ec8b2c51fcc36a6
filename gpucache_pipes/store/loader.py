"""Has files read, in reader threads or in the thread of the caller."""

import logging
import time
import weakref
from collections import deque
from threading import TIMEOUT_MAX, current_thread
from typing import Any

from gpucache_pipes.device import Backend
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.lock import require_stack
from gpucache_pipes.store.pace import Pace
from gpucache_pipes.store.read_task import Revoked
from gpucache_pipes.store.reader_gate import ReaderGate
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.store.task_reader import TaskReader

_log = logging.getLogger("gpucache_pipes")

_FRAMES = 64
"""Nested calls that reading in the caller's thread takes, without those of a load_fn."""


class Loader:
    """Makes read tasks of entries that are LOADING, and has threads read them.

    Args:
        reader: reads them.
        loads: the reader side of the shared cache.
        backend: takes the bytes.
        pool: the reader threads; None reads in the thread that calls `submit`.
        most_readers: how many there may be at most; see Pace.
        read_timeout: seconds after which a reader that is still at one file is replaced.

    Attributes:
        gate: where readers can be held.
    """

    def __init__(
        self,
        reader: TaskReader,
        loads: LoadTracker,
        backend: Backend,
        pool: ReaderPool | None,
        most_readers: int,
        read_timeout: float | None,
    ) -> None:
        self._loads = loads
        self._backend = backend
        self._pool = pool
        self._read_timeout = read_timeout
        self._reader = reader
        # Boxes, each with a list of entries or empty. Single operations on it are atomic.
        self._waiting: deque[list[list[int]]] = deque()
        readers = 1 if pool is None else len(pool.threads)
        self._pace = Pace(readers, most_readers, self._start_reader)
        self.gate = ReaderGate()
        loads.held_by = self.gate.held_by
        if pool is not None and read_timeout is not None:
            pool.watch(read_timeout / 4, weakref.WeakMethod(self.replace_overdue_readers))

    @property
    def readers(self) -> int:
        """How many reader threads there are. Takes no lock."""
        return 0 if self._pool is None else len(self._pool.threads)

    def submit(self, numbers: list[int]) -> None:
        """Have these entries, which are LOADING, read, and empty the list.

        Takes no lock of the store. Whatever is raised, numbers that are still in the list
        afterwards are not being read.
        """
        if not numbers:
            return
        if self._pool is None:
            require_stack(_FRAMES)
            use, uses, inside = object(), self._loads.uses, self.gate.inside
            # All inside the `try`: a deferred signal is handled where the lock is released.
            try:
                self.gate.enter(use)
                self._loads.begin_use(use)
                self._reader.read(numbers.copy(), numbers)
            finally:
                # By one operation, and not within a function: an interrupt may come at its entry.
                uses.pop(use, None)
                inside.pop(use, None)
                self.gate.leave(use)
                self._loads.run_postponed()
            return
        size = self._pace.files_per_box(len(numbers))
        boxes = [[numbers[at : at + size]] for at in range(0, len(numbers), size)]
        try:
            self._hand_over(boxes)
            numbers.clear()
        except BaseException:
            # An interrupt. What is in a box belongs to the thread that takes it out first: a reader
            # or this one.
            numbers[:] = [entry for boxed in boxes for entry in _take(boxed)]
            raise

    def _hand_over(self, boxes: list[list[list[int]]]) -> None:
        """Have reader threads take what is in these boxes, in order."""
        assert self._pool is not None
        self._waiting.extend(boxes)
        # One call for each box, since a reader may take a single one. If it takes several, other
        # calls find nothing.
        for _ in boxes:
            self._pool.submit(self._load_in_thread, None)

    def _take_some(self) -> list[int]:
        """The entries of a read task, which are this thread's from now on."""
        boxes = self._waiting
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            try:
                numbers += _take(boxes.popleft())
            except IndexError:
                break
            if self._reader.opens_at_once:
                # Else a file that takes long would keep files of another request waiting.
                wanted = self._pace.files_per_task(len(numbers) * (1 + len(boxes)))
        return numbers

    def drain(self) -> None:
        """Wait until the device has finished all uploads and gathers. While readers are held."""
        use, uses = object(), self._loads.uses
        # A use, so that a signal handler that closes the store meanwhile is made to wait.
        try:
            self._loads.begin_use(use)
            self._backend.drain()
        finally:
            uses.pop(use, None)
            self._loads.run_postponed()

    def stop(self) -> None:
        """End the reader threads after the file at hand; drop what has not begun. No lock."""
        self._reader.stop()
        self._waiting.clear()
        self.gate.open_for_ever()
        if self._pool is not None:
            self._pool.stop()

    def join(self, seconds: float) -> list[str]:
        """Wait for reader threads to end, at most this long; the names of those that still run."""
        return [] if self._pool is None else self._pool.join(seconds)

    # Reader threads

    def _load_in_thread(self, _: None) -> bool:
        """Read one task. Returns True if this thread has been replaced and must end."""
        reader = current_thread()
        self.gate.enter(reader)
        try:
            numbers = self._take_some()
            if numbers:
                begin, computed = time.monotonic(), time.thread_time()
                natively = self._reader.read(numbers, [])
                self._pace.finished(
                    len(numbers),
                    time.monotonic() - begin,
                    time.thread_time() - computed,
                    native=2 * natively > len(numbers),
                    waiting=bool(self._waiting),
                )
                if self._pace.dismissed() and self._pool is not None:
                    self._pool.forget(reader)
                    return True
        except Revoked:
            return True
        except BaseException:
            pass  # The batches that wait have been told, and the thread must go on.
        finally:
            self.gate.leave(reader)
        return False

    def _start_reader(self) -> None:
        """Start one more reader thread, in one of them."""
        assert self._pool is not None
        self._pool.start_another()
        if self._reader.stopping:  # the end of the others has been arranged before
            self._pool.end_one()

    # The watcher

    def replace_overdue_readers(self) -> None:
        """Replace readers that have been at one file for too long. In the watcher thread."""
        assert self._pool is not None and self._read_timeout is not None
        for task in list(self._reader.running):
            if task.overdue(self._read_timeout) is None:
                continue
            # First, since it may fail: then the next look tries again.
            self._pool.start_another()
            taken = self._loads.take_over(task, self._read_timeout)
            if taken is None:  # the reader has finished the file after all
                self._pool.end_one()
                continue
            hanging, rest = taken
            self.gate.leave(task.thread)
            task.opened.pop(hanging, None)  # the reader may be reading from it
            try:
                task.close_opened()  # before the others are read, and their batches complete
            finally:
                if rest:
                    self._hand_over([[rest]])
            self._pool.forget(task.thread)
            # Without the lock: the handlers of a log have locks of their own.
            _log.warning(
                "%r: not read within read_timeout=%g seconds; another thread goes on with the "
                "files after it", self._loads.identity(hanging)[1], self._read_timeout,
            )  # fmt: skip


def _take(boxed: list[list[Any]]) -> list[Any]:
    """The numbers of a task for the first caller, none for the others: `list.pop` is atomic."""
    try:
        return boxed.pop()
    except IndexError:
        return []


def require_timeout(read_timeout: float | None, asynchronous: bool) -> None:
    """Raise ValueError for a read_timeout that no loader can have."""
    if read_timeout is not None and not asynchronous:
        raise ValueError("read_timeout needs reader threads: asynchronous=True")
    if read_timeout is not None and not 0 < read_timeout < TIMEOUT_MAX:
        raise ValueError(
            f"read_timeout={read_timeout!r} must be a positive, finite number of seconds"
        )
