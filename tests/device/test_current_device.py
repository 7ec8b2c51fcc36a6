"""With several devices: every call is made with the store's device current, in every thread."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchdata.nodes as tn
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import AcceleratorBackend, TorchRuntime, growing_arena, torch_runtime
from gpucache_pipes.testing import SimulatedRuntime, WrongDeviceError
from gpucache_pipes.testing.contracts import in_threads

FILES = {f"/f/{n}.pt": {"x": torch.full((40,), float(n)), "n": n} for n in range(24)}
PATHS = list(FILES)


def new_store(runtime: SimulatedRuntime, **options: Any) -> GPUFeatureStore:
    return GPUFeatureStore(AcceleratorBackend(runtime), load_fn=FILES.__getitem__, **options)


def numbers(batch: Any) -> list[int]:
    found: list[int] = batch["n"].tolist()
    return found


WRAPPED: list[Callable[[Any], Any]] = [
    lambda node: node,
    lambda node: tn.Prefetcher(node, prefetch_factor=2),
    lambda node: tn.ParallelMapper(node, lambda batch: batch, num_workers=2),
]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    wrap=st.sampled_from(WRAPPED),
    budget=st.sampled_from([None, 600, 1 << 14]),
    reader_threads=st.integers(0, 2),
    ragged=st.sampled_from(["error", "pad", "jagged"]),
)
def test_a_consumer_that_has_set_no_device(
    seed: int, wrap: Callable[[Any], Any], budget: int | None, reader_threads: int, ragged: str
) -> None:
    runtime = SimulatedRuntime(seed, index=1)
    with (
        pytest.MonkeyPatch.context() as patch,
        new_store(
            runtime,
            max_cache_bytes=budget,
            asynchronous=reader_threads > 0,
            reader_threads=reader_threads or None,
        ) as store,
    ):
        patch.setattr(growing_arena, "FIRST_BYTES", 512)
        patch.setattr(growing_arena, "LEAST_BYTES", 512)
        lister = PathLister(PATHS, batch_size=5, shuffle=True, seed=seed)
        node = wrap(GPUCollator(GPUPrefetcher(lister, store), ragged=ragged))
        loader = tn.Loader(node)
        for _ in range(2):
            seen = [n for batch in loader for n in numbers(batch)]
            assert sorted(seen) == list(range(24))
        store.clear()
        store.get(PATHS[0])
        with store.quiesce():
            pass
        del node, loader
    gc.collect()
    assert runtime.devices.current == 0, "the device of the consumer's thread was changed"
    assert not runtime.devices.wrong


def test_consumers_in_threads_and_a_store_that_is_dropped_in_another() -> None:
    runtime = SimulatedRuntime(3, index=2)
    stores = [new_store(runtime, max_cache_items=4, reader_threads=2)]

    def consume(number: int) -> None:
        for start in range(0, 24, 4):
            batch = stores[0].get_batch(PATHS[start : start + 4]).collate()
            assert numbers(batch) == list(range(start, start + 4))

    in_threads(consume, 3)

    def drop() -> None:
        stores.clear()
        gc.collect()

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert not runtime.devices.wrong


def test_functions_of_the_user_run_with_the_device_current() -> None:
    runtime = SimulatedRuntime(1, index=1)
    seen: set[tuple[str, int]] = set()

    def load(path: str) -> Any:
        seen.add(("load_fn", runtime.devices.current))
        return FILES[path]

    def collate(features: list[Any]) -> Any:
        seen.add(("collate_fn", runtime.devices.current))
        return len(features)

    with GPUFeatureStore(AcceleratorBackend(runtime), load_fn=load) as store:
        features = GPUPrefetcher(PathLister(PATHS, batch_size=4), store)
        node = tn.Prefetcher(GPUCollator(features, collate_fn=collate), prefetch_factor=2)
        assert list(tn.Loader(node)) == [4] * 6
        del node, features
    gc.collect()
    assert seen == {("load_fn", 1), ("collate_fn", 1)}


@pytest.mark.parametrize("what", ["on_device", "on"])
def test_each_care_is_needed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a call is made for a device that is not current."""
    runtime = SimulatedRuntime(0, index=1)
    backend = AcceleratorBackend(runtime)

    @contextmanager
    def nothing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(runtime, what, nothing)
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__, asynchronous=False) as store:
        with pytest.raises((WrongDeviceError, RuntimeError)):
            store.get_batch(PATHS[:4])
        monkeypatch.undo()
    assert runtime.devices.wrong


# TorchRuntime, on an imitation of what CUDA does with the device of a thread


class Cuda:
    """The current device of each thread, and the devices that have a context, as CUDA 12 has it.

    `set_device` creates a context; torch's guards restore the device of before without creating
    one. Leaving a stream sets the device of before (torch issue pytorch/torchcomms#777).
    """

    def __init__(self) -> None:
        self.contexts: set[int] = set()
        self.local = threading.local()

    @property
    def current(self) -> int:
        return getattr(self.local, "device", 0)

    def set_device(self, index: int) -> None:
        self.local.device = index
        self.contexts.add(index)

    @contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before = self.current
        self.set_device(index)
        try:
            yield
        finally:
            self.local.device = before

    def use(self) -> None:
        """A call that needs a context on whichever device is current."""
        self.contexts.add(self.current)

    def stream(self, *args: Any, stream_id: int = 7, **where: Any) -> "Stream":
        return Stream(self, where.get("device_index", args[0].index if args else 0), stream_id)


class Stream:
    device_type = 1

    def __init__(self, cuda: Cuda, index: int, stream_id: int) -> None:
        self.cuda, self.device_index, self.stream_id = cuda, index, stream_id

    def __enter__(self) -> None:
        self.before = self.cuda.current
        self.cuda.set_device(self.device_index)

    def __exit__(self, *_: object) -> None:
        self.cuda.set_device(self.before)


def test_torch_runtime_makes_no_context_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch_runtime.torch, "Stream", cuda.stream)
    monkeypatch.setattr(torch.accelerator, "device_index", cuda.device_index)
    monkeypatch.setattr(torch.accelerator, "set_device_index", cuda.set_device)
    runtime = TorchRuntime(torch.device("cuda", 3))
    stream = Stream(cuda, 3, 9)
    with runtime.on(stream):
        cuda.use()
        with runtime.on(Stream(cuda, 3, 10)):
            cuda.use()
        assert cuda.current == 3
    with runtime.on_device():
        cuda.use()
    assert cuda.current == 0 and cuda.contexts == {3}

    def reader(_: int) -> None:
        runtime.bind_thread()
        with runtime.on(stream):
            cuda.use()
        cuda.use()

    in_threads(reader, 2)
    assert cuda.contexts == {3}
    # Without the care for the device, the imitation shows the context on GPU 0.
    with stream:
        cuda.use()
    assert cuda.contexts == {0, 3}
