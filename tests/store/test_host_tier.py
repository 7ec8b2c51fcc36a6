"""host_cache_bytes=: what the device does not hold comes from host memory, exactly."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import device_for
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucache_pipes import GPUFeatureStore, PathLister
from gpucache_pipes.adapters import GPUCachedPathDataLoader
from gpucache_pipes.store.store import GPUFeatureStore as Store
from gpucache_pipes.testing.features import assert_same, features

Files = Callable[..., list[str]]
KINDS = ["staged", "simulated"]
NBYTES = 400


def memory_of(items: list[Any]) -> tuple[Callable[[str], Any], list[str], list[str]]:
    """A load_fn over features in memory, their paths, and the paths it was called with."""
    calls: list[str] = []

    def load(path: str) -> Any:
        calls.append(path)
        return items[int(path.rpartition("/")[2])]

    return load, [f"/features/{n}" for n in range(len(items))], calls


def wide(count: int) -> list[Any]:
    return [{"x": torch.full((NBYTES // 4,), n, dtype=torch.int32), "n": n} for n in range(count)]


def epoch(store: Store, paths: list[str], items: list[Any], order: Any, size: int = 10) -> None:
    store.begin_epoch()
    for at in range(0, len(order), size):
        some = [int(n) for n in order[at : at + size]]
        for n, feature in zip(some, store.get_batch([paths[n] for n in some]), strict=True):
            assert_same(feature, items[n])


def quiet(store: Store) -> Store:
    """Once reader threads have given up what they held in host memory, and counted it."""
    assert store._host is not None and store.wait_idle(30)
    deadline = time.monotonic() + 30
    while store._host.cache.pins.batches and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not store._host.cache.pins.batches
    return store


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    gpu=st.integers(0, 70), host=st.integers(1, 70), seed=st.integers(0, 99),
    policy=st.sampled_from(["clairvoyant", "keep"]), asynchronous=st.booleans(),
)  # fmt: skip
def test_hits_over_epochs_are_those_of_both_tiers(
    kind: str, gpu: int, host: int, seed: int, policy: str, asynchronous: bool
) -> None:
    """(G + H) / N of each epoch, as `simulate` says; and G of them on the device."""
    count = 100
    items = wide(count)
    load, paths, calls = memory_of(items)
    rng = np.random.default_rng(seed)
    with GPUFeatureStore(
        device_for(kind, seed), max_cache_bytes=max(1, gpu * NBYTES), load_fn=load, policy=policy,
        host_cache_bytes=host * NBYTES, asynchronous=asynchronous, reader_threads=1,
    ) as store:  # fmt: skip
        if gpu == 0:
            return
        epoch(store, paths, items, rng.permutation(count))
        before = store.stats()
        del calls[:]
        for _ in range(3):
            epoch(store, paths, items, rng.permutation(count))
            store.check()
        since = quiet(store).stats().since(before)
        assert since.hits == 3 * min(gpu, count)
        assert since.host_hits == 3 * min(host, count - min(gpu, count))
        assert len(calls) == 3 * max(0, count - gpu - host)
        assert store.stats().host_items == min(host, count - min(gpu, count))
        assert store.stats().host_cached_bytes == store.stats().host_items * NBYTES


@pytest.mark.parametrize("policy", ["lru", "fifo", "sieve", "w-tinylfu", "s3fifo"])
def test_policies_that_replace_use_host_memory_too(policy: str) -> None:
    items = wide(100)
    load, paths, calls = memory_of(items)
    rng = np.random.default_rng(0)
    reads = []
    for host in (1, 60 * NBYTES):
        with GPUFeatureStore(
            device_for("staged"), max_cache_bytes=20 * NBYTES, load_fn=load, policy=policy,
            host_cache_bytes=host,
        ) as store:  # fmt: skip
            for _ in range(6):
                epoch(store, paths, items, rng.permutation(100))
            store.check()
        reads.append(len(calls))
        del calls[:]
    assert reads[1] < 0.85 * reads[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    items=st.lists(features(), min_size=1, max_size=6), data=st.data(),
    page=st.sampled_from([None, 16, 64]), host=st.integers(1, 2000),
)  # fmt: skip
def test_any_features_come_back_as_they_were(
    kind: str, items: list[Any], data: st.DataObject, page: int | None, host: int
) -> None:
    load, paths, _ = memory_of(items)
    device = device_for(kind, 1)
    with GPUFeatureStore(
        device, max_cache_items=1, load_fn=load, page_bytes=page, host_cache_bytes=host
    ) as store:
        for _ in range(4):
            order = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=6))
            epoch(store, paths, items, order, size=3)
            store.check()
            if data.draw(st.booleans()):
                store.release([paths[n] for n in order[:2]])
            if data.draw(st.integers(0, 5)) == 0:
                store.clear()
                quiet(store)
                assert store.stats().host_items == 0
            store.check()


def test_host_memory_is_given_up_for_what_the_device_has(make_files: Files) -> None:
    items = wide(40)
    load, paths, _ = memory_of(items)
    with GPUFeatureStore(
        device_for("staged"), max_cache_bytes=10 * NBYTES, load_fn=load, host_cache_bytes="1MiB"
    ) as store:
        epoch(store, paths, items, range(40))
        assert (store.stats().items, quiet(store).stats().host_items) == (10, 30)
        assert all(path in store for path in paths)
        store.release(paths[:20])
        assert not any(path in store for path in paths[:20])
        held = [path for path in paths if path in store]
        epoch(store, paths, items, range(20, 40))
        stats = quiet(store).stats()
        assert stats.items + stats.host_items == len(held) == 20
        store.clear()
        assert (store.stats().host_items, store.stats().host_reserved_bytes) == (0, 0)
        epoch(store, paths, items, range(40))
        assert store.stats().host_items == 30


def test_warm_fills_both(make_files: Files) -> None:
    items = wide(100)
    load, paths, calls = memory_of(items)
    with GPUFeatureStore(
        device_for("staged"), max_cache_bytes=30 * NBYTES, load_fn=load,
        host_cache_bytes=40 * NBYTES,
    ) as store:  # fmt: skip
        assert store.warm(paths) == 70
        assert (store.stats().items, quiet(store).stats().host_items) == (30, 40)
        assert store.stats().hits == store.stats().misses == store.stats().host_hits == 0
        del calls[:]
        epoch(store, paths, items, range(100))
        assert len(calls) == 30


def test_a_loader_counts_it(make_files: Files) -> None:
    paths = make_files(20, lambda n: {"x": torch.full((100,), n)})
    lister = PathLister(paths, batch_size=5, shuffle=True)
    with GPUCachedPathDataLoader(
        lister, device=device_for("staged"), max_cache_items=8, host_cache_bytes="50%"
    ) as loader:
        for _ in range(3):
            assert sorted(int(n) for batch in loader for n in batch["x"][:, 0]) == list(range(20))
        stats = loader.stats()
        assert (stats.host_items, stats.files_read) == (12, 20)
        assert "host_hits" in str(stats)


def test_all_three_tiers(make_files: Files, tmp_path: Path) -> None:
    paths = make_files(60, lambda n: torch.full((100,), n))
    for path in paths:
        os.utime(path, (10**9, 10**9))
    for run in range(2):
        with GPUFeatureStore(
            device_for("staged"), max_cache_items=20, host_cache_bytes=25 * 800,
            disk_cache=tmp_path / "cache",
        ) as store:  # fmt: skip
            for number in range(3):
                store.begin_epoch()
                if number and not run:
                    assert store._disk is not None and store._disk.wait(30)
                for at in range(0, 60, 10):
                    for n, feature in enumerate(store.get_batch(paths[at : at + 10])):
                        assert_same(feature, torch.full((100,), at + n))
            stats = store.stats()
            assert stats.hits == 2 * 20 and stats.host_hits == 2 * 25
            assert stats.disk_hits == 2 * 15 + 60 * run
            assert stats.files_read == 60 + 2 * 15
            store.check()


def test_on_the_cpu_it_is_ignored_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with GPUFeatureStore("cpu", host_cache_bytes="1GiB") as store:
        assert store._host is None
    assert len(caplog.records) == 1 and "host_cache_bytes is ignored" in caplog.text
    with pytest.raises(ValueError, match="host_cache_bytes='0%'"):
        GPUFeatureStore("cpu", host_cache_bytes="0%")


def test_revalidate_looks_at_host_memory(make_files: Files) -> None:
    paths = make_files(4, lambda n: torch.tensor([n]))
    for path in paths:
        os.utime(path, (10**9, 10**9))
    with GPUFeatureStore(
        device_for("staged"), max_cache_items=1, host_cache_bytes="1MiB", revalidate=True
    ) as store:
        for _ in range(2):
            assert [int(f) for f in store.get_batch(paths)] == [0, 1, 2, 3]
        assert store.stats().host_hits == 3
        for path in paths:
            torch.save(torch.tensor([9]), path)
            os.utime(path, (2 * 10**9 // 2 + 5, 2 * 10**9 // 2 + 5))
        assert [int(f) for f in store.get_batch(paths)] == [9] * 4
        assert [int(f) for f in store.get_batch(paths)] == [9] * 4
        store.check()


def test_a_batch_from_host_memory_takes_a_copy_and_a_scatter_more() -> None:
    """And the host waits for nothing: see docs/design.md for the operations of a cached batch."""
    items = wide(64)
    load, paths, _ = memory_of(items)
    device = device_for("simulated")
    with GPUFeatureStore(
        device, max_cache_bytes=32 * NBYTES, load_fn=load, host_cache_bytes="1MiB",
        reader_threads=1, page_bytes=NBYTES,
    ) as store:  # fmt: skip
        store.warm(paths)
        cached = [
            path for path in paths if store._requests.cached([path]) and not _in_host(store, path)
        ]
        below = [path for path in paths if _in_host(store, path)]
        assert len(cached) == len(below) == 32
        runtime = device._runtime
        counts = []
        for some in (cached, below, below):
            store.wait_idle()
            operations, waits = runtime.operations, runtime.waits
            batch = store.get_batch(some)
            counts.append((runtime.operations - operations, runtime.waits - waits))
            del batch
        # The copy, the index of the scatter and the scatter itself.
        assert counts[1][0] - counts[0][0] <= 3
        assert counts[2][0] - counts[0][0] <= 3
        assert counts[2][1] <= 1, "a staging buffer is waited for, and nothing else"


def _in_host(store: Store, path: str) -> bool:
    assert store._host is not None
    return bool(store._host.are_here(store._requests.resolve([path]))[0])


def test_threads_share_it() -> None:
    items = wide(80)
    load, paths, _ = memory_of(items)
    errors: list[BaseException] = []
    with GPUFeatureStore(
        device_for("staged"), max_cache_bytes=20 * NBYTES, load_fn=load,
        host_cache_bytes=30 * NBYTES, reader_threads=3, policy="lru",
    ) as store:  # fmt: skip

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(40):
                    some = rng.integers(0, 80, 8).tolist()
                    batch = store.get_batch([paths[n] for n in some])
                    for n, feature in zip(some, batch, strict=True):
                        assert_same(feature, items[n])
                    if seed == 0:
                        store.release([paths[n] for n in some[:2]])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors
        store.check()


@pytest.mark.parametrize("how", ["release", "clear"])
def test_what_is_released_while_it_is_read_is_not_kept(how: str) -> None:
    go_on, begun = threading.Event(), threading.Event()
    value = 0

    def load(path: str) -> Any:
        held = torch.tensor([value])
        begun.set()
        assert go_on.wait(30)
        return held

    with GPUFeatureStore(device_for("staged"), load_fn=load, host_cache_bytes="1MiB") as store:
        batch = store.request(["/f/0"])
        assert begun.wait(30)
        store.release(["/f/0"]) if how == "release" else store.clear()
        value = 77
        go_on.set()
        assert int(batch.result()[0]) == 0
        assert "/f/0" not in store
        assert int(store.get("/f/0")) == 77
        store.check()


def test_a_tier_that_lacks_memory_once_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = wide(20)
    load, paths, _ = memory_of(items)
    with GPUFeatureStore(
        device_for("staged"), max_cache_items=2, load_fn=load, host_cache_bytes="1MiB"
    ) as store:
        tier = store._host
        assert tier is not None
        with monkeypatch.context() as patch:

            def lacking(*arguments: Any) -> None:
                tier.clear()
                raise MemoryError("none left")

            patch.setattr(tier, "_fill", lacking)
            epoch(store, paths, items, range(20))
        assert store.stats().host_items == 0
        assert len(caplog.records) == 1 and "none left" in caplog.text
        epoch(store, paths, items, range(20))
        assert store.stats().host_items >= 17
        store.check()


def test_a_handler_inside_of_the_tier_may_release_clear_and_close() -> None:
    items = wide(8)
    load, paths, _ = memory_of(items)
    store = GPUFeatureStore(
        device_for("staged"), max_cache_items=2, load_fn=load, host_cache_bytes="1MiB"
    )
    epoch(store, paths, items, range(8))
    tier = store._host
    assert tier is not None
    with tier.lock:  # as a signal handler finds it
        store.release(paths[:4])
        assert paths[0] in store
        store.stats()
    assert not any(path in store for path in paths[:4])
    with tier.lock:
        store.clear()
    assert not any(path in store for path in paths)
    with tier.lock:
        store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.get(paths[0])
