"""The threads that read files ahead of the consumer."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

Task = Callable[[Any], None]


class ReaderPool:
    """A fixed number of daemon threads that run tasks in the order of submission.

    concurrent.futures is not used because its threads are joined at interpreter exit, so that
    one stuck read would keep the process alive, and because its queue must not be filled from
    a finalizer, while SimpleQueue.put is safe there.

    The threads know the queue and nothing else: a store that is dropped without close() is
    collected, and its finalizer ends them through the queue.
    """

    def __init__(self, threads: int, name: str) -> None:
        # Set by stop(). Tasks that take long look at it and end early.
        self.stopping = False
        self._tasks: queue.SimpleQueue[tuple[Task, Any] | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=_work, args=(self._tasks,), name=f"{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, task: Task, argument: Any) -> None:
        """Run `task(argument)` in one of the threads. The task handles its own errors."""
        self._tasks.put((task, argument))

    def stop(self) -> None:
        """Tell the threads to end after the task at hand; what waits is dropped. Takes no lock."""
        self.stopping = True
        try:
            while True:
                self._tasks.get_nowait()
        except queue.Empty:
            pass
        for _ in self.threads:
            self._tasks.put(None)

    def join(self, seconds: float) -> list[str]:
        """Wait for the threads to end, at most so long; returns the names of those that run on."""
        deadline = time.monotonic() + seconds
        others = [t for t in self.threads if t is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in others if thread.is_alive()]


def _work(tasks: "queue.SimpleQueue[tuple[Task, Any] | None]") -> None:
    while (item := tasks.get()) is not None:
        task, argument = item
        task(argument)
        # An idle thread must not keep the last task's store alive.
        del item, task, argument
