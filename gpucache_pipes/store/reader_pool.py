"""The threads that read files."""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from gpucache_pipes.store.process_hooks import join_at_exit

_log = logging.getLogger("gpucache_pipes")

Job = Callable[[Any], Any]
"""Called with its argument by a reader thread; returns something true if the thread must end."""


class ReaderPool:
    """Daemon threads that run tasks in the order of submission.

    Not a concurrent.futures executor: its threads are joined at the exit of the interpreter, so one
    read that hangs would keep the process alive; and a finalizer must not put anything into its
    queue, while `queue.SimpleQueue.put` is reentrant and safe there.

    The threads hold the queue and nothing else. So a store that is dropped without `close` is
    collected, and its finalizer ends the threads through the queue.

    Args:
        threads: how many.
        name: of each thread, with a number.
        on_start: called first by each thread.

    Attributes:
        threads: the threads that take tasks, without those that have been replaced.
    """

    def __init__(
        self, threads: int, name: str, on_start: Callable[[], object] = lambda: None
    ) -> None:
        self._tasks: queue.SimpleQueue[tuple[Job, Any] | None] = queue.SimpleQueue()
        self._name = name
        self._on_start = on_start
        self._started = 0
        self._watched: queue.SimpleQueue[None] | None = None
        self._watcher: threading.Thread | None = None
        self.threads = [self._start() for _ in range(threads)]

    def _start(self) -> threading.Thread:
        name = f"{self._name}-{self._started}"
        arguments = (self._tasks, self._on_start)
        thread = threading.Thread(target=_work, args=arguments, name=name, daemon=True)
        thread.start()
        self._started += 1
        join_at_exit(thread)
        return thread

    def start_another(self) -> None:
        """Start one more thread. Raises RuntimeError if the system has none."""
        self.threads.append(self._start())

    def end_one(self) -> None:
        """End one thread, as soon as one is idle."""
        self._tasks.put(None)

    def forget(self, thread: threading.Thread) -> None:
        """Do not count on a thread that hangs. It ends when its task does."""
        self.threads.remove(thread)

    def watch(self, seconds: float, method: "weakref.WeakMethod[Callable[[], None]]") -> None:
        """Call `method` every so many seconds, in a thread of its own.

        Until `stop`, or until its object has been collected.
        """
        self._watched = queue.SimpleQueue()
        thread = threading.Thread(
            target=_watch,
            args=(self._watched, seconds, method),
            name=f"{self._name}-watch",
            daemon=True,
        )
        thread.start()
        self._watcher = thread

    def submit(self, task: Job, argument: Any) -> None:
        """Run `task(argument)` in one of the threads. It must not raise. Takes no lock."""
        self._tasks.put((task, argument))

    def stop(self, last: Callable[[], object] | None = None) -> None:
        """End the threads after the task at hand, and drop what waits. Takes no lock.

        `last` is called by one of them before it ends.
        """
        try:
            while True:
                self._tasks.get_nowait()
        except queue.Empty:
            pass
        if last is not None:
            self._tasks.put((_call, last))
        # One for each thread that was ever started: a thread that was replaced leaves its own.
        for _ in range(self._started):
            self._tasks.put(None)
        if self._watched is not None:
            self._watched.put(None)

    def join(self, seconds: float) -> list[str]:
        """Wait for the threads to end, at most this long; the names of those that still run."""
        deadline = time.monotonic() + seconds
        watchers = [] if self._watcher is None else [self._watcher]
        threads = [*self.threads, *watchers]
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in others if thread.is_alive()]


def _work(
    tasks: "queue.SimpleQueue[tuple[Job, Any] | None]", on_start: Callable[[], object]
) -> None:
    try:
        on_start()
    except Exception:  # of a device that has failed: so will the tasks, whose batches are told
        _log.exception("a reader thread cannot use the device")
    while (item := tasks.get()) is not None:
        task, argument = item
        if task(argument):
            return
        # An idle thread must not keep the store of its last task alive.
        del item, task, argument


def _call(last: Callable[[], object]) -> None:
    try:
        last()
    except Exception:
        _log.exception("what a reader thread does last has failed")


def _watch(
    stopped: "queue.SimpleQueue[None]",
    seconds: float,
    method: "weakref.WeakMethod[Callable[[], None]]",
) -> None:
    while True:
        try:
            stopped.get(timeout=seconds)
        except queue.Empty:
            call = method()
            if call is not None:
                try:
                    call()
                except Exception:
                    _log.exception("cannot replace a reader thread that hangs; trying again")
                del call
                continue
        return
