"""Streams and events of the simulated device; see `testing.simulated`."""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gpucache_pipes.testing.ordering import Clock, join


class Timeline(Protocol):
    """Who runs the operations. `lock` is held for all that happens to streams and events."""

    lock: Any
    waits: int

    def let_time_pass(self) -> None:
        """Run some of what could run."""

    def run_one(self) -> None:
        """Run one operation, because somebody waits."""

    def host_knows(self, clock: Clock) -> None:
        """The host has seen that so much is finished."""


class SimulatedStream:
    """A queue of operations, with what Runtime needs of a torch.Stream."""

    def __init__(self, runtime: Timeline, number: int) -> None:
        self.number = number
        self.clock: Clock = {}
        self.queue: deque[tuple[Callable[[], None], _Mark | None]] = deque()
        self._runtime = runtime

    @property
    def ready(self) -> bool:
        """Whether there is an operation that could run."""
        if not self.queue:
            return False
        mark = self.queue[0][1]
        return mark is None or mark.done

    def wait_event(self, event: "SimulatedEvent") -> None:
        """What is issued from now on comes behind the event."""
        with self._runtime.lock:
            # What was recorded until now: the event may be recorded again.
            self.queue.append((_nothing, event.mark))
            join(self.clock, event.mark.clock)

    def synchronize(self) -> None:
        """Let the host wait for all that was issued."""
        event = SimulatedEvent(self._runtime)
        event.record(self)
        event.synchronize()


class _Mark:
    """What a stream knew when an event was recorded, and whether it has come so far."""

    def __init__(self, clock: Clock, done: bool) -> None:
        self.clock = clock
        self.done = done

    def reach(self) -> None:
        self.done = True


class SimulatedEvent:
    """A mark in a queue, with what Runtime needs of a torch.Event."""

    def __init__(self, runtime: Timeline) -> None:
        self.mark = _Mark({}, done=True)
        self._runtime = runtime

    def record(self, stream: SimulatedStream) -> None:
        """Mark what has been issued on the stream until now."""
        with self._runtime.lock:
            self.mark = _Mark(dict(stream.clock), done=False)
            stream.queue.append((self.mark.reach, None))

    def query(self) -> bool:
        """Whether it has been reached."""
        with self._runtime.lock:
            self._runtime.let_time_pass()
            if self.mark.done:
                self._runtime.host_knows(self.mark.clock)
            return self.mark.done

    def synchronize(self) -> None:
        """Let the host wait for it."""
        with self._runtime.lock:
            mark = self.mark
            self._runtime.waits += 1
            while not mark.done:
                self._runtime.run_one()
            self._runtime.host_knows(mark.clock)


def _nothing() -> None:
    pass
