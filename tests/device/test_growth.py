"""How much memory an arena takes, by a model of torch's allocator."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_allocator import Block, CountingRuntime, SimulatedAllocator

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.cache import Cache, Ledger, check_cache, make_policy
from gpucache_pipes.device import AcceleratorBackend, DeviceMemory, growing_arena, growth
from gpucache_pipes.device.growth import ModelMemory

MiB, GiB = 1 << 20, 1 << 30
FEATURE = 64 * MiB


class Run:
    """A cache that files go through in batches, `depth` of which are pending. No bytes are read."""

    def __init__(self, budget: int | None, page_bytes: int, *, known: bool, **options: Any) -> None:
        self.allocator = SimulatedAllocator(80 * GiB)
        self.backend = AcceleratorBackend(CountingRuntime(self.allocator, **options))
        ledger = Ledger(budget, None)
        self.cache = Cache(ledger, make_policy("lru"), self.backend.grow, self.backend.shrink)
        ledger.page_bytes = page_bytes
        self.backend.configure(page_bytes)
        self.known = known
        self.pending: list[int] = []
        self.arenas = 0

    @property
    def segments(self) -> int:
        arena = self.backend._pages.arena
        assert arena is not None
        return len(arena.segments)

    def epoch(self, files: int, batch_size: int, depth: int) -> int:
        """Go through all files once; how often the arena has moved."""
        paths = list(map(str, range(files)))
        if self.known and not self.cache.entries.paths:
            self.cache.entries.add(paths, paths)
        order = random.Random(0).sample(range(files), files)
        moves, arena = 0, self.backend._pages.arena
        for start in range(0, files, batch_size):
            numbers = order[start : start + batch_size]
            if not self.known:
                known = len(self.cache.entries.paths)
                numbers = [self._number_of(path, known) for path in numbers]
            if self.known:
                self.cache.arena.files_in_flight = batch_size * (1 + depth)
            self.pending.append(self.cache.open_batch(np.array(numbers), None))
            for number in numbers:
                self._load(number)
            if len(self.pending) > depth:
                self.cache.close_batches([self.pending.pop(0)])
            moves += arena is not self.backend._pages.arena
            arena = self.backend._pages.arena
        check_cache(self.cache)
        return moves

    def _number_of(self, path: int, known: int) -> int:
        self.numbers: dict[int, int] = getattr(self, "numbers", {})
        if path not in self.numbers:
            self.numbers[path] = self.cache.entries.add([str(path)], [str(path)])
        return self.numbers[path]

    def _load(self, number: int) -> None:
        numbers = np.array([number])
        if self.cache.start_loading(numbers):
            layout = self.cache.allocator.layout_number(number, "layout", FEATURE, FEATURE)
            assert not self.cache.allocator.allocate(numbers, np.array([layout]))
            self.cache.finish_loading(numbers, [()])


CASES = [
    *itertools.product((8, 20, 40, 60), (4 * MiB,), (0.2, 0.6, 1.25), (True, False), (True, False)),
    # Features of 16,384 pages take a second or more.
    *itertools.product((8, 20), (4096,), (1.25,), (True, False), (True,)),
]


@pytest.mark.parametrize(
    ("budget", "page_bytes", "in_flight", "known", "returns_memory"), CASES, ids=str
)
def test_a_budget_is_what_is_reserved(
    budget: int, page_bytes: int, in_flight: float, known: bool, returns_memory: bool
) -> None:
    depth = 2
    batch_size = max(1, int(in_flight * GiB / FEATURE / (depth + 1)))
    run = Run(budget * GiB, page_bytes, known=known, returns_memory=returns_memory)
    idle = run.allocator.malloc(6 * GiB, stream=0)
    run.allocator.free(idle)  # the activations of a model, between two steps
    files = int(budget * GiB / FEATURE * 1.3)
    moves = run.epoch(files, batch_size, depth)
    assert run.epoch(files, batch_size, depth) == 0, "the arena moves in a steady state"
    wanted = budget * GiB + (depth + 1) * batch_size * FEATURE
    assert run.allocator.peak_reserved - 6 * GiB <= 1.05 * wanted
    assert run.allocator.retries == 0, "the cache of the allocator was freed"
    if known:
        assert (run.segments, moves) == (1, 0)
    else:
        assert run.segments <= (3 if returns_memory else 9)
        assert moves <= 10


@pytest.mark.parametrize("files", [3, 40])
def test_no_more_is_allocated_than_the_known_files_need(files: int) -> None:
    run = Run(40 * GiB, 4 * MiB, known=True)
    run.epoch(files, 2, 2)
    assert run.allocator.peak_reserved <= max(files * FEATURE, 64 * MiB)
    assert run.segments == 1


def test_more_files_than_were_known_move_a_small_arena_once() -> None:
    run = Run(40 * GiB, 4 * MiB, known=True)
    run.epoch(30, 2, 2)
    run.cache.entries.add(*[[f"more {n}" for n in range(200)]] * 2)
    for number in range(30, 230):
        run._load(number)
    assert run.segments == 1
    assert run.allocator.peak_reserved <= 1.05 * (30 + 230) * FEATURE


def test_a_budget_beyond_the_device_takes_what_the_driver_has() -> None:
    run = Run(100 * GiB, 4 * MiB, known=True)
    weights = run.allocator.malloc(10 * GiB, stream=0)
    idle = run.allocator.malloc(20 * GiB, stream=0)
    run.allocator.free(idle)
    run.epoch(int(60 * GiB / FEATURE), 4, 2)
    # Idle memory of the model is taken last, and only for what batches need.
    assert run.allocator.retries <= 1 and weights.in_use
    assert run.cache.ledger.cached_bytes >= 48 * GiB


# Without a budget


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_arena, "FIRST_BYTES", 4 * MiB)
    monkeypatch.setattr(growth, "SHARES", ((10, 1), (0, 8)))


class Model:
    """A model that takes memory for a step, and gives it back to the allocator."""

    def __init__(self, allocator: SimulatedAllocator, weights: int) -> None:
        self.allocator = allocator
        self.weights = allocator.malloc(weights, stream=0)
        self.peak = 0

    def step(self, nbytes: int, parts: int = 4) -> None:
        held: list[Block] = []
        try:
            held.extend(self.allocator.malloc(nbytes // parts, stream=0) for _ in range(parts))
        finally:
            for block in held:
                self.allocator.free(block)
        self.peak = max(self.peak, nbytes)


def unbudgeted(total: int) -> tuple[SimulatedAllocator, GPUFeatureStore]:
    allocator = SimulatedAllocator(total)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(total >> 12, dtype=torch.uint8)
    store = GPUFeatureStore(backend, load_fn=lambda path: feature, asynchronous=False)
    return allocator, store


@pytest.mark.usefixtures("small_device")
@settings(max_examples=5)
@given(
    weights=st.integers(8, 320),
    first=st.integers(32, 480),
    factors=st.lists(st.integers(50, 110), min_size=1, max_size=12),
    parts=st.integers(1, 6),
)
def test_a_step_a_tenth_larger_than_before_fits_beside_the_cache(
    weights: int, first: int, factors: list[int], parts: int
) -> None:
    allocator, store = unbudgeted(2 * GiB)
    model = Model(allocator, weights * MiB)
    with store:
        paths = [f"/{n}" for n in range(4000)]
        for step in range(60):
            store.get_batch(paths[step * 64 : step * 64 + 64])
            model.step(first * MiB, parts)
        grown = store.stats().reserved_bytes
        assert grown >= 500 * MiB, "the cache leaves the rest of the device unused"
        for at, factor in enumerate(factors):
            size = model.peak * factor // 100
            for step in range(40):
                start = (at * 40 + step) * 64 % 4000
                store.get_batch(paths[start : start + 64])
                if (weights * MiB + size) < 1.5 * GiB:
                    model.step(size, parts)
        store.check()


@pytest.mark.usefixtures("small_device")
def test_pages_go_back_when_the_model_runs_short() -> None:
    allocator, store = unbudgeted(256 * MiB)
    model = Model(allocator, 8 * MiB)
    with store:
        paths = [f"/{n}" for n in range(4000)]

        def batches(count: int) -> None:
            for step in range(count):
                store.get_batch(paths[step * 64 : step * 64 + 64])

        model.step(16 * MiB)
        batches(60)
        before = store.stats()
        assert before.reserved_bytes > 120 * MiB
        with pytest.raises(torch.OutOfMemoryError):
            model.step(120 * MiB)
        batches(33)
        after = store.stats()
        assert after.reserved_bytes < before.reserved_bytes and after.items > 0
        store.check()
        for _ in range(5):  # what it frees each time is half of what is missing, or more
            try:
                model.step(120 * MiB)
                break
            except torch.OutOfMemoryError:
                batches(33)
        model.step(120 * MiB)
        batches(60)
        assert store.stats().reserved_bytes <= after.reserved_bytes, "the cache has grown again"
        store.check()


@pytest.mark.usefixtures("small_device")
def test_yielding_makes_room_for_a_step_of_any_size() -> None:
    allocator, store = unbudgeted(256 * MiB)
    model = Model(allocator, 8 * MiB)
    with store:
        paths = [f"/{n}" for n in range(4000)]
        for step in range(60):
            store.get_batch(paths[step * 64 : step * 64 + 64])
        pending = store.request(paths[:64])
        with pytest.raises(torch.OutOfMemoryError):
            model.step(200 * MiB)
        store.yield_memory_to(model.step, 200 * MiB)
        assert store.stats().items == 64
        assert len(pending.result()) == 64
        with pytest.raises(torch.OutOfMemoryError, match="of 268435456"):
            store.yield_memory_to(model.step, 300 * MiB)
        assert len(store.get_batch(paths[:64])) == 64
        store.check()


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize("budget", [None, 200 * MiB])
@pytest.mark.parametrize("how", ["pipeline", "warm"])
def test_a_data_set_that_fits_takes_one_segment_or_two(how: str, budget: int | None) -> None:
    allocator = SimulatedAllocator(GiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(64 << 10, dtype=torch.uint8)
    paths = [f"/{n}" for n in range(1000)]
    with GPUFeatureStore(
        backend, load_fn=lambda path: feature, max_cache_bytes=budget, asynchronous=False
    ) as store:
        if how == "warm":
            assert store.warm(paths, progress=False) == 1000
        for _ in range(2):
            list(GPUPrefetcher(PathLister(paths, batch_size=20, shuffle=True), store))
        assert len(store) == 1000
        arena = backend._pages.arena
        assert arena is not None and len(arena.segments) <= (2 if budget is None else 1)
        assert allocator.peak_reserved <= 1.05 * 64 * MiB + 20 * MiB


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize("pending", [0, 3])
def test_the_cache_grows_again_beside_what_a_large_step_has_needed(pending: int) -> None:
    allocator = SimulatedAllocator(1536 * MiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(512 << 10, dtype=torch.uint8)
    paths = [f"/{n}" for n in range(1600)]
    with GPUFeatureStore(backend, load_fn=lambda path: feature, asynchronous=False) as store:
        model = Model(allocator, MiB)

        def epoch(step: int) -> None:
            held = []
            for start in range(0, 1600, 64):
                held.append(store.request(paths[start : start + 64]))
                if len(held) > pending:
                    held.pop(0).result()
                    store.yield_memory_to(model.step, step)
            for batch in held:
                batch.result()

        for _ in range(3):
            epoch(200 * MiB)
        retries = allocator.retries
        epoch(1000 * MiB)
        assert allocator.retries > retries, "the large step fits without yielding"
        assert 1000 * MiB <= backend._pages._model.peak <= 1100 * MiB
        retries = allocator.retries
        for _ in range(3):
            epoch(1000 * MiB)
        assert len(store) > 300, "the cache has not grown again"
        assert allocator.retries == retries, "the cache has taken the room of the step"
        arena = backend._pages.arena
        assert arena is not None and len(arena.segments) <= 10
        held = sum(r.pool._block.size for r in arena._reservations)  # type: ignore[attr-defined]
        assert held <= 1.1 * arena.nbytes, "more is reserved than the arena uses"
        store.check()


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize("accumulate", [1, 16, 64])
@pytest.mark.parametrize("statistics", [0, 40, 70])
def test_batches_without_a_step_do_not_show_what_a_model_needs(
    accumulate: int, statistics: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the shares as they are
    allocator = SimulatedAllocator(GiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(256 << 10, dtype=torch.uint8)
    with GPUFeatureStore(backend, load_fn=lambda path: feature, asynchronous=False) as store:
        model: Model | None = None
        for batch in range(160):
            store.get_batch([f"/{n}" for n in range(batch * 32, batch * 32 + 32)])
            if batch < statistics:
                continue
            model = model or Model(allocator, 80 * MiB)
            model.step(160 * MiB)
            if (batch + 1) % accumulate == 0:
                allocator.malloc(120 * MiB, stream=0)  # the optimizer's state, which stays
                accumulate = 1 << 30
        assert allocator.failures == 0


@pytest.mark.usefixtures("small_device")
def test_a_number_of_items_is_no_leave_to_take_the_device() -> None:
    allocator = SimulatedAllocator(GiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(MiB, dtype=torch.uint8)
    with GPUFeatureStore(backend, load_fn=lambda path: feature, max_cache_items=5000) as store:
        store.get_batch([f"/{n}" for n in range(4)])
        assert allocator.reserved <= GiB // 8


def test_what_the_device_cannot_have_is_not_tried_again_and_again() -> None:
    allocator = SimulatedAllocator(256 * MiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(8 * MiB, dtype=torch.uint8)
    with GPUFeatureStore(backend, load_fn=lambda path: feature, asynchronous=False) as store:
        held = [store.request([f"/{n}"]) for n in range(60)]
        errors = [batch for batch in held if batch.wait()]
        assert len(errors) > 20
        assert allocator.retries <= 4, "each file made the allocator free its cache"
        assert not backend._pages._model.short, "the failures of the store are the model's"


@pytest.mark.parametrize("budget", [None, 600 * MiB])
@pytest.mark.parametrize("idle", [False, True])
def test_memory_that_the_model_has_freed_is_there_for_what_a_batch_needs(
    budget: int | None, idle: bool
) -> None:
    allocator = SimulatedAllocator(GiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(8 * MiB, dtype=torch.uint8)
    with GPUFeatureStore(
        backend, load_fn=lambda path: feature, max_cache_bytes=budget, asynchronous=False
    ) as store:
        block = allocator.malloc(1020 * MiB, stream=0)
        if not idle:
            for _ in range(2):
                with pytest.raises(MemoryError):
                    store.get("/a")
        # It stays in the cache of the allocator, which does not free it for a pool.
        allocator.free(block)
        assert allocator.free_bytes < 8 * MiB
        assert len(store.get("/a")) == 8 * MiB


def test_a_budget_beyond_the_device_is_used_again_after_yielding() -> None:
    allocator = SimulatedAllocator(256 * MiB)
    backend = AcceleratorBackend(CountingRuntime(allocator, holds=True))
    feature = torch.zeros(MiB, dtype=torch.uint8)
    paths = [f"/{n}" for n in range(300)]
    with GPUFeatureStore(
        backend,
        load_fn=lambda path: feature,
        max_cache_bytes=400 * MiB,
        policy="lru",
        asynchronous=False,
    ) as store:
        for path in paths:
            store.get(path)
        assert len(store) > 200
        pending = store.request(paths[:8])

        def step() -> None:
            allocator.free(allocator.malloc(200 * MiB, stream=0))

        store.yield_memory_to(step)
        assert len(store) == 8
        pending.cancel()
        allocator.empty_cache()
        for path in paths:
            store.get(path)
        assert len(store) > 150
        store.check()


@pytest.mark.usefixtures("small_device")
def test_the_files_of_each_pipeline_count_until_the_memory_is_cleared() -> None:
    allocator = SimulatedAllocator(8 * GiB)
    backend = AcceleratorBackend(CountingRuntime(allocator))
    feature = torch.zeros(MiB, dtype=torch.uint8)
    with GPUFeatureStore(backend, load_fn=lambda path: feature, asynchronous=False) as store:

        def run(files: int, name: str) -> list[int]:
            paths = [f"/{name}/{n}" for n in range(files)]
            list(GPUPrefetcher(PathLister(paths, batch_size=10), store))
            arena = backend._pages.arena
            assert arena is not None
            return arena.segments

        run(20, "val")
        segments = run(600, "train")
        assert len(segments) <= 4 and sum(segments) <= 630
        store.clear()
        assert sum(run(50, "small")) <= 60


def test_little_is_taken_before_the_peak_of_a_step_is_known() -> None:
    model = ModelMemory()
    memory = DeviceMemory(
        free=70 * GiB, total=80 * GiB, reserved=9 * GiB, allocated=0, peak=9 * GiB, shortages=0
    )
    model.look(memory, 0, 0)
    spare = [model.spare(memory, 0, batches) // GiB for batches in (0, 9, 10, 99, 100, 999)]
    assert spare == [8, 8, 17, 17, 35, 35]
    # Afterwards the model keeps its peak and a tenth, of which it has reserved a part.
    expected = 70 * GiB - int(0.9 * GiB) - 5 * GiB
    assert abs(model.spare(memory, 0, 1000) - expected) < MiB
    # A peak that rises is not trusted yet.
    model.look(memory._replace(peak=20 * GiB, reserved=20 * GiB), 0, 1500)
    assert model.spare(memory, 0, 1501) // GiB == 8


def test_idle_memory_of_the_model_is_not_spare() -> None:
    model = ModelMemory()
    memory = DeviceMemory(
        free=GiB, total=80 * GiB, reserved=79 * GiB, allocated=0, peak=70 * GiB, shortages=0
    )
    model.look(memory, 0, 0)
    assert model.spare(memory, 0, 1000) <= 0


class Failing(CountingRuntime):
    """The device refuses the allocations with these numbers."""

    def __init__(self, refused: set[int]) -> None:
        super().__init__(SimulatedAllocator(GiB), holds=True)
        self.refused = refused
        self.count = 0

    def reserve(self, nbytes: int) -> Any:
        self.count += 1
        if self.count - 1 in self.refused:
            raise torch.OutOfMemoryError(f"no {nbytes} bytes")
        return super().reserve(nbytes)


@given(
    refused=st.sets(st.integers(0, 8), max_size=6),
    budget=st.sampled_from([None, 6000, 20_000]),
    reader_threads=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_batches_are_exact_whichever_allocation_fails(
    refused: set[int], budget: int | None, reader_threads: int, seed: int
) -> None:
    files = {f"/{n}": torch.full((60 + n % 7,), n) for n in range(40)}
    paths = list(files)
    with (
        pytest.MonkeyPatch.context() as patch,
        GPUFeatureStore(
            AcceleratorBackend(Failing(refused)),
            load_fn=files.__getitem__,
            max_cache_bytes=budget,
            asynchronous=reader_threads > 0,
            reader_threads=reader_threads or None,
        ) as store,
    ):
        patch.setattr(growing_arena, "FIRST_BYTES", 1024)
        patch.setattr(growing_arena, "LEAST_BYTES", 1024)
        choose = random.Random(seed)
        for _ in range(12):
            wanted = [choose.choice(paths) for _ in range(6)]
            try:
                batch = store.get_batch(wanted)
            except MemoryError:
                continue
            for path, feature in zip(wanted, batch, strict=True):
                assert torch.equal(feature, files[path])
            store.check()
