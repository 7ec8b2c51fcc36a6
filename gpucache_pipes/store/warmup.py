"""Loading files before they are requested, until the budget is used up."""

import os
from collections import deque
from collections.abc import Sequence
from typing import Any

from gpucache_pipes.cache import distinct
from gpucache_pipes.files import PathLike, as_samples
from gpucache_pipes.files.listing import find_files
from gpucache_pipes.store.pending_batch import PendingBatch
from gpucache_pipes.store.progress import progress_bar
from gpucache_pipes.store.requests import RequestManager
from gpucache_pipes.store.shared_cache import SharedCache

_FILES = 256
"""Files in a part. Two parts are loading at a time."""


def warm_up(
    requests: RequestManager, shared: SharedCache, paths: Sequence[PathLike], progress: bool
) -> int:
    """See GPUFeatureStore.warm."""
    if isinstance(paths, (str, os.PathLike)):
        paths = find_files(paths, "*.pt", recursive=False)
    own_paths = getattr(paths, "own_paths", None)
    samples = as_samples(paths)
    if samples is not None:
        paths = samples.paths
    paths = list(paths if own_paths is None else own_paths())
    shared.memory.expect_files(warm_up, len(paths))
    parts: deque[PendingBatch] = deque()
    full = False
    with progress_bar(total=len(paths), desc="warming", unit="file", shown=progress) as bar:
        try:
            for start in range(0, len(paths), _FILES):
                if full or not requests.has_room():
                    break
                parts.append(requests.request(paths[start : start + _FILES], warmup=True))
                if len(parts) > 1:
                    full = not _finish(requests, shared, parts.popleft(), bar)
            while parts:
                _finish(requests, shared, parts.popleft(), bar)
        finally:
            requests.cancel(parts)
    return requests.cached(paths)


def _finish(requests: RequestManager, shared: SharedCache, part: PendingBatch, bar: Any) -> bool:
    """Wait for a part; whether all of it is cached. Raises the first error."""
    for error in requests.wait(part).values():
        raise error
    all_cached = requests.count_cached(part.numbers) == len(distinct(part.numbers))
    requests.cancel([part])
    bar.update(len(part.numbers))
    return all_cached
