"""The three edges of `device.accelerator`, on a simulated device that runs operations late."""

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchdata.nodes as tn
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import (
    AcceleratorBackend,
    InOrderRuntime,
    accelerator,
    growing_arena,
)
from gpucache_pipes.device.operations import OperationLog
from gpucache_pipes.device.staging import StagingLane
from gpucache_pipes.testing import SimulatedRuntime, UnorderedAccessError, assert_same
from gpucache_pipes.testing.contracts import in_threads

FILES = {
    f"/f/{n}.pt": {"feature": torch.full((40,), float(n)), "label": torch.tensor([n])}
    for n in range(12)
}
PATHS = list(FILES)


def work(runtime: SimulatedRuntime, seed: int, steps: int = 80) -> None:
    """Two consumer streams share a small cache; batches are compared many steps later."""
    choose = random.Random(seed)
    streams = [runtime.new_stream() for _ in range(2)]
    held: list[tuple[Any, list[int], Any]] = []
    with GPUFeatureStore(
        AcceleratorBackend(runtime),
        load_fn=FILES.__getitem__,
        max_cache_items=4,
        policy="lru",
        asynchronous=False,
    ) as store:
        for _ in range(steps):
            wanted = [choose.randrange(8) for _ in range(3)]
            for stream in choose.sample(streams, choose.randint(1, 2)):
                with runtime.on(stream):
                    batch = store.get_batch([PATHS[n] for n in wanted]).collate()
                held.append((batch, wanted, stream))
            while len(held) > 12:
                look_at(runtime, *held.pop(0))
        store.check()


def look_at(runtime: SimulatedRuntime, batch: Any, wanted: list[int], stream: Any) -> None:
    with runtime.on(stream):
        assert batch["label"].flatten().tolist() == wanted
        assert batch["feature"].cpu()[:, 7].tolist() == wanted


@pytest.mark.parametrize("seed", range(20))
def test_every_access_is_in_order(seed: int) -> None:
    work(SimulatedRuntime(seed, haste=(0, 0.3, 0.7)[seed % 3]), seed)


def forget_uploads(backend: AcceleratorBackend, lane: Any) -> None:
    backend._uploads.hold_back = no_edge  # type: ignore[method-assign]


def forget_gathers(backend: AcceleratorBackend, lane: Any) -> None:
    backend._gathers.hold_back = no_edge  # type: ignore[method-assign]


def no_edge(stream: Any, pages: Any) -> None:
    """Wait for nothing."""


def forget_that_staging_is_read(backend: AcceleratorBackend, lane: pytest.MonkeyPatch) -> None:
    lane.setattr(StagingLane, "busy_until", lambda self, upload: None)


