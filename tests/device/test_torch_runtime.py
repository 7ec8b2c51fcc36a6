"""Runtimes of real devices, over imitations of the modules of torch that they ask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpucache_pipes.device import DeviceMemory, InOrderRuntime, TorchRuntime, torch_runtime

CUDA = torch.device("cuda", 1)
STATS = {
    "reserved_bytes": {"all": {"current": 600, "peak": 700}},
    "allocated_bytes": {"all": {"current": 300, "peak": 550}},
    "num_alloc_retries": 2,
    "num_ooms": 1,
}


def runtime_on(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> TorchRuntime:
    """A runtime whose device module has these functions and no others."""
    runtime = TorchRuntime(CUDA)
    monkeypatch.setattr(torch_runtime.torch, "cuda", SimpleNamespace(**functions))
    return runtime


def test_memory_that_torch_has_reserved_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_on(
        monkeypatch,
        mem_get_info=lambda device: (1000, 8000),
        memory_stats_as_nested_dict=lambda device: STATS,
    )
    assert runtime.memory() == DeviceMemory(1000, 8000, 600, 300, 550, 3)


@pytest.mark.parametrize(("share", "free"), [(1.0, 5000), (0.5, 3400), (0.05, 0)])
def test_the_fraction_of_the_process_is_the_size_of_the_device(
    monkeypatch: pytest.MonkeyPatch, share: float, free: int
) -> None:
    runtime = runtime_on(
        monkeypatch,
        mem_get_info=lambda device: (5000, 8000),
        memory_stats_as_nested_dict=lambda device: STATS,
        get_per_process_memory_fraction=lambda device: share,
    )
    memory = runtime.memory()
    assert memory is not None
    assert (memory.free, memory.total) == (free, int(8000 * share))


def refuse(device: Any) -> Any:
    raise RuntimeError("does not support querying the available free memory")


def test_a_device_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_on(monkeypatch, mem_get_info=refuse).memory() is None
    assert runtime_on(monkeypatch).memory() is None


def test_an_allocator_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pluggable allocator has none."""
    runtime = runtime_on(
        monkeypatch,
        mem_get_info=lambda device: (5000, 8000),
        memory_stats_as_nested_dict=refuse,
    )
    assert runtime.memory() == DeviceMemory(5000, 8000, 0, 0, 0, 0)


class Pools:
    """torch.cuda with memory pools, or with an allocator that has none."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.pools: list[int] = []

    def mem_pool(self) -> object:
        if self.error is not None:
            raise self.error
        self.pools.append(len(self.pools))
        return object()

    def use(self, pool: object, device: torch.device) -> Any:
        assert device == CUDA
        return torch.inference_mode(False)  # any context


@pytest.mark.parametrize("error", [None, RuntimeError("does not support MemPool")])
def test_a_reservation_has_a_pool_of_its_own_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    pools = Pools(error)
    runtime = runtime_on(monkeypatch, MemPool=pools.mem_pool, use_mem_pool=pools.use)
    monkeypatch.setattr(runtime, "_has_pools", True)
    empty = torch.empty
    monkeypatch.setattr(
        torch_runtime.torch, "empty", lambda *size, **where: empty(*size, dtype=where["dtype"])
    )
    one, other = runtime.reserve(100), runtime.reserve(20 << 20)
    assert one.memory is not None and one.memory.numel() == 100
    assert other.memory is not None and other.memory.numel() == 20 << 20
    assert runtime.returns_memory == (error is None)
    assert len(pools.pools) == (2 if error is None else 0)


def test_a_lack_of_memory_is_not_taken_for_a_lack_of_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = Pools(torch.OutOfMemoryError("no memory"))
    emptied: list[int] = []
    runtime = runtime_on(
        monkeypatch,
        MemPool=pools.mem_pool,
        use_mem_pool=pools.use,
        empty_cache=lambda: emptied.append(1),
    )
    monkeypatch.setattr(runtime, "_has_pools", True)
    with pytest.raises(torch.OutOfMemoryError):
        runtime.reserve(100)
    assert runtime.returns_memory
    # Torch does not do it for an allocation in a pool.
    assert emptied == [1]


def test_mps_has_no_class_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = InOrderRuntime(torch.device("cpu"))

    def empty(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "MPS backend out of memory (MPS allocated: 1.00 GB, max allowed: 1.1 GB)"
        )

    monkeypatch.setattr(torch_runtime.torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match="MPS allocated"):
        runtime.reserve(100)
    monkeypatch.setattr(torch_runtime.torch, "empty", refuse)
    with pytest.raises(TypeError):  # anything else is what it is
        runtime.reserve(100)


def test_views_are_gone_before_the_pool_of_their_memory() -> None:
    order: list[str] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            order.append(self.name)

    reservation = torch_runtime.Reservation(Watched("memory"), Watched("pool"))  # type: ignore[arg-type]
    del reservation
    assert order == ["memory", "pool"]
