"""The interface between the store and a device: `Backend` and `Upload`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.device.exchange_stream import ExchangeStream

Pages = npt.NDArray[np.int64]
"""Page numbers, 1-D."""

Column = tuple[int, int]
"""(offset, nbytes): a byte range of every page. The offset is a multiple of 16."""


class Upload(Protocol):
    """Bytes on their way into pages. Used by the reader thread that made it, and by no other."""

    def buffers(self, number: int) -> list[memoryview]:
        """Writable memory for the bytes of placement `number`, together as long as its pages.

        The backend owns the memory. The caller writes to it before `finish` and not after.
        """

    def memory(self) -> tuple[memoryview | None, npt.NDArray[np.int64]]:
        """Memory that holds the buffers of all placements, and where each of them begins in it.

        -1 for a placement whose buffers do not lie in a row. None if there is no such memory.
        """
        return None, np.empty(0, np.int64)

    def finish(self) -> None:
        """Submit the written bytes. Gathers that start after this see them.

        Called at most once. May raise RuntimeError if the backend was reset meanwhile.
        """


@runtime_checkable
class Backend(Protocol):
    """Pages of device memory that uploads fill and gathers read.

    Subclass it for a backend of your own.

    Only the backend knows about streams and events. The store guarantees that it uploads to no page
    while a gather of that page is being issued, and that it gathers no page before its upload has
    finished. The device runs both later and in its own order; making that safe is up to the
    backend.

    Attributes:
        device: where the pages and the results of gathers are.
        page_bytes: size of a page, a multiple of 16. 0 before `configure` and after `reset`.
        shares_memory: whether a model uses the same memory: then `grow` looks at `known`, and
            `balance`, `shrink` and `rebuild` leave the model what it needs.
    """

    device: torch.device
    page_bytes: int
    shares_memory: bool = False

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all pages."""

    def total_bytes(self) -> int | None:
        """Bytes of memory that this process may use at most; None if unknown."""
        return None

    def memory_is_host(self) -> bool:
        """Whether pages are in host memory, so that a tier in host memory would gain nothing."""
        return False

    def configure(self, page_bytes: int) -> None:
        """Set the page size. Called while there are no pages, with the store's lock held."""

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        """Add pages: at least `needed`, or none if the device has no more memory.

        Called with the store's lock held. New pages continue the numbers of the existing ones.

        Args:
            needed: pages that a batch needs now.
            useful: how many more pages the budget of the cache and batches in flight can use. If it
                is not positive, there are already -useful pages beyond that. None means that there
                is no budget.
            known: how many more pages all known files need; None if that is not known.

        Returns:
            The number of pages added; 0 if there is no more memory.

        Raises:
            MemoryError: there are no pages yet, and no memory for `needed`. The text says how much
                was requested and how much is free.
        """

    def upload(self, placements: Sequence[Sequence[int]]) -> Upload:
        """Start to fill pages. Called by reader threads, with no lock held.

        May wait for earlier uploads of the same thread.

        Args:
            placements: the pages of each feature.

        Returns:
            The upload, which belongs to the calling thread.
        """

    def gather(self, pages: Pages | Sequence[int], columns: Sequence[Column]) -> list[torch.Tensor]:
        """For each column a new contiguous tensor [len(pages), nbytes / itemsize].

        Called by consumers with no lock held, and issued on their current stream. The caller owns
        the results.

        Args:
            pages: page numbers, in the order of the rows.
            columns: byte ranges of a page.

        Returns:
            Tensors of the dtype that moves these bytes fastest; the caller views them as another.
        """

    def join(self, first: Pages, counts: Pages) -> torch.Tensor:
        """Stretches of consecutive pages end to end, as one new 1-D uint8 tensor.

        Called, issued and owned as for `gather`.

        Args:
            first: the first page of each stretch.
            counts: how many pages each of them has, at least 1.
        """
        ends = np.cumsum(counts)
        pages = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - ends + counts, counts)
        [block] = self.gather(pages, [(0, self.page_bytes)])
        return block.view(torch.uint8).view(-1)

    def memory(self) -> torch.Tensor | None:
        """All pages as one 1-D uint8 tensor if they are contiguous host memory, else None.

        It is a view: the caller must not keep it beyond the current call.
        """

    def bind_stream(self) -> Callable[[], AbstractContextManager[Any]]:
        """Remember the stream that is current in the calling thread.

        Returns:
            A callable. The context manager that it returns makes that stream current, in any
            thread.
        """

    def exchange_stream(self) -> ExchangeStream:
        """Where to pack rows for other ranks, and to take theirs. For one thread."""
        return ExchangeStream()

    def index(self, numbers: Pages) -> torch.Tensor:
        """A new int64 tensor on the device, on the current stream of the calling thread."""
        return torch.from_numpy(np.array(numbers, np.int64)).to(self.device)

    # What follows concerns devices that a model shares. A backend may leave it as it is.

    @property
    def staging_bytes(self) -> int:
        """Bytes of page-locked host memory for uploads."""
        return 0

    def bind_thread(self) -> None:
        """Make the device the current one of a reader thread. Called once, when it starts."""
        return

    def drain(self) -> None:
        """Wait until all uploads and gathers have finished. Called while nothing is issued."""
        return

    def balance(self) -> int:
        """How many pages more (positive) or less (negative) the device can hold beside the model.

        Called now and then if the cache has no budget, with the store's lock held. 0 leaves the
        arena as it is. A negative number is what `shrink` can free at the end of the arena.
        """
        return 0

    def shrink(self, pages: int) -> None:
        """Free all pages but the first `pages`, as `balance` has asked for.

        Called with the store's lock held, while no upload and no gather of the others is issued.
        """
        raise TypeError(f"{type(self).__name__} cannot free {pages} pages")

    def rebuild(self, pages: Sequence[int]) -> None:
        """Keep these pages only, at least one, which are 0, 1, ... from now on. Free all others.

        Called with the store's lock held, while no upload and no gather is issued.

        Raises:
            torch.OutOfMemoryError: there is no memory to copy them to. Nothing has changed.
        """
        raise TypeError(f"{type(self).__name__} cannot keep {len(pages)} pages only")

    def reset(self) -> None:
        """Free all memory.

        Called with the store's lock held, while no upload and no gather is being issued. Results
        of earlier gathers stay valid.
        """

    def close(self) -> None:
        """Wait until the device has finished all uploads and gathers, then free all memory.

        May be called again.
        """
