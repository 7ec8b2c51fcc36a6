"""The edges between streams, on a real device: each holds, and each is needed.

Run by itself, under compute-sanitizer and with other allocators, by test_allocators.py.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edges import (
    LONG,
    keep_copy_stream_busy,
    new_backend,
    without_read_done,
    without_staging_free,
    without_uploaded,
)
from gpu_common import cuda, first_column, rows

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device import AcceleratorBackend

pytestmark = [pytest.mark.gpu, cuda]

SERIAL = itertools.count(1)

# Each work keeps one of the streams busy, so that what does not wait is too early.


def read_while_it_is_uploaded(backend: AcceleratorBackend) -> bool:
    """uploaded: a gather that is issued while the copy stream has not copied yet."""
    # Other values each time: the pages may be where those of an earlier store were.
    base = 100 * next(SERIAL)
    files = {name: row + base for name, row in rows(8).items()}
    with GPUFeatureStore(backend, load_fn=files.__getitem__, asynchronous=False) as store:
        store.warm(list(files)[:4], progress=False)
        torch.accelerator.synchronize()
        keep_copy_stream_busy(backend)
        found = first_column(store.get_batch(list(files)[4:]).collate())
        return found == [base + 4, base + 5, base + 6, base + 7]


def refill_what_is_being_read(backend: AcceleratorBackend) -> bool:
    """read_done: pages that are given to others while a gather of them has not run yet."""
    files = rows(8)
    options: dict[str, Any] = {"max_cache_items": 4, "policy": "lru", "asynchronous": False}
    with GPUFeatureStore(backend, load_fn=files.__getitem__, **options) as store:
        names = list(files)
        store.get_batch(names[:4])
        torch.accelerator.synchronize()
        consumer = torch.cuda.Stream()
        with torch.cuda.stream(consumer):
            torch.cuda._sleep(LONG)
            batch = store.get_batch(names[:4]).collate()
        store.get_batch(names[4:])
        store.get_batch(names[4:])
        consumer.synchronize()
        return first_column(batch) == [0, 1, 2, 3]


def write_to_staging_that_is_being_read(backend: AcceleratorBackend) -> bool:
    """staging_free: host memory that is written to while its copy has not run yet."""
    files = rows(32)
    with GPUFeatureStore(backend, load_fn=files.__getitem__, asynchronous=False) as store:
        names = list(files)
        store.get(names[0])
        torch.accelerator.synchronize()
        keep_copy_stream_busy(backend)
        for start in range(1, 29, 4):
            store.prefetch(names[start : start + 4])
        return first_column(store.get_batch(names[1:29]).collate()) == list(range(1, 29))


EDGES = [
    (read_while_it_is_uploaded, without_uploaded),
    (refill_what_is_being_read, without_read_done),
    (write_to_staging_that_is_being_read, without_staging_free),
]


@pytest.mark.parametrize("work", [work for work, _ in EDGES])
def test_an_edge_holds(work: Callable[..., bool]) -> None:
    assert all(work(new_backend()) for _ in range(5))


@pytest.mark.parametrize(("work", "without"), EDGES)
def test_an_edge_is_needed(
    work: Callable[..., bool], without: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> AcceleratorBackend:
        backend = new_backend()
        without(backend, monkeypatch)
        return backend

    assert not all(work(broken()) for _ in range(5))
