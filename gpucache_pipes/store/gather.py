"""From pinned pages to a batch."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.batches import (
    ColumnBatch,
    FeatureBatch,
    PageBatch,
    RaggedOptions,
    SampleBatch,
    collate_parts,
    to_device,
)
from gpucache_pipes.cache import LAYOUT_SHIFT, Cache, Numbers, first_pages, runs_of
from gpucache_pipes.device import Backend
from gpucache_pipes.files import ALIGNMENT, Layout, LoadedFeature, Parts, PathLike

_REMEMBERED = 64
"""Layouts whose byte ranges are remembered."""


class Taken(NamedTuple):
    """The contents of a batch that is about to be gathered.

    Attributes:
        numbers: of the entries.
        paths: of their files, absolute.
        places: of the entries; those of substituted ones are NOWHERE.
        substitutes: by position, features that replace entries that could not be loaded.
    """

    numbers: Numbers
    paths: Sequence[PathLike]
    places: NDArray[np.int64]
    substitutes: Mapping[int, LoadedFeature]

    def part(self, number: int, of: int) -> "Taken":
        """One of the parts of equal length that follow each other."""
        count = len(self.numbers) // of
        start = number * count
        within = slice(start, start + count)
        substitutes = {
            at - start: feature
            for at, feature in self.substitutes.items()
            if start <= at < start + count
        }
        return Taken(self.numbers[within], self.paths[within], self.places[within], substitutes)


class Gatherer:
    """Gathers READY entries, in the thread that calls and on its current stream.

    Reads the cache without the lock. That is safe because the entries are pinned until the caller
    is done: no other thread changes where the pages of a pinned READY entry are, its layout or its
    values; and the tables of these are only added to.
    """

    def __init__(self, cache: Cache, backend: Backend) -> None:
        self._cache = cache
        self._backend = backend
        # By the number of a layout, which may be used again: the layout, and the byte ranges of its
        # leaves. Only added to, and replaced.
        self._extents_of: dict[int, tuple[Layout, list[tuple[int, int]]]] = {}

    def gather(self, taken: Taken) -> FeatureBatch:
        """The batch. Takes a few device operations, whatever is in it."""
        if taken.substitutes:
            return self._gather_with_substitutes(taken)
        alike = self._one_layout(taken)
        if alike is not None and self._cache.layouts.pages[alike] <= 1:
            return self._gather_columns(taken, alike)
        layouts, counts = self._layouts_of(taken, alike)
        block = self._pages(taken.places, counts, taken.numbers)
        begins = self._backend.page_bytes * (np.cumsum(counts) - counts)
        starts = [*begins.tolist(), len(block)]
        return PageBatch(
            self._backend.device, taken.paths, layouts, self._values(taken), block, starts
        )

    def collate(self, taken: Taken, ragged: RaggedOptions) -> Any:
        """The same as `gather(taken).collate(ragged)`, with a copy less where that is possible.

        On the host, features of different lengths are copied to their places in the batch straight
        from the pages.
        """
        memory = self._backend.memory()
        if memory is None or taken.substitutes or self._one_layout(taken) is not None:
            return self.gather(taken).collate(ragged)
        if not len(taken.places) or taken.places.min() < 0:
            return self.gather(taken).collate(ragged)
        layouts, _ = self._layouts_of(taken, None)
        if not ragged.copies or len({layout.kind for layout in layouts}) != 1:
            return self.gather(taken).collate(ragged)
        starts = (first_pages(taken.places) * self._backend.page_bytes).tolist()
        in_place = PageBatch(
            self._backend.device, taken.paths, layouts, self._values(taken), memory, starts
        )
        return in_place.collate(ragged)

    def join(self, taken: Taken, parts: Parts, ragged: RaggedOptions | None) -> Any:
        """A batch of samples of several files, gathered part by part; with `ragged` collated."""
        each = [taken.part(number, len(parts)) for number in range(len(parts))]
        if ragged is None:
            return SampleBatch(parts, [self.gather(part) for part in each])
        collate = [partial(self.collate, part) for part in each]
        return collate_parts(parts, collate, ragged.drawn(len(each[0].numbers)))

    def _one_layout(self, taken: Taken) -> int | None:
        """The number of the layout of all features, if they have one and lie in runs of pages."""
        places, cache = taken.places, self._cache
        if not len(places):
            return None
        if len(cache.layouts) == 1 and not cache.entries.scattered:
            return 0
        least = int(places.min())
        number = least >> LAYOUT_SHIFT
        return number if least >= 0 and int(places.max()) >> LAYOUT_SHIFT == number else None

    def _layouts_of(
        self, taken: Taken, alike: int | None
    ) -> tuple[list[Layout], NDArray[np.int64]]:
        """The layout of each feature, or the one of all, and how many pages each has."""
        table = self._cache.layouts
        if alike is not None:
            return [table.layouts[alike]], np.repeat(table.pages[alike], len(taken.places))
        numbers = table.of_places(taken.places)
        layouts: list[Layout] = list(map(table.layouts.__getitem__, numbers.tolist()))
        if layouts and layouts.count(layouts[0]) == len(layouts):
            layouts = layouts[:1]
        return layouts, table.pages[numbers]

    def _values(self, taken: Taken) -> list[tuple[Any, ...]]:
        values = self._cache.entries.values
        return [values.get(number, ()) for number in taken.numbers.tolist()] if values else []

    def pack(self, taken: Taken) -> torch.Tensor:
        """The pages of all features that have no substitute, end to end, uint8."""
        table = self._cache.layouts
        counts = table.pages[table.of_places(taken.places)]
        return self._pages(taken.places, counts, taken.numbers)

    def _pages(
        self, places: NDArray[np.int64], counts: NDArray[np.int64], numbers: Numbers
    ) -> torch.Tensor:
        """The pages of the features in these places, of which each has so many, end to end."""
        runs = runs_of(places, counts, numbers, self._cache.entries.scattered)
        return self._backend.join(*runs) if len(runs[0]) else self._no_bytes()

    def _no_bytes(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._backend.device)

    def _gather_columns(self, taken: Taken, number: int) -> ColumnBatch:
        """One contiguous tensor [B, *shape] for each leaf, by one gather each."""
        backend = self._backend
        layout: Layout = self._cache.layouts.layouts[number]
        pages = taken.places - (number << LAYOUT_SHIFT) if number else taken.places
        count = len(pages)
        known, extents = self._extents_of.get(number, (None, []))
        if known is not layout:
            extents = [(leaf.offset, leaf.nbytes) for leaf in layout.leaves if leaf.nbytes]
            if len(self._extents_of) >= _REMEMBERED:
                self._extents_of = {}
            self._extents_of[number] = layout, extents
        gathered = iter(backend.gather(pages, extents) if extents else ())
        columns = []
        for dtype, shape, _, nbytes in layout.leaves:
            if not nbytes:
                columns.append(torch.empty(count, *shape, dtype=dtype, device=backend.device))
                continue
            column = next(gathered)
            if column.dtype is not dtype:
                column = column.view(dtype)
            columns.append(column if len(shape) == 1 else column.view(count, *shape))
        values = self._values(taken) if layout.plain else ()
        return ColumnBatch(backend.device, taken.paths, layout, values, columns)

    def _gather_with_substitutes(self, taken: Taken) -> PageBatch:
        """The same where features come from the host: one by one, since that is rare."""
        table, entries, backend = self._cache.layouts, self._cache.entries, self._backend
        numbers = taken.numbers.tolist()
        held = [at for at in range(len(numbers)) if at not in taken.substitutes]
        of_entry = dict(zip(held, table.of_places(taken.places[held]).tolist(), strict=True))
        layouts: list[Layout] = []
        values: list[tuple[Any, ...]] = []
        pieces: list[torch.Tensor] = []
        for at, number in enumerate(numbers):
            substitute = taken.substitutes.get(at)
            if substitute is not None:
                layouts.append(substitute.layout)
                values.append(substitute.values)
                pieces.append(self.upload(substitute, entries.paths[number]))
                continue
            layouts.append(table.layouts[of_entry[at]])
            values.append(entries.values.get(number, ()))
            one = slice(at, at + 1)
            counts = table.pages[[of_entry[at]]]
            pieces.append(self._pages(taken.places[one], counts, taken.numbers[one]))
        starts = list(accumulate((len(piece) for piece in pieces), initial=0))
        return PageBatch(backend.device, taken.paths, layouts, values, torch.cat(pieces), starts)

    def upload(self, feature: LoadedFeature, path: str) -> torch.Tensor:
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
