"""Loading files before they are asked for, until the budget is used up."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from gpucache_pipes.cache import Cache
from gpucache_pipes.files import PathLike
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.requests import RequestManager

_FILES = 256
"""In a part: two of them are on their way at a time."""


def warm(
    desk: RequestManager,
    cache: Cache,
    resolve: Callable[[Sequence[PathLike]], list[int]],
    paths: Sequence[PathLike],
    progress: bool,
) -> int:
    """See GPUFeatureStore.warm. `resolve` gives the numbers of paths."""
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"a sequence of paths is needed, not the single path {paths!r}")
    paths = list(paths)
    ahead: deque[PendingBatch] = deque()
    full = False
    with tqdm(total=len(paths), desc="warming", unit="file", disable=not progress) as bar:
        try:
            for start in range(0, len(paths), _FILES):
                if full or not cache.ledger.fits(1, 1):
                    break
                part = resolve(paths[start : start + _FILES])
                ahead.append(desk.request(part, warming=True))
                if len(ahead) > 1:
                    full = not _finish(desk, cache, ahead.popleft(), bar)
            while ahead:
                _finish(desk, cache, ahead.popleft(), bar)
        finally:
            desk.cancel(ahead)
    numbers = resolve(paths)
    with desk.lock:
        desk.require_open()
        return sum(cache.entries[number].cached for number in set(cache.entries.current(numbers)))


def _finish(desk: RequestManager, cache: Cache, ticket: PendingBatch, bar: Any) -> bool:
    """Wait for a part; whether all of it could be kept."""
    with desk.lock:
        desk.wait_for([ticket])
        kept = all(cache.entries[number].cached for number in ticket.numbers)
    desk.cancel([ticket])
    bar.update(len(ticket.numbers))
    return kept
