"""Pending batches: joined, dropped, cancelled, collected."""

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Gate

from gpucache_pipes import GPUFeatureStore, PendingBatch
from gpucache_pipes.device import HostBackend
from gpucache_pipes.store.lock import StoreLock

Files = Callable[..., list[str]]


def test_prefetch_returns_at_once_and_is_joined() -> None:
    gate = Gate({"/a": torch.tensor([1.0]), "/b": torch.tensor([2.0])})
    with GPUFeatureStore("cpu", load_fn=gate, reader_threads=2) as store:
        store.prefetch(["/a"])
        gate.wait_until_started("/a")
        pending = store.request(["/a", "/b", "/a"])
        other = store.request(["/b"])
        gate.wait_until_started("/b")
        assert "/a" not in store
        gate.open("/a", "/b")
        assert [float(f) for f in pending.result()] == [1, 2, 1]
        assert float(other.result()[0]) == 2
        assert sorted(gate.loads) == ["/a", "/b"]  # once each
        assert store.stats().misses == 1  # only /b was read because of a request
        assert store.stats().wait_seconds >= 0
        with pytest.raises(RuntimeError, match="has been used"):
            pending.result()


def test_many_consumers_read_each_file_once(make_files: Files) -> None:
    paths = make_files(40)
    loads: list[str] = []

    def load(path: str) -> Any:
        loads.append(path)
        return torch.load(path)

    with GPUFeatureStore("cpu", load_fn=load, reader_threads=3) as store:
        failures: list[BaseException] = []

        def consume(seed: int) -> None:
            try:
                order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
                for at in range(0, 40, 8):
                    wanted = order[at : at + 8]
                    batch = store.get_batch([paths[n] for n in wanted]).collate()
                    assert batch["label"].flatten().tolist() == wanted
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=consume, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert sorted(loads) == sorted(map(os.path.realpath, paths))


def test_a_dropped_batch_is_cancelled(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu", max_cache_items=1) as store:
        pending = store.request(paths)
        store.get_batch(paths)
        assert store.stats().bypassed_items == 2
        del pending
        gc.collect()
        store.check()
        assert store.stats().bypassed_items == 0


def test_a_pending_batch_that_is_cancelled_wakes_the_thread_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate({"/a": torch.tensor([1.0])})
    waiting, plain_wait = threading.Event(), StoreLock.wait

    def noted(self: StoreLock, seconds: float | None = None) -> None:
        # With the lock held: whoever takes it after this comes when the consumer waits.
        waiting.set()
        plain_wait(self, seconds)

    monkeypatch.setattr(StoreLock, "wait", noted)
    with GPUFeatureStore("cpu", load_fn=gate) as store:
        pending = store.request(["/a"])
        gate.wait_until_started("/a")
        errors: list[str] = []

        def wait() -> None:
            try:
                pending.result()
            except RuntimeError as error:
                errors.append(str(error))

        consumer = threading.Thread(target=wait)
        consumer.start()
        assert waiting.wait(60)
        pending.cancel()
        consumer.join(60)
        assert not consumer.is_alive() and "cancelled" in errors[0]
        gate.open("/a")


def test_no_thread_can_close_a_pending_batch_during_its_gather(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = {f"/{n}": torch.full((4,), n) for n in range(8)}
    backend: Any = HostBackend()
    with GPUFeatureStore(backend, load_fn=items.__getitem__, max_cache_items=2) as store:
        pending = store.request(["/0", "/1"])
        store.get_batch(["/0", "/1"])
        gather = backend.gather

        def interfere(pages: Any, columns: Any) -> Any:
            monkeypatch.setattr(backend, "gather", gather)
            pending.cancel()
            with pytest.raises(RuntimeError, match="used"):
                pending.result()
            store.clear()
            store.get_batch(["/4", "/5", "/6", "/7"])
            return gather(pages, columns)

        monkeypatch.setattr(backend, "gather", interfere)
        assert [int(f[0]) for f in pending.result()] == [0, 1]


def test_a_pending_batch_keeps_its_store(make_files: Files) -> None:
    def request() -> Any:
        return GPUFeatureStore("cpu").request(make_files(40))

    batch = request().result()
    assert [int(feature["label"]) for feature in batch] == list(range(40))


def test_a_batch_is_cancelled_while_it_is_collected(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store:
        pending = store.request(paths)
        use_up = PendingBatch.use_up

        def abandoned_meanwhile(self: PendingBatch) -> Any:
            """A finalizer may take the batch just before."""
            if (number := use_up(self)) is not None:
                self.issuer.abandon(number)
            return use_up(self)

        monkeypatch.setattr(PendingBatch, "use_up", abandoned_meanwhile)
        with pytest.raises(RuntimeError, match="used or cancelled"):
            pending.result()
        monkeypatch.undo()
        twice = store.request(paths)
        with pytest.raises(RuntimeError, match="used or cancelled"):
            store.collect([twice, twice])
        # Nothing is in use or pinned any more, or clear() would wait for it.
        store.clear()
        assert store.stats().reserved_bytes == store.stats().pending_batches == 0


def test_a_batch_of_another_store(make_files: Files) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store, GPUFeatureStore("cpu") as other:
        pending = store.request(paths)
        with pytest.raises(RuntimeError, match="another store"):
            other.collect([pending])


@pytest.mark.parametrize("call", ["collect", "cancel"])
def test_a_batch_of_another_store_closes_none_of_this(make_files: Files, call: str) -> None:
    """Both are the first of their stores, and have one number."""
    paths = make_files(8)
    with (
        GPUFeatureStore("cpu", policy="lru", max_cache_items=2) as store,
        GPUFeatureStore("cpu") as other,
    ):
        mine, others = store.request(paths[:2]), other.request(paths[:1])
        with pytest.raises(RuntimeError, match="another store"):
            getattr(store, call)([others])
        own = store.request(paths[:1])
        with pytest.raises(RuntimeError, match="another store"):
            getattr(store, call)([own, others])
        assert own.used == (call == "collect")
        own.cancel()
        for path in paths[2:]:
            store.get(path)
        assert [int(feature["label"]) for feature in mine.result()] == [0, 1]
        assert [int(feature["label"]) for feature in others.result()] == [0]
        store.check()
