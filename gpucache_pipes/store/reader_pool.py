"""The threads that read files ahead of the consumer."""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("gpucache_pipes")

Task = Callable[[Any], Any]
"""Returns something true if the thread is to end: another has taken its place."""


class ReaderPool:
    """A fixed number of daemon threads that run tasks in the order of submission.

    concurrent.plans is not used because its threads are joined at interpreter exit, so that
    one stuck read would keep the process alive, and because its queue must not be filled from
    a finalizer, while SimpleQueue.put is safe there.

    The threads know the queue and nothing else: a store that is dropped without close() is
    collected, and its finalizer ends them through the queue.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Task, Any] | None] = queue.SimpleQueue()
        self._name = name
        self._started = 0
        self._watched: queue.SimpleQueue[None] | None = None
        self._watcher: threading.Thread | None = None
        self.threads = [self._start() for _ in range(threads)]

    def _start(self) -> threading.Thread:
        name = f"{self._name}-{self._started}"
        thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
        thread.start()
        self._started += 1
        return thread

    def start_another(self) -> None:
        """Have one thread more."""
        self.threads.append(self._start())

    def end_one(self) -> None:
        """Have one thread less, as soon as one is idle."""
        self._tasks.put(None)

    def forget(self, stuck: threading.Thread) -> None:
        """Do not count on a thread, which ends when its task does."""
        self.threads.remove(stuck)

    def watch(self, seconds: float, method: "weakref.WeakMethod[Callable[[], None]]") -> None:
        """Call it every so often, until stop() or until its object is gone."""
        self._watched = queue.SimpleQueue()
        thread = threading.Thread(
            target=_watch,
            args=(self._watched, seconds, method),
            name=f"{self._name}-watch",
            daemon=True,
        )
        thread.start()
        self._watcher = thread

    def submit(self, task: Task, argument: Any) -> None:
        """Run `task(argument)` in one of the threads. The task handles its own errors."""
        self._tasks.put((task, argument))

    def stop(self) -> None:
        """Tell the threads to end after the task at hand; what waits is dropped. Takes no lock."""
        try:
            while True:
                self._tasks.get_nowait()
        except queue.Empty:
            pass
        # One for each thread that may be there: one that is being replaced leaves its own.
        for _ in range(self._started):
            self._tasks.put(None)
        if self._watched is not None:
            self._watched.put(None)

    def join(self, seconds: float) -> list[str]:
        """Wait for the threads to end, at most so long; returns the names of those that run on."""
        deadline = time.monotonic() + seconds
        watchers = [] if self._watcher is None else [self._watcher]
        threads = [*self.threads, *watchers]
        others = [thread for thread in threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in others if thread.is_alive()]


def _work(tasks: "queue.SimpleQueue[tuple[Task, Any] | None]") -> None:
    while (item := tasks.get()) is not None:
        task, argument = item
        if task(argument):
            return
        # An idle thread must not keep the last task's store alive.
        del item, task, argument


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
                    _log.exception("cannot replace a reader that hangs; trying again")
                del call
                continue
        return
