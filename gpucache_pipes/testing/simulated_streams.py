"""Streams and events of the simulated device; see `testing.simulated`."""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gpucache_pipes.testing.ordering import Clock, join
from gpucache_pipes.testing.simulated_memory import CurrentDevices


class Timeline(Protocol):
    """What streams and events need from the runtime that runs their operations.

    Attributes:
        lock: reentrant; held while a stream or an event changes.
        waits: how often the host has waited.
        devices: the current device of each thread.
    """

    lock: Any
    waits: int
    devices: CurrentDevices

    def let_time_pass(self) -> None:
        """Run some of the operations that are ready."""

    def run_one(self) -> None:
        """Run one operation that is ready, because the host waits."""

    def host_knows(self, clock: Clock) -> None:
        """Record that the host has seen the operations in `clock` to be finished."""


class SimulatedStream:
    """A queue of operations, with the methods of `torch.Stream` that `Runtime` requires."""

    def __init__(self, runtime: Timeline, number: int) -> None:
        self.number = number
        self.clock: Clock = {}
        self.queue: deque[tuple[Callable[[], None], _Mark | None]] = deque()
        self._runtime = runtime

    @property
    def ready(self) -> bool:
        """Whether the first operation of the queue can run now."""
        if not self.queue:
            return False
        mark = self.queue[0][1]
        return mark is None or mark.done

    def wait_event(self, event: "SimulatedEvent") -> None:
        """Order all operations issued from now on after the event."""
        self._runtime.devices.require("wait_event")
        with self._runtime.lock:
            # The mark as of now: the event may be recorded again.
            self.queue.append((_nothing, event.mark))
            join(self.clock, event.mark.clock)

    def synchronize(self) -> None:
        """Let the host wait for all operations issued so far."""
        event = SimulatedEvent(self._runtime)
        event.record(self)
        event.synchronize()


class _Mark:
    """The clock of a stream when an event was recorded, and whether the stream has reached it."""

    def __init__(self, clock: Clock, done: bool) -> None:
        self.clock = clock
        self.done = done

    def reach(self) -> None:
        self.done = True


class SimulatedEvent:
    """A mark in a queue, with the methods of `torch.Event` that `Runtime` requires."""

    def __init__(self, runtime: Timeline) -> None:
        self.mark = _Mark({}, done=True)
        self._runtime = runtime

    def record(self, stream: SimulatedStream) -> None:
        """Mark the operations issued on the stream so far."""
        self._runtime.devices.require("event.record")
        with self._runtime.lock:
            self.mark = _Mark(dict(stream.clock), done=False)
            stream.queue.append((self.mark.reach, None))

    def query(self) -> bool:
        """Whether the stream has reached the event. Lets time pass first."""
        self._runtime.devices.require("event.query")
        with self._runtime.lock:
            self._runtime.let_time_pass()
            if self.mark.done:
                self._runtime.host_knows(self.mark.clock)
            return self.mark.done

    def synchronize(self) -> None:
        """Let the host wait for the event."""
        self._runtime.devices.require("event.synchronize")
        with self._runtime.lock:
            mark = self.mark
            self._runtime.waits += 1
            while not mark.done:
                self._runtime.run_one()
            self._runtime.host_knows(mark.clock)

    def __del__(self) -> None:
        self._runtime.devices.note("destroying an event")


def _nothing() -> None:
    pass
