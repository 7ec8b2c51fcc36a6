"""Logs of the operations that a device has been given and may not have finished."""

import threading
from collections import deque
from typing import Any

from gpucache_pipes.device.backend import Pages
from gpucache_pipes.device.runtime import Runtime


class Operation:
    """An operation that the device may not have finished.

    Attributes:
        event: marks its end; None once the device is known to have reached it.
        pages: the pages it touches; None means every page.
        held: what it reads, so that its memory is not freed before the operation is finished.
    """

    __slots__ = ("event", "held", "pages")

    def __init__(self, event: Any, pages: Pages | None, held: object) -> None:
        self.event = event
        self.pages = pages
        self.held = held

    def synchronize(self) -> None:
        """Let the host wait until the device has finished the operation."""
        event = self.event
        if event is not None:
            event.synchronize()


class OperationLog:
    """Operations of one kind, by stream, each with its event and the pages that it touches.

    A stream finishes its operations in order, so a look stops at the first unfinished one of each
    stream. Events of finished operations are used again: making and destroying one takes longer
    than recording it.

    All methods are called with the device current in the calling thread. Thread-safe.

    Args:
        events: where events come from; shared by the logs of a backend.
    """

    def __init__(self, events: "EventPool") -> None:
        self._events = events
        self._lock = events.lock
        self._streams: dict[Any, deque[Operation]] = {}

    def add(self, stream: Any, pages: Pages | None, held: object = None) -> Operation:
        """Add the operation that has just been issued on `stream`."""
        with self._lock:
            finished = self._take_finished()
            operation = Operation(self._events.record(stream), pages, held)
            self._streams.setdefault(stream, deque()).append(operation)
        _release(finished)
        return operation

    def hold_back(self, stream: Any, pages: Pages) -> None:
        """Make `stream` wait for the unfinished operations that touch `pages`."""
        with self._lock:
            finished = self._take_finished()
            mine = set(pages.tolist() if self._streams else ())
            # Under the lock: another thread must not use an event again before it is waited for.
            for operations in self._streams.values():
                for operation in operations:
                    if operation.pages is None or not mine.isdisjoint(operation.pages.tolist()):
                        stream.wait_event(operation.event)
        _release(finished)

    def forget_finished(self) -> None:
        """Drop what the device has finished, and what that held."""
        with self._lock:
            finished = self._take_finished()
        _release(finished)

    def _take_finished(self) -> list[Operation]:
        """Take out the operations that the device has finished, and use their events again."""
        finished: list[Operation] = []
        for stream, operations in list(self._streams.items()):
            while operations and operations[0].event.query():
                operation = operations.popleft()
                # Nobody waits for the event any more, before it marks something else.
                event, operation.event = operation.event, None
                self._events.give_back(event)
                finished.append(operation)
            if not operations:
                del self._streams[stream]
        return finished

    def synchronize(self) -> None:
        """Let the host wait for all operations, and drop them."""
        with self._lock:
            unfinished = [operation for each in self._streams.values() for operation in each]
        # Without the lock: other threads go on meanwhile.
        for operation in unfinished:
            operation.synchronize()
        self.forget_finished()

    def clear(self) -> None:
        """Drop all operations, finished or not."""
        with self._lock:
            self._streams.clear()


def _release(finished: list[Operation]) -> None:
    """Let go of what operations held. Without the lock: it may be an arena, which takes long."""
    for operation in finished:
        operation.held = None


class EventPool:
    """Events that are not in use.

    Attributes:
        lock: guards the pool, and the logs that share it. Nothing is waited for under it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._free: list[Any] = []
        self.lock = threading.Lock()

    def record(self, stream: Any) -> Any:
        """An event that marks what has been issued on `stream` so far."""
        try:
            event = self._free.pop()
        except IndexError:
            event = self._runtime.new_event()
        event.record(stream)
        return event

    def give_back(self, event: Any) -> None:
        """The event is finished, and no stream will wait for it any more."""
        self._free.append(event)

    def clear(self) -> None:
        """Destroy the events that are not in use. With the device current."""
        self._free.clear()
