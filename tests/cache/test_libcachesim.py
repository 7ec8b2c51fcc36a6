"""Policies have the same hits as in libCacheSim, by the authors of SIEVE and S3-FIFO."""

from collections.abc import Iterable

import pytest
from test_policies import shuffled, weighted

from gpucache_pipes.cache import simulate

libcachesim = pytest.importorskip("libcachesim", reason="it has wheels for Linux only")

PAIRS = {"lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "sieve": "Sieve", "s3fifo": "S3FIFO"}


def their_hits(name: str, trace: Iterable[int], places: int) -> int:
    cache = getattr(libcachesim, name)(places)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = 0
    for key in trace:
        request.obj_id = key + 1
        hits += cache.get(request)
    return hits


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("places", [100, 250, 500])
def test_equals_libcachesim(name: str, places: int) -> None:
    for epochs in (shuffled(range(1000), 5), weighted(1000, 5, 0.8), [[*range(600)]] * 3):
        trace = [key for epoch in epochs for key in epoch]
        assert simulate(trace, places, name).hits == their_hits(PAIRS[name], trace, places)