def one_event_for_each_page(backend: AcceleratorBackend, lane: Any) -> None:
    """One event for each page: a second gather replaces the first one."""
    log = backend._gathers
    add = log.add

    def add_last(stream: Any, pages: Any, held: Any = None) -> Any:
        for operations in log._streams.values():
            for earlier in operations:
                assert earlier.pages is not None
                earlier.pages = np.setdiff1d(earlier.pages, pages)
        return add(stream, pages, held)

    log.add = add_last  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "drop",
    [forget_uploads, forget_gathers, forget_that_staging_is_read, one_event_for_each_page],
)
def test_no_edge_can_be_left_out(
    drop: Callable[..., None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AcceleratorBackend.__init__

    def without(backend: AcceleratorBackend, runtime: Any) -> None:
        original(backend, runtime)
        drop(backend, monkeypatch)

    monkeypatch.setattr(AcceleratorBackend, "__init__", without)
    with pytest.raises((UnorderedAccessError, RuntimeError)) as caught:
        work(SimulatedRuntime(seed, haste=(0, 0.02, 0.05)[seed % 3]), seed, steps=200)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, UnorderedAccessError):
        error = error.__cause__
    assert error is not None, caught.value


@given(
    seed=st.integers(0, 1 << 20),
    haste=st.sampled_from([0.0, 0.2, 0.6, 0.9]),
    items=st.sampled_from([None, 1, 3, 6]),
    depth=st.integers(1, 5),
    batch_size=st.integers(1, 6),
    page_bytes=st.sampled_from([None, 16, 48, 1024]),
    policy=st.sampled_from(["clairvoyant", "lru", "fifo", "keep"]),
    reader_threads=st.sampled_from([0, 1, 3]),
    consumers=st.integers(1, 3),
    small_segments=st.booleans(),
)
def test_pipelines_on_several_streams(
    seed: int,
    haste: float,
    items: int | None,
    depth: int,
    batch_size: int,
    page_bytes: int | None,
    policy: str,
    reader_threads: int,
    consumers: int,
    small_segments: bool,
) -> None:
    runtime = SimulatedRuntime(seed, haste)
    with (
        pytest.MonkeyPatch.context() as patch,
        GPUFeatureStore(
            AcceleratorBackend(runtime),
            load_fn=FILES.__getitem__,
            max_cache_items=items,
            page_bytes=page_bytes,
            policy=policy,
            asynchronous=reader_threads > 0,
            reader_threads=reader_threads or None,
        ) as store,
    ):
        if small_segments:
            patch.setattr(growing_arena, "FIRST_BYTES", 512)

        def consume(number: int) -> None:
            with runtime.on(runtime.new_stream()):
                lister = PathLister(PATHS, batch_size=batch_size, shuffle=True, seed=number)
                for _ in range(2):
                    features = GPUCollator(GPUPrefetcher(lister, store, depth=depth))
                    batches = list(features)
                    labels = [n for b in batches for n in b["label"].flatten().tolist()]
                    assert sorted(labels) == list(range(len(PATHS)))
                    for batch in batches:
                        expected = batch["label"].cpu().expand(-1, 40).float()
                        assert_same(batch["feature"].cpu(), expected.contiguous())

        in_threads(consume, consumers)
        store.check()


def test_a_warm_batch_takes_few_operations_and_no_waiting() -> None:
    runtime = SimulatedRuntime(0)
    with GPUFeatureStore(AcceleratorBackend(runtime), load_fn=FILES.__getitem__) as store:
        store.warm(PATHS, progress=False)
        store.get_batch(PATHS).collate()
        runtime.waits = 0
        before = runtime.operations
        batch = store.get_batch(PATHS).collate()
        # One operation for the index, and one gather for each of two leaves.
        assert runtime.operations - before == 3
        assert runtime.waits == 0
        assert batch["label"].flatten().tolist() == list(range(12))
        assert runtime.waits == 1


@pytest.mark.parametrize("haste", [0, 0.5])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda node: tn.Prefetcher(GPUCollator(node), prefetch_factor=2),
        lambda node: GPUCollator(tn.Prefetcher(node, prefetch_factor=2)),
        lambda node: GPUCollator(tn.Prefetcher(node, prefetch_factor=2), collate_fn=stack_labels),
        lambda node: tn.Prefetcher(GPUCollator(node, collate_fn=stack_labels), prefetch_factor=2),
        lambda node: tn.ParallelMapper(GPUCollator(node), lambda batch: batch, num_workers=2),
    ],
)
def test_threads_behind_the_nodes(wrap: Callable[[Any], Any], haste: float) -> None:
    """Threads of other nodes gather on the stream of the thread that trains."""
    runtime = SimulatedRuntime(5, haste)
    backend = AcceleratorBackend(runtime)
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__, max_cache_items=4) as store:
        lister = PathLister(PATHS, batch_size=3, shuffle=True)
        node = wrap(GPUPrefetcher(lister, store))
        with runtime.on(runtime.new_stream()):
            loader = tn.Loader(node)
            for _ in range(2):
                labels = [n for batch in loader for n in batch["label"].flatten().tolist()]
                assert sorted(labels) == list(range(len(PATHS)))
        del node, loader
        gc.collect()


def stack_labels(features: list[Any]) -> Any:
    return {"label": torch.stack([feature["label"] for feature in features])}


def test_staging_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimulatedRuntime(1)
    sizes = []

    def pinned(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return SimulatedRuntime.pinned(runtime, nbytes)

    monkeypatch.setattr(runtime, "pinned", pinned)
    files = {f"/g/{n}": torch.full((100,), n) for n in range(64)}
    with GPUFeatureStore(
        AcceleratorBackend(runtime),
        load_fn=files.__getitem__,
        reader_threads=2,
        staging_bytes="16KiB",
    ) as store:
        batch = store.get_batch(list(files)).collate()
        assert batch[:, 0].tolist() == list(range(64))
        assert max(sizes) == 4096 and len(sizes) <= 4
        # A file larger than a buffer is still read.
        files["/g/large"] = torch.full((1000,), 7)
        assert store.get("/g/large").tolist() == [7] * 1000
        store.check()


def after_a_move(haste: float, seed: int) -> None:
    """Gather pages that were filled before the arena moved, while the move may not have run."""
    runtime = SimulatedRuntime(seed, haste)
    backend = AcceleratorBackend(runtime)
    with GPUFeatureStore(
        backend,
        load_fn=FILES.__getitem__,
        max_cache_bytes=1 << 14,
        asynchronous=False,
        page_bytes=192,
    ) as store:
        store.get_batch(PATHS[:2])
        backend._copy_stream.synchronize()
        before = backend._pages.arena
        store.prefetch(PATHS[2:])
        assert backend._pages.arena is not before
        with runtime.on(runtime.new_stream()):
            batch = store.get_batch(PATHS[:2]).collate()
            assert batch["label"].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(10))
