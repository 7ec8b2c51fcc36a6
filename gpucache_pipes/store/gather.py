"""From pinned pages to a batch."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from gpucache_pipes.batches import (
    ColumnBatch,
    FeatureBatch,
    PageBatch,
    RaggedOptions,
    to_device,
)
from gpucache_pipes.cache import LAYOUT_SHIFT, Cache
from gpucache_pipes.device import Backend
from gpucache_pipes.files import ALIGNMENT, Layout, LoadedFeature, PathLike


class Taken(NamedTuple):
    """The contents of a batch that is about to be gathered.

    Attributes:
        numbers: of the entries.
        paths: of their files, absolute.
        rows: theirs, as `Cache.rows` has them, if all have one.
        substitutes: by position, features that replace entries that could not be loaded.
    """

    numbers: Sequence[int]
    paths: Sequence[PathLike]
    rows: Sequence[int] | None
    substitutes: Mapping[int, LoadedFeature]


class Gatherer:
    """Gathers READY entries, in the thread that calls and on its current stream.

    Reads the cache without the lock. That is safe because the entries are pinned until the caller
    is done: no other thread writes to a pinned READY entry but to stop caching it, which leaves
    its pages, layout and values alone; and the tables are only added to.
    """

    def __init__(self, cache: Cache, backend: Backend) -> None:
        self._cache = cache
        self._backend = backend

    def gather(self, taken: Taken) -> FeatureBatch:
        """The batch. Takes a few device operations, whatever is in it."""
        if taken.substitutes:
            return self._gather_with_substitutes(taken)
        rows = taken.rows
        if rows and self._have_one_layout(rows):
            return self._gather_columns(taken, rows)
        entries = [self._cache.entries[number] for number in taken.numbers]
        layouts: list[Layout] = [entry.layout for entry in entries]
        if layouts and layouts.count(layouts[0]) == len(layouts):
            layouts = layouts[:1]
        placements = [entry.pages for entry in entries]
        page_bytes = self._backend.page_bytes
        starts = [page_bytes * n for n in accumulate(map(len, placements), initial=0)]
        return PageBatch(
            self._backend.device,
            taken.paths,
            layouts,
            [entry.values for entry in entries],
            self._join(placements) if starts[-1] else self._no_bytes(),
            starts,
        )

    def collate(self, taken: Taken, ragged: RaggedOptions) -> Any:
        """The same as `gather(taken).collate(ragged)`, with a copy less where that is possible.

        On the host, features of different lengths are copied to their places in the batch straight
        from the pages.
        """
        memory = self._backend.memory()
        alike = taken.rows and self._have_one_layout(taken.rows)
        if memory is None or alike or taken.substitutes or not ragged.copies:
            return self.gather(taken).collate(ragged)
        entries = [self._cache.entries[number] for number in taken.numbers]
        layouts: list[Layout] = [entry.layout for entry in entries]
        runs = [entry.pages for entry in entries if isinstance(entry.pages, range)]
        kinds = {layout.kind for layout in layouts}
        if len(runs) < len(entries) or len(kinds) != 1 or layouts.count(layouts[0]) == len(layouts):
            return self.gather(taken).collate(ragged)
        page_bytes = self._backend.page_bytes
        in_place = PageBatch(
            self._backend.device,
            taken.paths,
            layouts,
            [entry.values for entry in entries],
            memory,
            [run.start * page_bytes for run in runs],
        )
        return in_place.collate(ragged)

    def _join(self, placements: Sequence[Sequence[int]]) -> torch.Tensor:
        if all(type(pages) is range for pages in placements):
            first = np.array([pages[0] if pages else 0 for pages in placements])
            counts = np.array([len(pages) for pages in placements])
            return self._backend.join(first[counts > 0], counts[counts > 0])
        single = np.array([page for pages in placements for page in pages])
        return self._backend.join(single, np.ones(len(single), np.int64))

    def _no_bytes(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._backend.device)

    def _have_one_layout(self, rows: Sequence[int]) -> bool:
        return (
            len(self._cache.layouts) == 1 or min(rows) >> LAYOUT_SHIFT == max(rows) >> LAYOUT_SHIFT
        )

    def _gather_columns(self, taken: Taken, rows: Sequence[int]) -> ColumnBatch:
        """One contiguous tensor [B, *shape] for each leaf, by one gather each."""
        cache, backend = self._cache, self._backend
        number_of_layout = rows[0] >> LAYOUT_SHIFT
        layout: Layout = cache.layouts[number_of_layout]
        base = number_of_layout << LAYOUT_SHIFT
        pages = [row - base for row in rows] if base else rows
        extents = [(leaf.offset, leaf.nbytes) for leaf in layout.leaves if leaf.nbytes]
        gathered = iter(backend.gather(pages, extents))
        count = len(pages)
        columns = []
        for dtype, shape, _, nbytes in layout.leaves:
            if not nbytes:
                columns.append(torch.empty(count, *shape, dtype=dtype, device=backend.device))
                continue
            column = next(gathered).view(dtype)
            columns.append(column if len(shape) == 1 else column.view(count, *shape))
        values = [cache.entries[n].values for n in taken.numbers] if layout.plain else ()
        return ColumnBatch(backend.device, taken.paths, layout, values, columns)

    def _gather_with_substitutes(self, taken: Taken) -> PageBatch:
        """The same where features come from the host: one by one, since that is rare."""
        entries, backend = self._cache.entries, self._backend
        layouts: list[Layout] = []
        values: list[tuple[Any, ...]] = []
        pieces: list[torch.Tensor] = []
        for position, number in enumerate(taken.numbers):
            substitute = taken.substitutes.get(position)
            feature: Any = entries[number] if substitute is None else substitute
            layouts.append(feature.layout)
            values.append(feature.values)
            if substitute is not None:
                pieces.append(self._upload(substitute, entries[number].path))
            elif feature.pages:
                pieces.append(self._join([feature.pages]))
            else:
                pieces.append(self._no_bytes())
        starts = list(accumulate((len(piece) for piece in pieces), initial=0))
        return PageBatch(backend.device, taken.paths, layouts, values, torch.cat(pieces), starts)

    def _upload(self, feature: LoadedFeature, path: str) -> torch.Tensor:
        """The bytes of a feature on the device. Raises MemoryError, naming `path`."""
        # Rounded up: the next feature must begin at a multiple of its alignment.
        try:
            held = bytearray(-(-feature.layout.span // ALIGNMENT) * ALIGNMENT)
        except (MemoryError, OverflowError) as error:
            raise MemoryError(
                f"the feature that replaces {path!r} has {feature.layout.span} bytes"
            ) from error
        if not held:
            return self._no_bytes()
        feature.read_into([memoryview(held)])
        block: torch.Tensor = to_device(
            torch.frombuffer(held, dtype=torch.uint8), self._backend.device
        )
        return block
