"""Serving: what a store sends of its files to other ranks, as pages."""

import logging
import pickle
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from gpucache_pipes.device import Backend, ExchangeStream
from gpucache_pipes.files import Layout
from gpucache_pipes.peers import Contents
from gpucache_pipes.store.gather import Gatherer
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.shared_cache import SharedCache

_log = logging.getLogger("gpucache_pipes")


class Serving:
    """Packs the files of pending batches for other ranks. For the thread that trains.

    Args:
        shared: the cache.
        backend: has the pages.
        gatherer: gathers them.

    Attributes:
        backend: as given.
        upload: `Gatherer.upload`.
    """

    def __init__(self, shared: SharedCache, backend: Backend, gatherer: Gatherer) -> None:
        self._shared = shared
        self.backend = backend
        self.upload = gatherer.upload
        self._gatherer = gatherer
        self._stream: ExchangeStream | None = None
        self._sendable: WeakKeyDictionary[Layout, bool] = WeakKeyDictionary()

    @property
    def stream(self) -> ExchangeStream:
        """Where rows are packed, and arrive. One for all: memory is kept by stream."""
        if self._stream is None:
            self._stream = self.backend.exchange_stream()
        return self._stream

    def look(self, batch: PendingBatch) -> Contents:
        """Wait for the files of a batch; what is known of them.

        What could not be loaded is left out of what `pack` makes, without a word in the log: who
        needs it reads it itself, and then has the error.
        """
        failed = self._shared.wait(batch)
        if failed:
            _log.info(
                "%d files are not sent to other ranks: %s", len(failed), next(iter(failed.values()))
            )
        cache = self._shared.cache
        which = np.full(len(batch.numbers), -1, np.intp)
        good = np.ones(len(batch.numbers), np.bool_)
        good[[*failed]] = False
        places = cache.entries.place[batch.numbers[good]]
        numbers = cache.layouts.of_places(places)
        if len(numbers) and (numbers == numbers[0]).all():
            known, which[good] = numbers[:1], 0
        else:
            known, which[good] = np.unique(numbers, return_inverse=True)
        layouts = [cache.layouts.layouts[n] for n in known.tolist()]
        values: list[tuple[Any, ...]] = []
        if any(layout.plain for layout in layouts):
            of_entry = cache.entries.values
            values = [of_entry.get(number, ()) for number in batch.numbers.tolist()]
        sendable = np.array([self._can_be_sent(layout) for layout in layouts] + [False])
        sent = sendable[which]
        if values and not _is_pickled(values):
            sent &= [_is_pickled(of_one) for of_one in values]
        if not sent.all():
            which[~sent] = -1
            values = [v if ok else () for v, ok in zip(values, sent.tolist(), strict=False)]
            with self._shared.lock:
                batch.substitutes.update(dict.fromkeys(np.flatnonzero(~sent).tolist()))
        return Contents(layouts, which, values)

    def _can_be_sent(self, layout: Layout) -> bool:
        """Whether other processes can have a layout: its containers may be classes of this one."""
        if layout not in self._sendable:
            self._sendable[layout] = _is_pickled(layout.tree)
        return self._sendable[layout]

    def pack(self, batch: PendingBatch) -> torch.Tensor:
        """The pages of the files of a batch, end to end, uint8; consumes the batch."""
        held: list[int] = []
        use, uses = object(), self._shared.lock.uses
        try:
            return self._gatherer.pack(self._shared.take([batch], held, use))
        finally:
            uses.pop(use, None)
            self._shared.finish([batch], held)


def _is_pickled(value: object) -> bool:
    """Whether a value can be sent to another process."""
    try:
        pickle.dumps(value)
    except Exception:  # whatever its class raises
        return False
    return True
