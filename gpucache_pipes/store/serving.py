"""Serving: what a store sends of its files to other ranks, as pages."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.cache import runs_of
from gpucache_pipes.device import Backend
from gpucache_pipes.peers import Contents
from gpucache_pipes.store.gather import Gatherer
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.shared_cache import SharedCache


class Serving:
    """Packs the files of pending batches for other ranks. For the thread that trains.

    Args:
        shared: the cache.
        backend: has the pages.
        gatherer: has `upload`.

    Attributes:
        backend: as given.
        upload: `Gatherer.upload`.
    """

    def __init__(self, shared: SharedCache, backend: Backend, gatherer: Gatherer) -> None:
        self._shared = shared
        self.backend = backend
        self.upload = gatherer.upload

    def look(self, batch: PendingBatch) -> Contents:
        """Wait for the files of a batch; what is known of them.

        What could not be loaded is left out of what `pack` makes, without a word in the log: who
        needs it reads it itself, and then has the error.
        """
        failed = [*self._shared.wait(batch)]
        cache = self._shared.cache
        which = np.full(len(batch.numbers), -1, np.intp)
        good = np.ones(len(batch.numbers), np.bool_)
        good[failed] = False
        if failed:
            with self._shared.lock:
                batch.substitutes.update(dict.fromkeys(failed))
        places = cache.entries.place[batch.numbers[good]]
        known, which[good] = np.unique(cache.layouts.of_places(places), return_inverse=True)
        layouts = [cache.layouts.layouts[n] for n in known.tolist()]
        values: list[tuple[Any, ...]] = []
        if any(layout.plain for layout in layouts):
            of_entry = cache.entries.values
            values = [of_entry.get(number, ()) for number in batch.numbers.tolist()]
        return Contents(layouts, which, values)

    def pack(self, batch: PendingBatch) -> torch.Tensor:
        """The pages of the files of a batch, end to end, uint8; consumes the batch."""
        held: list[int] = []
        use, uses, cache = object(), self._shared.lock.uses, self._shared.cache
        try:
            taken = self._shared.take([batch], held, use)
            layouts = cache.layouts.of_places(taken.places)
            counts: NDArray[np.int64] = cache.layouts.pages[layouts]
            first, lengths = runs_of(taken.places, counts, taken.numbers, cache.entries.scattered)
            if not len(first):
                return torch.empty(0, dtype=torch.uint8, device=self.backend.device)
            return self.backend.join(first, lengths)
        finally:
            uses.pop(use, None)
            self._shared.finish([batch], held)
