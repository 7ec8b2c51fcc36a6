"""On several streams: while the arena grows, and for as long as one likes."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ACCELERATOR
from edges import new_backend
from gpu_common import ON_CUDA, STRESS_SECONDS, keep_busy, own_stream, rows, wrong_rows

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, Padded, PathLister
from gpucache_pipes.device import growing_arena
from gpucache_pipes.testing.contracts import in_threads

pytestmark = pytest.mark.gpu

WIDTH = 65_536
GROWING_FILES = 4096 if ON_CUDA else 768
"""Of 256 KiB each: many times the first segment of an arena, so that it grows several times."""


def full(path: str) -> torch.Tensor:
    return torch.full((WIDTH,), float(path.rpartition("/")[2]))


@pytest.mark.parametrize("max_cache_bytes", [None, "3GiB"])
@pytest.mark.parametrize("consumers", [1, 4])
def test_batches_are_exact_while_the_arena_grows_under_gathers_of_several_streams(
    consumers: int, max_cache_bytes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a budget it grows by segments, with one it moves. Each consumer has an order of its
    own, and so reads files that are not loaded, which makes the arena grow, while gathers of the
    others read it."""
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 1 << 20)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", 1 << 20)
    wrong: list[int] = []
    sizes: list[int] = []
    with GPUFeatureStore(
        new_backend(), load_fn=full, reader_threads=2, max_cache_bytes=max_cache_bytes
    ) as store:

        def consume(seed: int) -> None:
            order = list(range(GROWING_FILES))
            random.Random(seed).shuffle(order)
            with own_stream():
                found = torch.zeros((), dtype=torch.int64, device=ACCELERATOR)
                for start in range(0, len(order), 16):
                    numbers = order[start : start + 16]
                    batch = store.get_batch([f"/f/{n}" for n in numbers]).collate()
                    keep_busy(200_000)
                    found += wrong_rows(batch, numbers)
                    sizes.append(store.stats().reserved_bytes)
                wrong.append(int(found))

        in_threads(consume, consumers)
        store.check()
    assert wrong == [0] * consumers
    assert max(sizes) > 2 * min(sizes)  # it has grown more than once


def test_stress_of_several_streams_and_consumers_with_a_small_cache() -> None:
    """For GPU_STRESS_SECONDS: pipelines and single calls, evictions, refusals and resets."""
    files: dict[str, Any] = dict(rows(256))
    files |= {f"/r/{n}": torch.full((1 + n % 40, 8), float(n)) for n in range(256)}
    end = time.monotonic() + STRESS_SECONDS
    batches = [0] * 5
    backend = new_backend()
    with GPUFeatureStore(
        backend, load_fn=files.__getitem__, max_cache_bytes=200_000, reader_threads=4
    ) as store:

        def until_the_end(consumer: int, take: Callable[[random.Random], torch.Tensor]) -> None:
            choose = random.Random(consumer)
            with own_stream():
                wrong = torch.zeros((), dtype=torch.int64, device=ACCELERATOR)
                while time.monotonic() < end:
                    if choose.random() < 0.1:
                        keep_busy(choose.randrange(1_000_000))
                    wrong += take(choose)
                    batches[consumer] += 1
                    if batches[consumer] % 500 == 0:
                        assert int(wrong) == 0
                assert int(wrong) == 0

        def plain(choose: random.Random) -> torch.Tensor:
            numbers = [choose.randrange(256) for _ in range(choose.randrange(1, 33))]
            return wrong_rows(store.get_batch([f"/f/{n}" for n in numbers]).collate(), numbers)

        def given_up(choose: random.Random) -> torch.Tensor:
            numbers = [choose.randrange(256) for _ in range(8)]
            pending = store.request([f"/f/{n}" for n in numbers])
            action = choose.randrange(4)
            if action == 0:
                store.cancel([pending])
                return torch.zeros((), dtype=torch.int64, device=ACCELERATOR)
            if action == 1:
                store.release([f"/f/{n}" for n in range(256) if n % 2])
            elif action == 2:
                store.prefetch([f"/r/{choose.randrange(256)}"])
            return wrong_rows(store.collect([pending]).collate(), numbers)

        def pipeline(prefix: str, seed: int, **options: Any) -> Callable[[random.Random], Any]:
            lister = PathLister(
                [f"/{prefix}/{n}" for n in range(256)], batch_size=16, shuffle=True, seed=seed
            )
            order = PathLister(lister.paths, batch_size=16, shuffle=True, seed=seed)
            node = GPUCollator(GPUPrefetcher(lister, store, depth=3), **options)

            def take(choose: random.Random) -> torch.Tensor:
                try:
                    paths = next(order)
                except StopIteration:
                    order.reset()
                    node.reset()
                    paths = next(order)
                numbers = [int(path.rpartition("/")[2]) for path in paths]
                batch = next(node)
                if isinstance(batch, Padded):
                    return wrong_rows(batch.values[:, 0], numbers)
                return wrong_rows(batch, numbers)

            return take

        takes = [plain, plain, given_up, pipeline("f", 1), pipeline("r", 2, ragged="pad")]
        cleared = threading.Event()

        def clear_now_and_then() -> None:
            while not cleared.wait(0.05):
                store.clear()

        clearing = threading.Thread(target=clear_now_and_then)
        clearing.start()
        try:
            in_threads(lambda number: until_the_end(number, takes[number]), len(takes))
        finally:
            cleared.set()
            clearing.join()
        store.check()
    assert all(batches)
