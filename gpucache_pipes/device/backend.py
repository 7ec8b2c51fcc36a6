"""What the store asks of a device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch

Column = tuple[int, int]
"""(offset, nbytes): a stretch of each page, both in bytes. The offset is a multiple of 16."""


class Upload(Protocol):
    """Bytes on their way into pages."""

    def buffers(self, number: int) -> list[memoryview]:
        """Where the bytes of placement `number` go: writable, together as long as its pages."""

    def finish(self) -> None:
        """Everything is written. Gathers that start after this see the bytes."""


@runtime_checkable
class Backend(Protocol):
    """Rows of device memory that are filled by uploads and read by gathers.

    It alone knows streams and events. The store promises that a page is not uploaded to while
    a gather of it is being issued, and not gathered before its upload has finished; that
    device and copy engine run later, in an order of their own, is the backend's to make safe.

    Attributes:
        device: where the pages are, and where gathers put their results.
        page_bytes: size of a page, a multiple of 16; 0 until `configure`.
    """

    device: torch.device
    page_bytes: int

    @property
    def reserved_bytes(self) -> int:
        """Memory of all pages."""

    def configure(self, page_bytes: int) -> None:
        """Set the page size. Called while there are no pages; with the store's lock held."""

    def grow(self, needed: int, useful: int | None) -> int:
        """Add pages: at least `needed`, or none at all if the device has no more memory.

        If `useful` is not None, so many more could serve the cache; where it is not positive,
        there are already -useful pages more than that, for batches in flight. Page ids go on
        from the last. Called with the store's lock held. Returns the number added. Raises
        MemoryError, with what was asked for and what is free, if there is no room for any.
        """

    def upload(self, placements: Sequence[Sequence[int]]) -> Upload:
        """Start to fill pages, a list of them for each feature. Reader threads; no lock held.

        May wait for earlier uploads of the same thread.
        """

    def gather(self, pages: Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """For each column a new contiguous tensor [len(pages), nbytes / itemsize].

        The dtype is whatever moves fastest. On the caller's current stream; no lock held.
        """

    def join(self, placements: Sequence[Sequence[int]]) -> torch.Tensor:
        """The pages of several features end to end, as one new tensor uint8. As `gather`."""

    def memory(self) -> torch.Tensor | None:
        """All pages in a row, uint8, if they are in host memory in one piece: not to be kept."""

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """What enters, in any thread, the stream that is current in this one now."""

    def reset(self) -> None:
        """Give all memory back. No upload or gather is being issued; lock held."""

    def close(self) -> None:
        """Finish what the device still does, then give all memory back."""
