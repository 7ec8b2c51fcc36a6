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
        with self.lock:
            self.ended = True
            self.jobs.put(None)

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
    the threads of that, which may be in a request that nobody answers.

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
        weakref.finalize(self, self._crew.end).atexit = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job in some thread, as soon as one is free. It must not raise."""
        if os.getpid() != self._process:  # after a fork there are no threads
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
                thread.start()
                return

    def end(self) -> None:
        """Have the threads end after the jobs that were submitted. New jobs start new ones."""
        crew = self._crew
        self._begin_anew()
        crew.end()

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
    """Hands out the positions of objects to threads, in order, and waits until all are done.

    Args:
        count: how many there are.
        room: bytes that they may have together; what is under way by then may have more.
        begin: is called with the position of the earliest one that is not done, and returns whether
            to go on. One call at a time.
        clock: ns since any moment.
    """

    def __init__(
        self, count: int, room: int, begin: Callable[[int, int], bool], clock: Callable[[], int]
    ) -> None:
        self._count = count
        self._room = room
        self._begin = begin
        self._clock = clock
        self._lock = threading.Lock()
        self._begun: list[int] = []
        self._done: list[bool] = []
        self._earliest = 0
        self._under_way = 0
        self._over = threading.Event()

    def take(self) -> int:
        """The next position; -1 if there is none."""
        with self._lock:
            position = len(self._begun)
            if position == self._count or self._room < 0 or self._over.is_set():
                self._finish()
                return -1
            self._begun.append(self._clock())
            self._done.append(False)
            self._under_way += 1
            if position == self._earliest and not self._begin(position, self._begun[position]):
                self._room = -1
            return position

    def done(self, position: int, nbytes: int) -> None:
        """An object of this size was got, or failed."""
        with self._lock:
            self._done[position] = True
            self._under_way -= 1
            self._room -= nbytes
            if position == self._earliest:
                while self._earliest < len(self._done) and self._done[self._earliest]:
                    self._earliest += 1
                at = self._earliest
                if at < len(self._begun) and not self._begin(at, self._begun[at]):
                    self._room = -1
            self._finish()

    def _finish(self) -> None:
        if not self._under_way and (self._room < 0 or len(self._begun) == self._count):
            self._over.set()

    def wait(self) -> None:
        """Wait until all that was handed out is done, and there is no more to hand out."""
        self._over.wait()
