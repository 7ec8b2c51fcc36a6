"""On a real device: the edges, no waiting by the host, no growth, and training as people do it.

`make gpu-check` runs these, together with the tests of the other files that take the device as a
parameter.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ACCELERATOR

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import AcceleratorBackend, TorchRuntime, accelerator, resolve_device
from gpucache_pipes.testing.contracts import in_threads

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
pytestmark = pytest.mark.gpu

LONG = 50_000_000
"""Cycles for which a stream is kept busy: some 30 ms, much longer than anything else here."""


def rows(count: int, width: int = 1024) -> dict[str, torch.Tensor]:
    return {f"/f/{n}": torch.full((width,), float(n)) for n in range(count)}


def new_backend() -> AcceleratorBackend:
    assert ACCELERATOR is not None
    return AcceleratorBackend(TorchRuntime(resolve_device(ACCELERATOR)))


def first_column(batch: torch.Tensor) -> list[int]:
    return [int(n) for n in batch[:, 17].tolist()]


# The edges. Each work keeps one of the streams busy, so that what does not wait is too early.


def read_while_it_is_uploaded(backend: AcceleratorBackend) -> bool:
    """uploaded: a gather that is issued while the copy stream has not copied yet."""
    files = rows(8)
    with GPUFeatureStore(backend, load_fn=files.__getitem__, asynchronous=False) as store:
        store.warm(list(files)[:4], progress=False)
        torch.accelerator.synchronize()
        with backend._runtime.on(backend._copy_stream):
            torch.cuda._sleep(LONG)
        return first_column(store.get_batch(list(files)[4:]).collate()) == [4, 5, 6, 7]


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
        with backend._runtime.on(backend._copy_stream):
            torch.cuda._sleep(LONG)
        for start in range(1, 29, 4):
            store.prefetch(names[start : start + 4])
        return first_column(store.get_batch(names[1:29]).collate()) == list(range(1, 29))


def without_uploaded(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(backend, lambda log: log is backend._uploads)


def without_read_done(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(backend, lambda log: log is backend._gathers)


def without_staging_free(backend: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator.StagingLane, "busy_until", lambda self, event: None)


def drop(backend: AcceleratorBackend, these: Callable[[Any], bool]) -> None:
    wait_for = backend._wait_for
    backend._wait_for = lambda log, *rest: (  # type: ignore[method-assign]
        None if these(log) else wait_for(log, *rest)
    )


EDGES = [
    (read_while_it_is_uploaded, without_uploaded),
    (refill_what_is_being_read, without_read_done),
    (write_to_staging_that_is_being_read, without_staging_free),
]


@cuda
@pytest.mark.parametrize(("work", "without"), EDGES)
def test_an_edge_holds_and_is_needed(
    work: Callable[..., bool], without: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(work(new_backend()) for _ in range(5))

    def broken() -> AcceleratorBackend:
        backend = new_backend()
        without(backend, monkeypatch)
        return backend

    assert not all(work(broken()) for _ in range(5))


@cuda
@pytest.mark.parametrize("max_cache_bytes", [None, "64MiB"])
def test_the_host_never_waits_in_a_warm_epoch(max_cache_bytes: str | None) -> None:
    files = rows(512)
    with GPUFeatureStore(
        "cuda", load_fn=files.__getitem__, max_cache_bytes=max_cache_bytes
    ) as store:
        node = GPUCollator(GPUPrefetcher(PathLister(list(files), batch_size=32), store))
        batches = list(node)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                node.reset()
                batches = list(node)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [n for batch in batches for n in first_column(batch)] == list(range(512))


def test_ten_thousand_batches_from_a_tenth_of_the_memory() -> None:
    files = rows(400, width=64)
    names = list(files)
    choose = random.Random(0)
    expected = torch.stack(list(files.values())).to(ACCELERATOR)
    wrong = torch.zeros((), dtype=torch.int64, device=ACCELERATOR)
    with GPUFeatureStore(
        ACCELERATOR, load_fn=files.__getitem__, max_cache_items=40, reader_threads=2
    ) as store:
        for _ in range(10_000):
            wanted = [choose.randrange(400) for _ in range(16)]
            batch = store.get_batch([names[n] for n in wanted]).collate()
            wrong += (batch != expected[torch.tensor(wanted).to(ACCELERATOR)]).sum()
        store.check()
    assert int(wrong) == 0


@cuda
def test_memory_does_not_grow_over_epochs() -> None:
    files = rows(256)
    with GPUFeatureStore("cuda", load_fn=files.__getitem__, max_cache_items=64) as store:
        lister = PathLister(list(files), batch_size=32, shuffle=True)
        node = GPUCollator(GPUPrefetcher(lister, store))
        reserved = []
        for epoch in range(50):
            node.reset()
            for batch in node:
                del batch
            torch.cuda.synchronize()
            if epoch >= 5:
                reserved.append(torch.cuda.memory_reserved())
    assert len(set(reserved)) == 1, reserved


@cuda
def test_consumers_on_streams_of_their_own() -> None:
    files = rows(64)
    names = list(files)
    with GPUFeatureStore("cuda", load_fn=files.__getitem__, max_cache_items=16) as store:

        def consume(seed: int) -> None:
            choose = random.Random(seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(300):
                    wanted = [choose.randrange(64) for _ in range(8)]
                    batch = store.get_batch([names[n] for n in wanted]).collate()
                    if choose.random() < 0.2:
                        torch.cuda._sleep(100_000)
                    assert first_column(batch) == wanted

        in_threads(consume, 3)
        store.check()


def test_training_under_torch_compile() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(32, generator=generator)
    inputs = torch.randn(256, 32, generator=generator)
    files = {f"/f/{n}": {"x": x, "y": x @ truth} for n, x in enumerate(inputs)}
    model = torch.nn.Linear(32, 1).to(ACCELERATOR)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile
    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(x)[:, 0], y)

    def losses() -> Iterator[float]:
        with GPUFeatureStore(ACCELERATOR, load_fn=files.__getitem__, max_cache_items=100) as store:
            lister = PathLister(list(files), batch_size=32, shuffle=True)
            node = GPUCollator(GPUPrefetcher(lister, store))
            for _ in range(10):
                node.reset()
                for batch in node:
                    loss = loss_of(batch["x"], batch["y"])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                yield float(loss.detach())

    series = list(losses())
    assert series[-1] < series[0] / 20
