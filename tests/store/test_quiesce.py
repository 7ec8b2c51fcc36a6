"""`quiesce` holds the readers; `yield_memory_to` and a model that runs short take pages away."""

import gc
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Gate, wait_for_readers
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import AcceleratorBackend, InOrderRuntime, growing_arena
from gpucache_pipes.store import memory_tracker
from gpucache_pipes.testing import SimulatedRuntime

FILES = {f"/{n}": torch.full((50 + n % 3 * 20,), float(n)) for n in range(40)}
PATHS = list(FILES)


def staged() -> AcceleratorBackend:
    return AcceleratorBackend(InOrderRuntime(torch.device("cpu")))


def first(features: Any) -> list[int]:
    return [int(feature[0]) for feature in features]


def test_readers_are_held_between_two_tasks() -> None:
    gate = Gate(FILES)
    with GPUFeatureStore(staged(), load_fn=gate, reader_threads=2) as store:
        store.prefetch(PATHS[:1])
        gate.wait_until_started("/0")
        inside, leave = threading.Event(), threading.Event()
        loads: list[list[str]] = []

        def hold() -> None:
            with store.quiesce():
                inside.set()
                loads.append(list(gate.loads))
                assert leave.wait(60)
                loads.append(list(gate.loads))

        thread = threading.Thread(target=hold)
        thread.start()
        assert not inside.is_set(), "a reader is in the middle of a file"
        gate.open("/0")
        assert inside.wait(60)
        batch = store.request(PATHS[1:4])
        gate.open(*PATHS)
        leave.set()
        thread.join(60)
        assert loads[0] == loads[1] == ["/0"]
        assert first(batch.result()) == [1, 2, 3]


def test_a_thread_that_holds_the_readers_does_not_wait_for_them() -> None:
    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS[:4])
        with store.quiesce():
            assert first(store.get_batch(PATHS[:4])) == [0, 1, 2, 3]
            with store.quiesce(), pytest.raises(RuntimeError, match="quiesce"):
                store.get(PATHS[5])
            with pytest.raises(RuntimeError, match="quiesce"):
                store.get(PATHS[6])
        assert first(store.get_batch(PATHS[:8])) == list(range(8))
        wait_for_readers(store)


def test_a_store_without_readers_reads_in_the_thread_that_holds_them() -> None:
    with (
        GPUFeatureStore(staged(), load_fn=FILES.__getitem__, asynchronous=False) as store,
        store.quiesce(),
    ):
        assert first(store.get_batch(PATHS[:3])) == [0, 1, 2]


def test_the_device_is_drained() -> None:
    runtime = SimulatedRuntime(0, haste=0)
    backend = AcceleratorBackend(runtime)
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS[:8])
        assert backend._gathers._streams
        with store.quiesce():
            assert not backend._gathers._streams and not backend._uploads._streams


@pytest.mark.parametrize("where", ["inside", "before"])
def test_closing_a_store_that_is_held(where: str) -> None:
    store = GPUFeatureStore(staged(), load_fn=FILES.__getitem__)
    if where == "inside":
        with store.quiesce():
            store.prefetch(PATHS)
            store.close()
    else:
        store.close()
    with pytest.raises(RuntimeError, match="closed"), store.quiesce():
        pass


def test_a_reader_that_hangs_and_was_replaced_is_not_waited_for() -> None:
    gate = Gate(FILES)
    gate.open(*PATHS[1:])
    with GPUFeatureStore(staged(), load_fn=gate, read_timeout=0.05) as store:
        with pytest.raises(RuntimeError, match="read_timeout"):
            store.get(PATHS[0])
        with store.quiesce():
            pass
        assert first(store.get_batch(PATHS[1:3])) == [1, 2]
        gate.open(PATHS[0])
        wait_for_readers(store)


