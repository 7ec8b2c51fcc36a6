"""Threads that make requests, so that a reader has several in flight."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

_IDLE_SECONDS = 1.0
"""After which a thread ends that has nothing to do."""

SMALL_AT_ONCE = 16
"""Small objects that one reader asks for at the same time."""


class _Crew:
    """The threads of a Workers, which do not keep that alive.

    Attributes:
        jobs: for them; None says that there will be no more.
        lock: held while a job is added, or a thread ends. Reentrant: a finalizer may end it.
        threads: those that run.
        ended: whether there will be no more jobs.
    """

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.lock = threading.RLock()
        self.threads: set[threading.Thread] = set()
        self.ended = False

    def end(self) -> None:
        """There will be no more jobs."""
        # A finalizer of a process that was forked must not wait for a thread that is not in it.
        held = self.lock.acquire(timeout=1.0)
        self.ended = True
        self.jobs.put(None)
        if held:
            self.lock.release()

    def run(self) -> None:
        """Run jobs until there are none for a while."""
        while True:
            try:
                job = self.jobs.get(timeout=_IDLE_SECONDS)
            except Empty:
                with self.lock:
                    if not self.jobs.empty():
                        continue
                    self.threads.discard(threading.current_thread())
                return
            if job is None:
                self.jobs.put(None)  # for the next thread
                return
            job()
            del job


class Workers:
    """Daemon threads that run jobs, started when they are needed.

    What does not work: concurrent.futures.ThreadPoolExecutor. The interpreter waits at its end for
    the threads of that, which may wait for an answer that never comes.

    Args:
        most: threads at the same time.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._process = os.getpid()
        self._crew = _Crew()
        self._finalizer = weakref.finalize(self, self._crew.end)
        self._finalizer.atexit = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job in some thread, as soon as one is free. It must not raise."""
        if os.getpid() != self._process:  # after a fork there are no threads
            self._finalizer.detach()
            self._begin_anew()
        while True:
            crew = self._crew
            with crew.lock:
                if crew.ended:
                    continue
                crew.jobs.put(job)
                # A thread too many does no harm: it ends when it has nothing to do.
                if crew.jobs.empty() or len(crew.threads) >= self._most:
                    return
                thread = threading.Thread(target=crew.run, name=self._name, daemon=True)
                crew.threads.add(thread)
                try:
                    thread.start()
                    return
                except RuntimeError:  # the system has no more threads: others do it, or this one
                    crew.threads.discard(thread)
                    if crew.threads:
                        return
                    job = crew.jobs.get_nowait() or job
            job()
            return

    def end(self) -> None:
        """Have the threads end after the jobs that were submitted. New jobs start new ones."""
        finalizer = self._finalizer
        self._begin_anew()
        finalizer()

    def begin(self, request: Callable[[Any], Any], item: Any) -> "Future[Any]":
        """The result of `request(item)`, once there is one."""
        future: Future[Any] = Future()
        self.submit(partial(_fulfil, future, request, item))
        return future

    def each(
        self, request: Callable[[Any], Any], items: Sequence[Any], at_once: int
    ) -> Iterator[Any]:
        """`map(request, items)`, with `at_once` requests ahead. Stops asking when one fails."""
        if len(items) == 1:
            yield request(items[0])
            return
        pending: deque[Future[Any]] = deque()
        try:
            for item in items:
                pending.append(self.begin(request, item))
                if len(pending) >= at_once:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _fulfil(future: Future[Any], request: Callable[[Any], Any], item: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(request(item))
    except BaseException as error:
        future.set_exception(error)


class Turns:
    """Hands out positions to threads, in order, and waits until all are done.

    Args:
        positions: in ascending order.
        room: bytes that they may have together; what is under way by then may have more.
        begin: is called with the earliest position that is not done and the moment at which it
            began, and returns whether to go on. One call at a time.
        clock: ns since any moment.
    """

    def __init__(
        self,
        positions: Sequence[int],
        room: int,
        begin: Callable[[int, int], bool],
        clock: Callable[[], int],
    ) -> None:
        self._positions = positions
        self._room = room
        self._begin = begin
        self._clock = clock
        self._lock = threading.Lock()
        self._taken = 0
        # Those that are under way, and when they began; in order.
        self._under_way: dict[int, int] = {}
        self._earliest = -1
        self._over = threading.Event()

    def take(self) -> int:
        """The next position; -1 if there is none."""
        with self._lock:
            if self._taken == len(self._positions) or self._room < 0:
                self._look()
                return -1
            position = self._positions[self._taken]
            self._taken += 1
            self._under_way[position] = self._clock()
            self._look()
            return position

    def done(self, position: int, nbytes: int) -> None:
        """An object of this size was got, or failed."""
        with self._lock:
            del self._under_way[position]
            self._room -= nbytes
            self._look()

    def _look(self) -> None:
        """Note which one is the earliest, and whether all are done."""
        for position, moment in self._under_way.items():
            if position != self._earliest:
                self._earliest = position
                if not self._begin(position, moment):
                    self._room = -1
            return
        if self._room < 0 or self._taken == len(self._positions):
            self._over.set()

    def wait(self) -> None:
        """Wait until all that was handed out is done, and there is no more to hand out."""
        self._over.wait()

    def end(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._room = -1
