"""Arenas, backends and host memory: a gather returns the uploaded bytes."""

import logging
import os
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
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
    host_copies,
    open_backend,
    resolve_device,
    results,
)
from gpucache_pipes.device.arena import Arena
from gpucache_pipes.device.memory import available_host_bytes
from gpucache_pipes.store.page_size import choose_page_bytes

CPU = torch.device("cpu")


index = torch.from_numpy


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
        write = arena.fill if round_ % 2 else partial(arena.scatter, index=index)
        write(np.array(pages), rows)
        model.update(zip(pages, rows, strict=True))
        wanted = data.draw(st.lists(st.sampled_from(sorted(model)), min_size=1, max_size=8))
        start = data.draw(st.integers(0, page_bytes // 16 - 1)) * 16
        length = data.draw(st.integers(1, page_bytes - start))
        got = arena.gather(np.array(wanted), [(start, length), (0, page_bytes)], index)
        for column, (a, n) in zip(got, [(start, length), (0, page_bytes)], strict=True):
            assert column.is_contiguous()
            expected = torch.stack([model[p][a : a + n] for p in wanted])
            assert torch.equal(column.view(torch.uint8), expected), round_


@given(st.data(), st.sampled_from([16, 48]))
def test_stretches_of_several_segments(data: st.DataObject, page_bytes: int) -> None:
    arena = Arena(page_bytes, CPU)
    for rows in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)):
        arena.add_segment(torch.randint(0, 256, (rows * page_bytes,), dtype=torch.uint8))
    pages = data.draw(st.lists(st.integers(0, arena.pages - 1), max_size=9))
    pages = np.array(pages + list(range(arena.pages)), dtype=np.int64)
    runs = list(arena.runs(pages))
    assert [at for at, _ in runs] == [0, *np.cumsum([len(rows) for _, rows in runs])][:-1]
    [expected] = arena.gather(pages, [(0, page_bytes)], index)
    assert torch.equal(torch.cat([rows for _, rows in runs]), expected.view(torch.uint8))
    assert not list(arena.runs(pages[:0]))


