"""Arenas, backends and host memory: a gather returns the uploaded bytes."""

import logging
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes.device import (
    AcceleratorBackend,
    Backend,
    HostBackend,
    InOrderRuntime,
    _warn_of_the_rank,
    host,
    open_backend,
    resolve_device,
)
from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.memory import available_host_bytes
from gpucache_pipes.device.results import ResultMemory
from gpucache_pipes.store.page_size import choose_page_bytes

CPU = torch.device("cpu")


def index(numbers: Any) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


@given(st.data(), st.sampled_from([16, 48, 4112]))
def test_several_segments_gather_as_one(data: st.DataObject, page_bytes: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    arena, model = Arena(page_bytes, CPU), {}
    for rows in sizes:
        assert arena.add_segment(torch.zeros(rows * page_bytes + 5, dtype=torch.uint8)) == rows
    page = st.integers(0, sum(sizes) - 1)
    for round_ in range(3):
        pages = data.draw(st.lists(page, min_size=1, max_size=6, unique=True))
        rows = torch.randint(0, 256, (len(pages), page_bytes), dtype=torch.uint8)
        arena.scatter(pages, rows, index)
        model.update(zip(pages, rows, strict=True))
        wanted = data.draw(st.lists(st.sampled_from(sorted(model)), min_size=1, max_size=8))
        start = data.draw(st.integers(0, page_bytes // 16 - 1)) * 16
        length = data.draw(st.integers(1, page_bytes - start))
        got = arena.gather(wanted, [(start, length), (0, page_bytes)], index)
        for column, (a, n) in zip(got, [(start, length), (0, page_bytes)], strict=True):
            assert column.is_contiguous()
            expected = torch.stack([model[p][a : a + n] for p in wanted])
            assert torch.equal(column.view(torch.uint8), expected), round_


@given(st.data(), st.integers(1, 70), st.booleans())
def test_long_rows_are_the_same_where_readers_are_busy(
    data: st.DataObject, length: int, large: bool
) -> None:
    pages = data.draw(st.lists(st.integers(0, 4), max_size=8))
    start = data.draw(st.integers(0, (80 - length) // 16)) * 16
    memory = torch.randint(0, 256, (5 * 80,), dtype=torch.uint8)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpucache_pipes.device.arena.LONG_ROW", 1)
        patch.setattr("gpucache_pipes.device.arena.LARGE", 1 if large and pages else 1 << 40)
        for busy in (True, False):
            arena = Arena(80, CPU, ResultMemory(), lambda busy=busy: busy)
            arena.add_segment(memory)
            results.append(arena.gather(pages, [(start, length), (0, 80)], index))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous()
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@given(st.data(), st.booleans(), st.booleans())
def test_consecutive_pages_are_joined_like_any_pages(
    data: st.DataObject, busy: bool, long: bool
) -> None:
    memory = torch.randint(0, 256, (9 * 48,), dtype=torch.uint8)
    ranges = st.builds(range, st.integers(0, 5), st.integers(1, 9))
    runs = data.draw(st.lists(ranges, max_size=5))
    others = data.draw(st.lists(st.lists(st.integers(0, 8), max_size=3).map(tuple), max_size=1))
    placements = [*others, *runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpucache_pipes.device.arena.LONG_ROW", 1 if long else 1 << 40)
        arena = Arena(48, CPU, ResultMemory(), lambda: busy)
        arena.add_segment(memory)
        joined = arena.join(placements, index)
    rows = memory.view(9, 48)
    expected = [rows[page] for pages in placements for page in pages]
    assert joined.dtype == torch.uint8 and joined.dim() == 1
    assert torch.equal(joined, torch.cat([torch.empty(0, dtype=torch.uint8), *expected]))


@pytest.mark.parametrize("page", [-1, 5])
def test_a_page_outside_the_arena_raises(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpucache_pipes.device.arena.LONG_ROW", 1)
    arena = Arena(80, CPU, ResultMemory(), lambda: True)
    arena.add_segment(torch.zeros(5 * 80, dtype=torch.uint8))
    with pytest.raises(IndexError):
        arena.gather([0, page], [(0, 80)], index)
    with pytest.raises(IndexError):
        arena.join([range(1), range(page, page + 1)], index)


def test_large_results_reuse_memory_only_once_it_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpucache_pipes.device.arena.LARGE", 1)
    host = HostBackend()
    host.configure(64)
    host.grow(4, None)
    upload = host.upload([[0], [1], [2], [3]])
    for n in range(4):
        upload.buffers(n)[0][:] = bytes([n]) * 64
    upload.finish()

    def gather(*pages: int) -> torch.Tensor:
        [result] = host.gather(pages, [(0, 64)])
        assert result.view(torch.uint8)[:, 0].tolist() == list(pages)
        return result

    first = gather(0, 1)
    place = first.data_ptr()
    view = first[1].view(torch.uint8)[3:5].numpy()
    del first
    second = gather(2, 3)
    assert second.data_ptr() != place and view.tolist() == [1, 1]
    del view
    third = gather(3, 2)
    assert third.data_ptr() == place and second.view(torch.uint8)[:, 9].tolist() == [2, 3]
    # A region is not reused for a result of less than half its size, and only a few are kept.
    large = gather(0, 1, 2, 3)
    place = large.data_ptr()
    del large
    assert gather(1).data_ptr() != place
    several = [gather(n % 4, 0) for n in range(20)]
    del several
    assert len(host._results._free) <= 4
    host.close()
    assert second.view(torch.uint8)[:, 9].tolist() == [2, 3]


def test_results_have_their_own_storage_and_survive_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpucache_pipes.device.arena.LARGE", 1)
    host = HostBackend()
    host.configure(64)
    host.grow(2, None)
    host.upload([[0], [1]]).finish()
    [large] = host.gather([0, 1], [(0, 64)])
    del large
    [result] = host.gather([0], [(0, 64)])
    assert result.untyped_storage().nbytes() == 64  # although it reuses the larger region
    child = os.fork()
    if not child:
        os._exit(int(result.view(torch.uint8).sum()))
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture(params=["host", "staged"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "host":
        return HostBackend()
    return AcceleratorBackend(InOrderRuntime(CPU))


def upload(backend: Backend, placements: list[list[int]], contents: list[bytes]) -> None:
    up = backend.upload(placements)
    for number, content in enumerate(contents):
        done = 0
        for buffer in up.buffers(number):
            part = content[done : done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        assert done == len(content)
    up.finish()


def test_upload_and_gather(backend: Backend) -> None:
    backend.configure(32)
    pages = backend.grow(5, None)
    assert pages >= 5
    contents = [bytes([n]) * 32 * len(p) for n, p in enumerate([[0, 1], [4], [3, 2]])]
    upload(backend, [[0, 1], [4], [3, 2]], contents)
    [rows] = backend.gather([4, 2, 2, 1], [(0, 32)])
    assert rows.view(torch.uint8)[:, 0].tolist() == [1, 2, 2, 0]
    upload(backend, [[2]], [b"\x09" * 32])
    [rows] = backend.gather([2, 3], [(16, 8)])
    assert rows.view(torch.uint8)[:, 7].tolist() == [9, 2]
    assert backend.reserved_bytes >= 5 * 32
    backend.reset()
    assert backend.reserved_bytes == 0
    backend.configure(16)
    assert backend.grow(1, 1) >= 1
    backend.close()
    backend.close()


def test_growing_stops_at_what_is_useful(backend: Backend) -> None:
    backend.configure(1 << 16)
    assert backend.grow(1, 3) == 3
    before = backend.reserved_bytes
    assert before == 3 << 16
    # Beyond the budget the steps grow with the pages held there, so there are few segments.
    steps = [backend.grow(1, 3 - backend.reserved_bytes // (1 << 16)) for _ in range(3)]
    assert steps == ([1, 1, 1] if isinstance(backend, HostBackend) else [160] * 3)


def test_host_memory_is_finite(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "available_host_bytes", lambda: 10 * 4096 / 0.9)
    backend = HostBackend()
    backend.configure(4096)
    assert backend.grow(1, 4) == 4
    assert backend.grow(1, None) == 6
    with caplog.at_level(logging.WARNING, "gpucache_pipes"):
        assert backend.grow(1, None) == 0
    assert "40960 bytes" in caplog.text


def test_without_any_host_memory_growing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_host_bytes", lambda: int(2.5 * 4096))
    backend = HostBackend()
    backend.configure(4096)
    with pytest.raises(MemoryError, match=r"the 12288 bytes .*\(10240 bytes are free\)"):
        backend.grow(3, None)
    # A smaller request is served.
    assert backend.grow(2, None) == 2
    assert backend.grow(1, None) == 0


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50).filter(any))
def test_pages_waste_little(spans: list[int]) -> None:
    page = choose_page_bytes(spans)
    assert page % 16 == 0
    held = sum(-(-span // page) * page for span in spans)
    assert page == 64 or held <= sum(spans) * 16 / 15 + 16 * len(spans)


def test_equal_sizes_get_a_page_each() -> None:
    assert choose_page_bytes([4104] * 9) == 4112
    assert choose_page_bytes([1]) == 16
    assert choose_page_bytes([0, 100, 100]) == 112


def test_devices() -> None:
    assert resolve_device("cpu") == CPU == resolve_device(torch.device("cpu", 0))
    assert isinstance(open_backend(CPU), HostBackend)
    for wrong in ("quantum", "cuda:99", 12345):
        with pytest.raises(ValueError, match="device="):
            resolve_device(wrong)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """machine(devices, current, LOCAL_RANK): torch as on a machine with several GPUs."""
    _warn_of_the_rank.cache_clear()
    caplog.set_level(logging.WARNING, "gpucache_pipes")

    def make(devices: int, current: int, rank: str | None) -> None:
        found = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)
        if rank is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", rank)

    yield make
    _warn_of_the_rank.cache_clear()


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_rank_that_has_set_no_device_takes_its_own(
    machine: Any, caplog: pytest.LogCaptureFixture, device: str | None
) -> None:
    machine(4, 0, "2")
    assert resolve_device(device) == resolve_device(device) == torch.device("cuda", 2)
    [record] = caplog.records
    assert record.name == "gpucache_pipes" and record.levelname == "WARNING"
    said = record.getMessage()
    for part in ("LOCAL_RANK is 2", "takes cuda:2", "share", "set_device_index(2)", "set_device "):
        assert part in said


@pytest.mark.parametrize(
    ("devices", "current", "rank", "expected"),
    [
        (4, 0, None, 0),
        (4, 0, "0", 0),
        (4, 3, "1", 3),  # the program has chosen
        (2, 0, "2", 0),  # fewer devices than ranks
        (1, 0, "1", 0),
        (4, 0, "first", 0),
        (4, 0, "-1", 0),
        (4, 0, "", 0),
        (4, 0, "9" * 5000, 0),
    ],
)
def test_otherwise_the_current_device_is_taken(
    machine: Any,
    caplog: pytest.LogCaptureFixture,
    devices: int,
    current: int,
    rank: str | None,
    expected: int,
) -> None:
    machine(devices, current, rank)
    for device in (None, "cuda"):
        assert resolve_device(device) == torch.device("cuda", expected)
    assert not caplog.records


def test_a_device_with_an_index_is_taken_as_it_is(
    machine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    machine(4, 0, "2")
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    assert resolve_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU
    assert not caplog.records


def test_available_memory() -> None:
    assert 1 << 20 < available_host_bytes() < 1 << 50
