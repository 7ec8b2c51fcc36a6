"""Budgets, page sizes, and devices that are full."""

from collections.abc import Callable

import pytest
import torch

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.device import AcceleratorBackend, DeviceMemory, InOrderRuntime

Files = Callable[..., list[str]]


def test_too_large_for_the_budget(make_files: Files) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu", max_cache_bytes=39) as store:
        with pytest.raises(MemoryError, match=r"0000\.pt.* 40 bytes.*max_cache_bytes=39"):
            store.get(paths[0])
        with pytest.raises(MemoryError):
            store.get_batch(paths)


def test_a_batch_larger_than_the_cache_is_served(make_files: Files) -> None:
    paths = make_files(50)
    with GPUFeatureStore("cpu", max_cache_bytes=40 * 7) as store:
        for _ in range(3):
            batch = store.get_batch(paths).collate()
            assert batch["label"].flatten().tolist() == list(range(50))
            assert len(store) == 7
        assert store.stats().bypassed_items == 0


def test_a_budget_of_exactly_n_features_holds_n(make_files: Files) -> None:
    paths = make_files(10, lambda n: torch.full((3,), n))
    with GPUFeatureStore("cpu", max_cache_bytes=24 * 7) as store:
        store.get_batch(paths)
        assert len(store) == 7


class Broken(AcceleratorBackend):
    """Its device has room for two pages."""

    def grow(self, needed: int, useful: int | None, known: int | None = None) -> int:
        return super().grow(2, 2) if self.reserved_bytes == 0 and needed <= 2 else 0


def test_a_full_device_evicts_and_says_so_when_nothing_can_go(make_files: Files) -> None:
    paths = make_files(5)
    with GPUFeatureStore(Broken(InOrderRuntime(torch.device("cpu"))), policy="lru") as store:
        for _ in range(2):
            for n, path in enumerate(paths):
                assert int(store.get(path)["label"]) == n
                store.check()
        held = store.request(paths[:2])
        with pytest.raises(MemoryError, match=r"0002\.pt.*no device memory|no device memory.*0002"):
            store.get(paths[2])
        assert [int(f["label"]) for f in held.result()] == [0, 1]


def test_one_file_that_is_too_large_spoils_nothing(make_files: Files) -> None:
    sizes = [500, 10, 10, 10]
    paths = make_files(4, lambda n: torch.zeros(sizes[n]))
    with GPUFeatureStore("cpu", max_cache_bytes=1000) as store:
        with pytest.raises(MemoryError):
            store.get(paths[0])
        store.get_batch(paths[1:])
        assert len(store) == 3


@pytest.mark.parametrize("first", [4, 250_000])
def test_the_first_file_does_not_decide_alone(make_files: Files, first: int) -> None:
    sizes = [first, *range(1000, 31_000, 1000)]
    paths = make_files(len(sizes), lambda n: torch.zeros(sizes[n]))
    with GPUFeatureStore("cpu") as store:
        for path in paths:
            store.get(path)
        stats = store.stats()
        assert stats.padding_bytes < stats.cached_bytes / 8
        assert stats.page_bytes >= 256


def test_what_is_in_flight_beyond_the_budget_takes_few_segments() -> None:
    backend = AcceleratorBackend(InOrderRuntime(torch.device("cpu")))
    items = {f"/{n}": torch.full((1024,), n) for n in range(200)}
    with GPUFeatureStore(
        backend, load_fn=items.__getitem__, max_cache_bytes=10 * 8192, asynchronous=False
    ) as store:
        for _ in range(3):
            held = [store.request([path]) for path in items]
            assert [int(t.result()[0][0]) for t in held] == list(range(200))
        assert backend._pages.arena is not None and len(backend._pages.arena.segments) <= 3


@pytest.mark.parametrize("page_bytes", [None, 4096])
def test_a_feature_that_can_never_fit_costs_nothing(
    make_files: Files, page_bytes: int | None
) -> None:
    sizes = {"0005.pt": torch.zeros(1).expand(2**45)}
    paths = make_files(10, lambda n: sizes.get(f"{n:04d}.pt", torch.full((8,), n)))
    with GPUFeatureStore("cpu", page_bytes=page_bytes) as store:
        with pytest.raises(MemoryError):
            store.get(paths[5])
        others = paths[:5] + paths[6:]
        held = store.request(others[:1])
        store.get_batch(others[:5])
        with pytest.raises(MemoryError):
            store.get(paths[5])
        assert store.stats().evictions == 0
        store.get_batch(others)
        assert len(store) == 9
        held.result()


def test_what_is_left_to_others_does_not_stop_a_batch(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(40)
    runtime = InOrderRuntime(torch.device("cpu"))
    monkeypatch.setattr(runtime, "memory", lambda: DeviceMemory(5 << 30, 80 << 30, 0, 0, 0, 0))
    with GPUFeatureStore(AcceleratorBackend(runtime)) as store:
        for count in (1, 2, 40, 3):
            batch = store.get_batch(paths[:count])
            assert [int(feature["label"]) for feature in batch] == list(range(count))
            store.check()