def test_a_gather_waits_for_the_arena_to_move(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 2 * 192)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", 192)
    after_a_move((0, 0.3)[seed % 2], seed)
    add = OperationLog.add

    def without_moves(log: OperationLog, stream: Any, pages: Any, held: Any = None) -> Any:
        return None if pages is None else add(log, stream, pages, held)

    monkeypatch.setattr(OperationLog, "add", without_moves)
    with pytest.raises(UnorderedAccessError):
        after_a_move(0, seed)


def test_an_event_that_is_recorded_twice() -> None:
    runtime = SimulatedRuntime(0, haste=0)
    a, b = runtime.new_stream(), runtime.new_stream()
    event = runtime.new_event()
    memory = runtime.empty(16)
    with runtime.on(a):
        memory.fill_(1)
        event.record(a)
        b.wait_event(event)
        memory.fill_(2)
        event.record(a)
    with runtime.on(b), pytest.raises(UnorderedAccessError):
        memory.fill_(3)
    assert not event.query()
    event.synchronize()
    with runtime.on(b):
        memory.fill_(3)
        assert memory.tolist() == [3] * 16


def test_a_collator_behind_several_sources() -> None:
    runtime = SimulatedRuntime(5, 0)
    with GPUFeatureStore(
        AcceleratorBackend(runtime), load_fn=FILES.__getitem__, max_cache_items=4
    ) as store:
        halves = {
            name: GPUPrefetcher(PathLister(paths, batch_size=2), store)
            for name, paths in (("a", PATHS[:6]), ("b", PATHS[6:]))
        }
        sampler = tn.MultiNodeWeightedSampler(
            halves, {"a": 1.0, "b": 1.0}, stop_criteria="ALL_DATASETS_EXHAUSTED"
        )
        node = tn.Prefetcher(GPUCollator(sampler, collate_fn=stack_labels), prefetch_factor=2)
        with runtime.on(runtime.new_stream()):
            loader = tn.Loader(node)
            labels = [n for batch in loader for n in batch["label"].flatten().tolist()]
        assert sorted(labels) == list(range(len(PATHS)))
        del node, loader
        gc.collect()


def test_operations_on_lists_of_tensors_are_writes() -> None:
    runtime = SimulatedRuntime(0, haste=0)
    memory = runtime.empty(16)
    with runtime.on(runtime.new_stream()):
        memory.fill_(1)
        memory.clone()
    with pytest.raises(UnorderedAccessError):
        torch._foreach_add_([memory], 1)


def upload(backend: AcceleratorBackend, pages: list[int], value: int) -> None:
    one = backend.upload([pages])
    [buffer] = one.buffers(0)
    buffer[:] = bytes([value]) * len(buffer)
    one.finish()


def reuse_what_is_being_read(runtime: SimulatedRuntime) -> None:
    """Gather pages, free them while that may not have run, and allocate as much again."""
    backend = AcceleratorBackend(runtime)
    backend.configure(64)
    added = [backend.grow(4, None) for _ in range(2)]
    for page in range(sum(added)):
        upload(backend, [page], page)
    consumer = runtime.new_stream()
    with runtime.on(consumer):
        [rows] = backend.gather([0, 5], [(0, 64)])
    backend.shrink(added[0])
    assert backend.grow(4, None) == added[1]
    for page in range(added[0], sum(added)):
        upload(backend, [page], 99)
    with runtime.on(consumer):
        assert rows.view(torch.uint8)[:, 0].tolist() == [0, 5]
    backend.close()


def rebuild_what_is_being_read(runtime: SimulatedRuntime) -> None:
    """Keep some pages at other places, while gathers of the old ones may not have run."""
    backend = AcceleratorBackend(runtime)
    backend.configure(64)
    pages = backend.grow(4, None)
    for page in range(pages):
        upload(backend, [page], page)
    consumer = runtime.new_stream()
    with runtime.on(consumer):
        [before] = backend.gather([3, 1], [(0, 64)])
    backend.rebuild([1, 3])
    with runtime.on(consumer):
        [after] = backend.gather([1, 0], [(0, 64)])
        for rows in (before, after):
            assert rows.view(torch.uint8)[:, 0].tolist() == [3, 1]
    assert backend.grow(pages, pages) == pages
    upload(backend, [2], 77)
    with runtime.on(consumer):
        [rows] = backend.gather([2, 1, 0], [(0, 64)])
        assert rows.view(torch.uint8)[:, 0].tolist() == [77, 3, 1]
    backend.close()