@given(
    st.data(),
    st.sampled_from([torch.complex128, torch.int32, torch.uint8]),
    st.integers(1, 5),
    st.sampled_from([1, 3, 6, 100]),
    st.integers(0, 3),
)
def test_rows_are_selected_as_torch_does(
    data: st.DataObject, dtype: torch.dtype, words: int, grain: int, idle: int
) -> None:
    """At once, in pieces, and row by row; by one thread and by several."""
    memory = torch.randint(0, 100, (40, 7 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    rows = memory[:, 1 : 1 + words]
    at = torch.tensor(data.draw(st.lists(st.integers(0, 39), max_size=30)), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies, "_GRAIN", grain)
        patch.setattr(host_copies, "_MANY", 64)
        patch.setattr(host_copies, "_idle_cores", lambda: idle)
        patch.setattr(results, "LARGE", data.draw(st.sampled_from([1, 1 << 20])))
        selected = host_copies.select_rows(rows, at)
        assert selected.is_contiguous() and selected.dtype == dtype
        assert torch.equal(selected, rows.index_select(0, at))
        for bad in (-1, 40):
            with pytest.raises(IndexError):
                host_copies.select_rows(rows, torch.cat([at, torch.tensor([bad])]))


def test_copies_are_shared_by_threads_that_all_end() -> None:
    """Pieces are done by all threads, each once; what one raises reaches the caller."""
    both = threading.Barrier(2)
    done: list[tuple[int, int]] = []

    def copy(piece: int) -> None:
        if piece < 2:
            both.wait(60)  # two threads, or nobody gets on
        done.append((piece, threading.get_ident()))
        if piece == 7 and failing:
            raise OSError("piece 7")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_copies, "_idle_cores", lambda: 1)
        for failing in (False, True):
            done.clear()
            pieces = [(number,) for number in range(40)]
            with pytest.raises(OSError, match="piece 7") if failing else nullcontext():
                host_copies.spread(copy, pieces, 1 << 40)
            assert len({thread for _, thread in done}) == 2
            assert failing or sorted(piece for piece, _ in done) == list(range(40))


def test_what_a_thread_has_begun_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, waited_for = threading.Event(), threading.Event()
    caller, done = threading.get_ident(), list[int]()

    class Lock:
        def __init__(self) -> None:
            self._lock = threading.RLock()

        def __enter__(self) -> None:
            if threading.get_ident() == caller:
                waited_for.set()
            self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()

    def copy(piece: int) -> None:
        if threading.get_ident() == caller:
            begun.wait(60)
        else:
            begun.set()
            waited_for.wait(60)
        done.append(piece)

    monkeypatch.setattr(host_copies, "_idle_cores", lambda: 1)
    monkeypatch.setattr(host_copies, "Lock", Lock)
    host_copies.spread(copy, [(1,), (2,)], 1 << 40)
    assert sorted(done) == [1, 2]


def test_a_thread_that_comes_late_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[tuple[Any, Any]] = []
    monkeypatch.setattr(host_copies, "_idle_cores", lambda: 2)
    monkeypatch.setattr(host_copies, "start_new_thread", lambda *call: late.append(call))
    done: list[int] = []
    host_copies.spread(done.append, [(1,), (2,)], 1 << 40)
    for function, arguments in late:
        function(*arguments)
    assert done == [1, 2] and len(late) == 2

    def refuse(*call: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(host_copies, "start_new_thread", refuse)
    host_copies.spread(done.append, [(3,)], 1 << 40)
    assert done == [1, 2, 3]


def test_cores_without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "0.52 0.58 0.59 3/467 12345"
    monkeypatch.setattr(host_copies.Path, "read_text", lambda path: said)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert host_copies._idle_cores() == 3
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert host_copies._idle_cores() == 1
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert host_copies._idle_cores() == 0
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert host_copies._idle_cores() == 0
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert host_copies._idle_cores() == 1
    said = "another system"
    assert host_copies._idle_cores() == 0


def test_copies_on_the_host_start_no_threads_of_torch() -> None:
    """Threads of torch spin while they wait for each other, and stumble over other processes."""
    pytest.importorskip("resource")
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    run([sys.executable, "-c", _ALL_COPIES], check=True, timeout=120)


_ALL_COPIES = """
import os
import numpy as np, torch
from gpucache_pipes.device import HostBackend, host_copies
torch.set_num_threads(4)
host_copies._MANY = 1 << 60
before = len(os.listdir("/proc/self/task"))
for page in (272, 4112, 1 << 16, (1 << 20) + 16):
    backend = HostBackend()
    backend.configure(page)
    backend.grow(64, 64)
    pages = np.arange(64).repeat((4 << 20) // page + 1)
    backend.gather(pages, [(0, page - 16), (page - 16, 7)])
    backend.join(np.arange(64), np.ones(64, np.int64))
    backend.close()
assert len(os.listdir("/proc/self/task")) == before
a = torch.ones(1 << 22, device="cpu")
a += 1
assert len(os.listdir("/proc/self/task")) > before  # else the test shows nothing
"""


@given(st.data(), st.sampled_from(["host", "staged"]), st.booleans())
def test_stretches_are_joined_end_to_end(data: st.DataObject, kind: str, whole: bool) -> None:
    """As stretches, and page by page."""
    backend: Any = HostBackend() if kind == "host" else AcceleratorBackend(InOrderRuntime(CPU))
    backend.configure(48)
    assert backend.grow(9, 9) == 9
    rows = torch.randint(0, 256, (9, 48), dtype=torch.uint8)
    upload(backend, [[page] for page in range(9)], [bytes(row.tolist()) for row in rows])
    first = data.draw(st.lists(st.integers(0, 8), max_size=5))
    counts = [data.draw(st.integers(1, 9 - page)) for page in first]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_LONG", 1 if whole else 1 << 40)
        joined = backend.join(np.array(first, np.int64), np.array(counts, np.int64))
        for bad in (-1, 1 << 50):
            with pytest.raises(IndexError):
                backend.join(np.array([*first, bad]), np.array([*counts, 1]))
    expected = [rows[page : page + n].flatten() for page, n in zip(first, counts, strict=True)]
    assert joined.dtype == torch.uint8 and joined.dim() == 1
    assert torch.equal(joined, torch.cat([rows[:0].flatten(), *expected]))
    backend.close()


@pytest.mark.parametrize("page", [-1, 5])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("count", [2, 500])
def test_a_page_outside_the_arena_raises(page: int, segments: int, count: int) -> None:
    arena = Arena(1 << 16, CPU, host_copies.select_rows)
    for _ in range(segments):
        arena.add_segment(torch.zeros(5 * (1 << 16) // segments, dtype=torch.uint8))
    page = page if page < 0 else arena.pages
    with pytest.raises(IndexError):
        arena.gather(np.array([0, page] * (count // 2)), [(0, 80)], index)
    with pytest.raises(IndexError):
        arena.gather(np.array([0, page] * (count // 2)), [(0, 1 << 16)], index)


def test_large_results_reuse_memory_only_once_it_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "LARGE", 1)
    monkeypatch.setattr(results, "_STEP", 1)
    monkeypatch.setattr(results, "_MOST_FREE", 512)
    monkeypatch.setattr(host_copies, "_GRAIN", 1)
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
    # A region is not reused for a result of less than half its size, and 512 bytes are kept.
    large = gather(0, 1, 2, 3)
    place = large.data_ptr()
    del large
    assert gather(1).data_ptr() != place
    several = [gather(n % 4, 0) for n in range(20)]
    del several
    assert 512 >= sum(len(region) for region in results.MEMORY._free) > 512 - 256
    huge = gather(*[1] * 100)
    del huge
    assert [len(region) for region in results.MEMORY._free] == [6400]
    host.close()
    assert not results.MEMORY._free
    assert second.view(torch.uint8)[:, 9].tolist() == [2, 3]


def test_results_have_their_own_storage_and_survive_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "LARGE", 1)
    monkeypatch.setattr(results, "_STEP", 1)
    monkeypatch.setattr(results, "_MOST_FREE", 512)
    monkeypatch.setattr(host_copies, "_GRAIN", 1)
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