def test_a_signal_handler_that_closes_while_the_device_is_drained() -> None:
    runtime = SimulatedRuntime(0, haste=0)
    backend = AcceleratorBackend(runtime)
    store = GPUFeatureStore(backend, load_fn=FILES.__getitem__)
    store.get_batch(PATHS[:8])
    waiting: list[int] = []

    class Streams(dict[Any, Any]):
        def values(self) -> Any:
            # In the midst of the drain, with the lock of the log held.
            if threading.current_thread() is threading.main_thread() and not waiting:
                waiting.append(1)
                os.kill(os.getpid(), signal.SIGUSR1)
                for _ in range(10):
                    pass
            return super().values()

    backend._gathers._streams = Streams(backend._gathers._streams)
    before = signal.signal(signal.SIGUSR1, lambda *_: store.close())
    try:
        with store.quiesce():
            assert waiting
    finally:
        signal.signal(signal.SIGUSR1, before)
    with pytest.raises(RuntimeError, match="closed"):
        store.get(PATHS[0])
    assert store.stats().reserved_bytes == 0


def test_a_store_that_is_collected_by_its_own_reader_in_the_midst_of_an_upload() -> None:
    dropped, collected = threading.Event(), threading.Event()

    class Collecting(SimulatedRuntime):
        def new_event(self) -> Any:
            if threading.current_thread() is not threading.main_thread():
                assert dropped.wait(60)
                gc.collect()  # it may run at any allocation, here with the lock of the log held
                collected.set()
            return super().new_event()

    backend = AcceleratorBackend(Collecting(0))
    store = GPUFeatureStore(backend, load_fn=FILES.__getitem__)
    [reader] = store._loader._pool.threads  # type: ignore[union-attr]
    store.prefetch(PATHS[:4])
    store.cycle = store  # type: ignore[attr-defined]
    del store
    dropped.set()
    reader.join(60)
    assert not reader.is_alive() and collected.is_set()
    assert backend.reserved_bytes == 0


def test_waiting_for_readers_that_the_thread_holds_is_an_error() -> None:
    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        with store.quiesce():
            assert store.wait_idle()
            store.prefetch(PATHS)
            with pytest.raises(RuntimeError, match="quiesce"):
                store.wait_idle()
        assert store.wait_idle(60)


@pytest.mark.parametrize("reader_threads", [0, 1])
def test_a_load_fn_that_holds_the_readers_does_not_wait_for_itself(reader_threads: int) -> None:
    held: list[str] = []

    def load(path: str) -> Any:
        with store.quiesce():
            held.append(path)
        return FILES[path]

    store = GPUFeatureStore(staged(), load_fn=load, asynchronous=reader_threads > 0)
    with store:
        assert first(store.get_batch(PATHS[:3])) == [0, 1, 2]
    assert held == PATHS[:3]


# Memory for the model


def test_what_may_run_twice_runs_from_the_same_random_numbers() -> None:
    grown = torch.zeros(1)
    drawn: list[torch.Tensor] = []

    def step(scale: float) -> float:
        grown.add_(1)
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            raise torch.OutOfMemoryError("no memory")
        return scale * float(grown)

    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        pending = store.request(PATHS[:5])
        store.get_batch(PATHS[5:20])
        wait_for_readers(store)
        assert store.yield_memory_to(step, 2.0, zero_grad=grown.zero_) == 2.0
        assert torch.equal(drawn[0], drawn[1])
        assert store.stats().items == 5
        assert first(pending.result()) == list(range(5))
        assert first(store.get_batch(PATHS)) == list(range(40))


def test_only_a_lack_of_device_memory_is_tried_again() -> None:
    calls: list[int] = []

    def fail(error: Exception) -> None:
        calls.append(1)
        raise error

    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        # Nothing is cached, so nothing can be dropped.
        for error in (ValueError("x"), RuntimeError("y"), torch.OutOfMemoryError("z")):
            with pytest.raises(type(error), match=str(error)):
                store.yield_memory_to(fail, error)
        assert len(calls) == 3
        store.get_batch(PATHS)
        with pytest.raises(torch.OutOfMemoryError):
            store.yield_memory_to(fail, torch.OutOfMemoryError("z"))
        assert len(calls) == 5 and len(store) == 0


