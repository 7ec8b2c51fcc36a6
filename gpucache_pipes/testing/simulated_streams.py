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
    """A queue of operations. Behaves like a torch.Stream."""

    def __init__(self, runtime: Timeline, number: int) -> None:
        self.number = number
        self.clock: Clock = {}
        self.queue: deque[tuple[Callable[[], None], SimulatedEvent | None]] = deque()
        self._runtime = runtime

    @property
    def ready(self) -> bool:
        """Whether there is an operation that could run."""
        if not self.queue:
            return False
        event = self.queue[0][1]
        return event is None or event.done

    def wait_event(self, event: "SimulatedEvent") -> None:
        """What is issued from now on comes behind the event."""
        with self._runtime.lock:
            self.queue.append((_nothing, event))
            join(self.clock, event.clock)

    def synchronize(self) -> None:
        """Let the host wait for all that was issued."""
        event = SimulatedEvent(self._runtime)
        event.record(self)
        event.synchronize()


class SimulatedEvent:
    """A mark in a queue. Behaves like a torch.Event."""

    def __init__(self, runtime: Timeline) -> None:
        self.clock: Clock = {}
        self.done = True
        self._runtime = runtime

    def record(self, stream: SimulatedStream) -> None:
        """Mark what has been issued on the stream until now."""
        with self._runtime.lock:
            self.done = False
            self.clock = dict(stream.clock)
            stream.queue.append((self._finish, None))

    def _finish(self) -> None:
        self.done = True

    def query(self) -> bool:
        """Whether it has been reached."""
        with self._runtime.lock:
            self._runtime.let_time_pass()
            if self.done:
                self._runtime.host_knows(self.clock)
            return self.done

    def synchronize(self) -> None:
        """Let the host wait for it."""
        with self._runtime.lock:
            self._runtime.waits += 1
            while not self.done:
                self._runtime.run_one()
            self._runtime.host_knows(self.clock)


def _nothing() -> None:
    pass
