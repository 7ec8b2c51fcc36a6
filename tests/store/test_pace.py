"""How many readers there are: by a model of storage, in which no time passes."""

import heapq
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.store import pace
from gpucache_pipes.store.pace import MOST_READERS, Pace, requests_ahead


class Model:
    """Readers of a storage, which always have files to read.

    Args:
        each: seconds that a file takes, by how many readers there are.
        cpu: what part of this is computing.
        native: see Pace.
    """

    def __init__(
        self,
        each: Callable[[int], float],
        cpu: float,
        native: bool = False,
        most: int = MOST_READERS,
    ) -> None:
        self.each, self.cpu, self.native = each, cpu, native
        self.now = 0.0
        self.readers = 1
        self.history = [1]
        self.pace = Pace(1, most, self.start, lambda: self.now)
        self._ends: list[tuple[float, int, float]] = []

    def start(self) -> None:
        self.readers += 1

    def run(self, tasks: int, waiting: bool = True) -> None:
        for _ in range(tasks):
            while len(self._ends) < self.readers:
                files = self.pace.files_per_task(500)
                took = files * self.each(self.readers)
                heapq.heappush(self._ends, (self.now + took, files, took))
            self.now, files, took = heapq.heappop(self._ends)
            self.pace.finished(files, took, self.cpu * took, self.native, waiting)
            if self.pace.dismissed():
                self.readers -= 1
            if not self.pace._surplus and self.readers != self.history[-1]:
                self.history.append(self.readers)


def test_storage_that_makes_readers_wait_gets_all_of_them() -> None:
    model = Model(lambda readers: 0.003, cpu=0.0002)
    model.run(500)
    assert model.history == [1, 4, 16, 64, MOST_READERS]
    assert model.now < 0.2
    # Tasks are as long as they may be, and no longer.
    assert 0.003 * model.pace.files_per_task(10_000) <= 0.03
    assert model.pace.files_per_task(MOST_READERS) == 1


def test_tasks_have_several_files_where_readers_want_the_interpreter_lock() -> None:
    """It is taken for 0.2 ms a task, so that 128 tasks of a file would take more than all of it."""
    model = Model(lambda readers: 0.003, cpu=0.07)
    model.run(500)
    assert model.pace.files_per_task(MOST_READERS) == 8
    model.cpu = 0.0001
    model.run(500)
    assert model.pace.files_per_task(MOST_READERS) == 1