def test_a_cache_in_other_memory_is_kept() -> None:
    error = torch.OutOfMemoryError("of the model, on its GPU")

    def fail() -> None:
        raise error

    with GPUFeatureStore("cpu", load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS)
        pending = store.request(PATHS[:3])
        with pytest.raises(torch.OutOfMemoryError) as caught:
            store.yield_memory_to(fail)
        assert caught.value is error and len(store) == 40
        assert first(pending.result()) == [0, 1, 2]


def test_pages_are_not_moved_while_another_thread_gathers_them() -> None:
    backend = staged()
    inside, leave = threading.Event(), threading.Event()
    gather = backend.gather

    def slow(pages: Any, columns: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert leave.wait(60)
        return gather(pages, columns)

    backend.gather = slow  # type: ignore[method-assign]
    results: list[list[int]] = []
    with GPUFeatureStore(backend, load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS)
        wanted = [39, 3, 17]
        thread = threading.Thread(
            target=lambda: results.append(first(store.get_batch([PATHS[n] for n in wanted])))
        )
        thread.start()
        assert inside.wait(60)
        memory = store._shared.memory
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory_tracker, "_PATIENCE", 0.05)
            assert memory.shed() == 0, "pages were moved under a gather"
        leave.set()
        thread.join(60)
        assert results == [wanted]
        assert memory.shed() > 0


def test_errors_that_led_to_the_error_do_not_keep_tensors_either() -> None:
    alive: set[int] = set()

    class Held:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def inner() -> None:
        activation = Held()
        raise ValueError(str(activation))

    seen: list[int] = []

    def step() -> None:
        seen.append(len(alive))
        if len(seen) == 1:
            try:
                inner()
            except ValueError as error:
                raise torch.OutOfMemoryError("no memory") from error

    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS)
        store.yield_memory_to(step)
    assert seen == [0, 0]


def test_the_frames_of_the_first_call_do_not_keep_its_tensors() -> None:
    alive: list[Any] = []

    class Tensor:
        def __init__(self) -> None:
            alive.append(self)

    def step() -> int:
        if not alive:
            tensor = Held()
            del tensor
            activation = Held()
            raise torch.OutOfMemoryError(str(activation))
        return Held.count

    class Held:
        count = 0

        def __init__(self) -> None:
            type(self).count += 1

        def __del__(self) -> None:
            type(self).count -= 1
            alive.append(1)

    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        store.get_batch(PATHS)

        def call() -> int:
            if Held.count or not alive:
                return step()
            return Held.count

        assert store.yield_memory_to(call) == 0


def test_one_rank_of_several_does_not_repeat_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    with GPUFeatureStore(staged(), load_fn=FILES.__getitem__) as store:
        with pytest.raises(RuntimeError, match="collective_free=True"):
            store.yield_memory_to(lambda: 1)
        assert store.yield_memory_to(lambda: 1, collective_free=True) == 1


def retire_last_segment(store: GPUFeatureStore) -> None:
    """As a model that runs short has it done. Not if it is the only one."""
    backend = store._backend
    assert isinstance(backend, AcceleratorBackend)
    with pytest.MonkeyPatch.context() as patch, store._shared.lock:
        arena = backend._pages.arena
        if arena is None or len(arena.segments) < 2:
            return
        last = arena.segments[-1]
        patch.setattr(backend, "balance", lambda: -last)
        patch.setattr(store._shared.cache.ledger, "max_bytes", None)
        store._shared.memory.balance()


BACKENDS: list[Callable[[int], AcceleratorBackend]] = [
    lambda seed: staged(),
    lambda seed: AcceleratorBackend(SimulatedRuntime(seed, haste=(0, 0.1, 0.5)[seed % 3])),
]


