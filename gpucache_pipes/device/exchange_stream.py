"""The stream on which rows are packed for other ranks and theirs arrive, and its edges.

An exchange has a stream of its own, so that it does not wait for the training step that the
consumer has issued, and that step not for it. Rows are packed on it by the gathers of the backend,
which order themselves after uploads. Two more edges order what arrives:

    edge         recorded                              waited on by
    arrived      exchange stream, after the exchange   consumer stream, before it reads the rows
    taken        consumer stream, after it has read    exchange stream, before it allocates again

`arrived` keeps a consumer from reading rows that are not there yet. `taken` is about memory: what
is freed goes back to the stream that allocated it, which may fill it again at once, while the
consumer's stream still reads. So the rows are held here until the exchange stream waits for that
read.

`tests/device/test_exchange_stream.py` removes each edge in turn.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpucache_pipes.device.runtime import Runtime


class ExchangeStream:
    """Where the device operations of an exchange are issued. One thread uses it.

    This class is for devices that run operations in the order in which they are issued, such as
    the CPU. Subclasses are for others.
    """

    @contextlib.contextmanager
    def issuing(self) -> Iterator[None]:
        """A context in which operations are part of the exchange."""
        yield

    def mark(self) -> Any:
        """What marks the operations that were issued within `issuing` so far."""
        return None

    @contextlib.contextmanager
    def taking(self, rows: torch.Tensor, mark: Any) -> Iterator[None]:
        """A context in which the current stream may read `rows`, which had arrived at `mark`."""
        yield


class OwnExchangeStream(ExchangeStream):
    """The same with a stream of a device; see the module docstring.

    Args:
        runtime: of the device.
    """

    def __init__(self, runtime: "Runtime") -> None:
        self._runtime = runtime
        with runtime.on_device():
            self._stream = runtime.new_stream()
        # Rows that a consumer reads, each with the event that follows the read.
        self._taken: list[tuple[Any, torch.Tensor]] = []

    @contextlib.contextmanager
    def issuing(self) -> Iterator[None]:
        """See ExchangeStream."""
        with self._runtime.on(self._stream):
            self._reuse_memory()
            yield

    def _reuse_memory(self) -> None:
        taken, self._taken = self._taken, []
        for event, _ in taken:
            self._stream.wait_event(event)  # edge: taken

    def mark(self) -> Any:
        """See ExchangeStream."""
        event = self._runtime.new_event()
        event.record(self._stream)
        return event

    @contextlib.contextmanager
    def taking(self, rows: torch.Tensor, mark: Any) -> Iterator[None]:
        """See ExchangeStream."""
        with self._runtime.on_device():
            stream = self._runtime.current_stream()
            self._wait_for(stream, mark)
            try:
                yield
            finally:
                event = self._runtime.new_event()
                event.record(stream)
                self._taken.append((event, rows))

    def _wait_for(self, stream: Any, mark: Any) -> None:
        stream.wait_event(mark)  # edge: arrived