@pytest.mark.parametrize("cores", [1, 14])
def test_readers_that_compute_in_python_stay_alone(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(pace, "_idle_cores", lambda: cores)
    model = Model(lambda readers: 0.00003 * readers, cpu=0.95)
    model.run(2000)
    assert model.history == ([1] if cores == 1 else [1, 2, 1])
    assert model.pace.files_per_task(256) >= 60, "few tasks, since each has a cost"


def test_the_bandwidth_of_storage_is_no_reason_for_more() -> None:
    """Four readers use it up. One more step is tried, and nothing after it."""
    model = Model(lambda readers: 0.01 * max(1, readers / 4), cpu=0.1)
    model.run(3000)
    assert 4 <= model.readers <= 8
    assert len(model.history) <= 5


def test_readers_that_wait_for_the_interpreter_lock_get_one_try() -> None:
    """They do not compute while they wait; but more of them read no faster."""
    model = Model(lambda readers: 0.0002 * readers, cpu=0.3)
    model.run(3000)
    assert model.history == [1, 2, 1]


def test_readers_that_crowd_become_fewer() -> None:
    """Files had arrived faster for another reason while more readers were tried."""
    model = Model(lambda readers: 0.003, cpu=0.0001)
    model.run(500)
    assert model.readers == MOST_READERS
    # From now on they compute, one at a time: all but one wait for the interpreter lock.
    model.each = lambda readers: 0.0002 * readers
    cpu = 0.9
    for _ in range(1000):
        model.cpu = cpu / model.readers * 1.2
        model.run(20)
    assert model.readers <= 2


def test_readers_that_crowd_stay_where_fewer_are_worse() -> None:
    """As with functions that release the interpreter lock, and wait as well."""
    model = Model(lambda readers: 0.003, cpu=0.1)
    model.run(2000)
    assert model.readers == MOST_READERS
    settled = len(model.history)
    model.run(3000)
    assert model.readers == MOST_READERS and len(model.history) - settled <= 4


def test_another_storage_is_tried_again() -> None:
    latency = [0.0001]
    model = Model(lambda readers: latency[0] * readers, cpu=0.1)
    model.run(200)
    few = model.readers
    assert few < MOST_READERS
    latency[0] = 0.01
    model.each = lambda readers: latency[0]
    model.run(2000)
    assert model.readers == MOST_READERS


def test_native_readers_use_idle_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_idle_cores", lambda: 14)
    model = Model(lambda readers: 0.00001, cpu=1.0, native=True)
    model.run(500)
    assert model.readers == 14
    # A function that releases the interpreter lock, such as a decoder in C.
    in_python = Model(lambda readers: 0.00001, cpu=1.0)
    in_python.run(500)
    assert in_python.readers == 14


def test_no_readers_are_added_while_nothing_waits() -> None:
    model = Model(lambda readers: 0.003, cpu=0.0)
    model.run(500, waiting=False)
    assert model.readers == 1


def test_a_system_without_more_threads() -> None:
    model = Model(lambda readers: 0.003, cpu=0.0)
    refused = []

    def start() -> None:
        if model.readers == 4:
            refused.append(True)
            raise RuntimeError("can't start new thread")
        model.readers += 1

    model.pace = Pace(1, MOST_READERS, start, lambda: model.now)
    model.run(500)
    assert (model.readers, refused) == (4, [True])


def test_a_given_number_stays() -> None:
    model = Model(lambda readers: 0.003, cpu=0.0, most=1)
    model.run(500)
    assert model.readers == 1


@given(
    st.lists(st.tuples(st.integers(1, 256), st.floats(0, 10), st.booleans()), max_size=20),
    st.integers(1, 10_000),
)
def test_tasks_have_files(tasks: list[tuple[int, float, bool]], waiting: int) -> None:
    found = Pace(1, 32, lambda: None)
    for files, wall, native in tasks:
        found.finished(files, wall, wall / 2, native, waiting=True)
    assert 1 <= found.files_per_task(waiting) <= 256
    assert 1 <= found.files_per_box(waiting) <= min(32, found.files_per_task(waiting))


def test_of_readers_that_come_at_once_one_decides() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def start() -> None:
        inside.set()
        assert go_on.wait(60)

    found = Pace(1, 2, start, iter(range(100)).__next__)
    report = (1, 0.003, 0.0, False, True)
    for _ in range(5):  # all that are needed to judge but one
        found.finished(*report)
    thread = threading.Thread(target=found.finished, args=report)
    thread.start()
    assert inside.wait(60)
    found.finished(*report)  # does not wait
    go_on.set()
    thread.join()


@pytest.mark.parametrize("given", [None, 2])
def test_in_a_store(given: int | None) -> None:
    def load(path: str) -> torch.Tensor:
        time.sleep(0.002)  # what the storage does
        return torch.tensor(int(path[1:]))

    paths = [f"/{number}" for number in range(200)]
    with GPUFeatureStore("cpu", load_fn=load, reader_threads=given) as store:
        assert [int(x) for x in store.get_batch(paths)] == list(range(200))
        readers = store.stats().reader_threads
        store.check()
    assert readers == 2 if given else readers > 1


def test_requests_ahead_keep_all_readers_busy_within_a_bound_of_bytes() -> None:
    assert requests_ahead(64, 1, 4096.0, None) == 2
    assert requests_ahead(64, 128, 4096.0, None) == 16
    assert requests_ahead(1, 128, 4096.0, None) == 1024
    assert requests_ahead(1, 128, 0.0, None) == 2, "nothing is known yet"
    assert requests_ahead(1, 128, 4.0 * (1 << 20), None) == 64
    assert requests_ahead(1, 128, 4.0 * (1 << 20), 80 << 20) == 2


def test_a_pipeline_reads_further_ahead_with_more_readers(
    make_files: Callable[[int], list[str]],
) -> None:
    paths = make_files(100)
    with GPUFeatureStore("cpu") as store:
        lister = PathLister(paths)
        node = GPUPrefetcher(lister, store)
        node.reset()
        next(node)
        assert len(node._ahead.elements) == 2
        store._loader._pace._start = lambda: None  # no other readers are started by itself
        for _ in range(7):
            store._loader._start_reader()
        next(node)
        assert len(node._ahead.elements) == 64
        fixed = GPUPrefetcher(lister, store, depth=3)
        fixed.reset()
        next(fixed)
        assert len(fixed._ahead.elements) == 3