@settings(max_examples=30)
@given(
    make=st.sampled_from(BACKENDS),
    seed=st.integers(0, 10_000),
    page_bytes=st.sampled_from([None, 64, 4096]),
    budget=st.sampled_from([None, None, 3000]),
    reader_threads=st.integers(0, 2),
)
def test_batches_are_exact_while_the_arena_shrinks(
    make: Callable[[int], AcceleratorBackend],
    seed: int,
    page_bytes: int | None,
    budget: int | None,
    reader_threads: int,
) -> None:
    choose = random.Random(seed)
    backend = make(seed)
    with (
        pytest.MonkeyPatch.context() as patch,
        GPUFeatureStore(
            backend,
            load_fn=FILES.__getitem__,
            max_cache_bytes=budget,
            page_bytes=page_bytes,
            policy=choose.choice(["lru", "clairvoyant"]),
            asynchronous=reader_threads > 0,
            reader_threads=reader_threads or None,
        ) as store,
    ):
        patch.setattr(growing_arena, "FIRST_BYTES", 512)
        patch.setattr(growing_arena, "LEAST_BYTES", 256)
        pending: list[tuple[Any, list[int]]] = []
        for _ in range(40):
            wanted = [choose.randrange(40) for _ in range(choose.randint(1, 6))]
            pending.append((store.request([PATHS[n] for n in wanted]), wanted))
            if choose.random() < 0.3:
                retire_last_segment(store)
            if choose.random() < 0.2:
                with store.quiesce():
                    store._shared.memory.shed()
            if choose.random() < 0.05:
                store.clear()
            while len(pending) > choose.randint(0, 3):
                batch, numbers = pending.pop(choose.randrange(len(pending)))
                assert first(batch.result()) == numbers
            store.check()
        while pending:
            batch, numbers = pending.pop()
            assert first(batch.result()) == numbers


def test_retired_pages_go_when_the_last_batch_that_needs_them_has_them() -> None:
    backend = staged()
    with (
        pytest.MonkeyPatch.context() as patch,
        GPUFeatureStore(
            backend, load_fn=FILES.__getitem__, page_bytes=512, asynchronous=False
        ) as store,
    ):
        patch.setattr(growing_arena, "FIRST_BYTES", 512 * 4)
        for path in PATHS:  # the arena grows by what a batch needs
            store.get(path)
        held = store.request([PATHS[39]])
        segments = backend._pages.arena.segments  # type: ignore[union-attr]
        assert len(segments) > 2
        before = store.stats().reserved_bytes
        retire_last_segment(store)
        assert store.stats().reserved_bytes == before, "a pending batch needs the pages"
        store.check()
        assert first(held.result()) == [39]
        assert store.stats().reserved_bytes == before - segments[-1] * 512
        store.check()
        assert first(store.get_batch(PATHS)) == list(range(40))


# A consumer in inference mode


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("make", [staged, lambda: "cpu"])
@pytest.mark.parametrize("ragged", ["error", "pad", "jagged", "list"])
def test_inference_mode_leaves_nothing_behind(
    make: Callable[[], Any], asynchronous: bool, ragged: str
) -> None:
    files = {f"/{n}": torch.full((4,), float(n)) for n in range(40)}
    with GPUFeatureStore(
        make(), load_fn=files.__getitem__, asynchronous=asynchronous, max_cache_items=10
    ) as store:
        lister = PathLister(list(files), batch_size=4, shuffle=True)
        node = GPUCollator(GPUPrefetcher(lister, store), ragged=ragged)
        with torch.inference_mode():
            for batch in node:
                assert batch is not None
        weight = torch.ones(4, requires_grad=True)
        for _ in range(2):
            node.reset()
            for batch in node:
                values = batch.values if ragged == "pad" else batch
                values = values.values().view(-1, 4) if ragged == "jagged" else values
                values = torch.stack(values) if ragged == "list" else values
                (values * weight).sum().backward()
                values.zero_()  # it belongs to the consumer
        assert weight.grad is not None
        store.check()