def rebuild_without_room(runtime: SimulatedRuntime) -> None:
    """There is no memory for the old and the new arena: the pages wait on the host."""
    reserve, lacking = runtime.reserve, [True]

    def refuse(nbytes: int) -> Any:
        if lacking:
            lacking.clear()
            raise torch.OutOfMemoryError("no memory")
        return reserve(nbytes)

    rebuild = AcceleratorBackend.rebuild

    def rebuild_then(backend: AcceleratorBackend, pages: Any) -> None:
        runtime.reserve = refuse  # type: ignore[method-assign]
        rebuild(backend, pages)
        assert not lacking

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorBackend, "rebuild", rebuild_then)
        rebuild_what_is_being_read(runtime)


FREEING = [rebuild_without_room, reuse_what_is_being_read, rebuild_what_is_being_read]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("free", FREEING)
def test_memory_is_not_freed_while_it_is_read(
    free: Callable[[SimulatedRuntime], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 256)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", 256)
    free(SimulatedRuntime(seed, haste=(0, 0.05, 0.3)[seed % 3]))


@pytest.mark.parametrize("free", [reuse_what_is_being_read])
def test_freeing_waits_for_what_is_being_read(
    free: Callable[[SimulatedRuntime], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, memory is given to an upload while a gather on another stream reads it."""
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 256)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", 256)
    monkeypatch.setattr(OperationLog, "synchronize", OperationLog.clear)
    with pytest.raises(UnorderedAccessError):
        free(SimulatedRuntime(0, haste=0))


@pytest.mark.parametrize("page_bytes", [1 << 16, 20 << 20])
def test_an_upload_goes_in_small_pieces(page_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    copy = torch.Tensor.copy_

    def counted(target: torch.Tensor, source: torch.Tensor, *args: Any, **options: Any) -> Any:
        if options:
            sizes.append(source.numel())
        return copy(target, source, *args, **options)

    backend = AcceleratorBackend(InOrderRuntime(torch.device("cpu")))
    backend.configure(page_bytes)
    count = (40 << 20) // page_bytes
    backend.grow(count, count)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    upload(backend, list(range(count)), 3)
    assert sum(sizes) == count * page_bytes and max(sizes) == 4 << 20
    backend.close()


@pytest.mark.parametrize("call", ["reset", "close"])
def test_pinned_memory_is_returned(call: str) -> None:
    runtime = InOrderRuntime(torch.device("cpu"))
    returned: list[int] = []
    backend = AcceleratorBackend(runtime)
    runtime.release_pinned = lambda: returned.append(  # type: ignore[method-assign]
        backend.staging_bytes
    )
    backend.configure(64)
    backend.grow(2, 2)
    upload(backend, [0], 1)
    assert backend.staging_bytes > 0
    getattr(backend, call)()
    assert returned == [0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("page_bytes", [64, 4096, 70_000])
def test_pieces_of_an_upload_arrive_wherever_its_pages_lie(
    seed: int, page_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(seed)
    runtime = SimulatedRuntime(seed, haste=0.2)
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", page_bytes * 6)
    monkeypatch.setattr(growing_arena, "LEAST_BYTES", page_bytes)
    monkeypatch.setattr(accelerator, "_PIECE", page_bytes * 2)
    backend = AcceleratorBackend(runtime)
    backend.configure(page_bytes)
    total = sum(backend.grow(1, None) for _ in range(3))
    content: dict[int, int] = {}
    consumer = runtime.new_stream()
    for step in range(12):
        if choose.random() < 0.5:
            start = choose.randrange(total)
            placement: Any = range(start, min(total, start + choose.randint(1, 9)))
        else:
            placement = choose.sample(range(total), choose.randint(1, total))
        one = backend.upload([placement])
        [buffer] = one.buffers(0)
        for at, page in enumerate(placement):
            content[page] = (step * 20 + at) % 256
            buffer[at * page_bytes : (at + 1) * page_bytes] = bytes([content[page]]) * page_bytes
        one.finish()
        with runtime.on(consumer):
            pages = list(content)
            [rows] = backend.gather(pages, [(0, page_bytes)])
            held = rows.view(torch.uint8)
            assert held[:, 0].tolist() == held[:, -1].tolist() == list(content.values())
    backend.close()
