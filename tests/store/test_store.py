"""GPUFeatureStore, call by call."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gate, sample

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, PendingBatch
from gpucache_pipes.cache.policies import LRU
from gpucache_pipes.device import AcceleratorBackend, HostBackend, InOrderRuntime
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.store.reader_pool import ReaderPool
from gpucache_pipes.testing import assert_same

Files = Callable[..., list[str]]


def test_features_come_back_as_saved(make_files: Files) -> None:
    paths = make_files(5)
    with GPUFeatureStore("cpu") as store:
        for _ in range(2):
            assert_same(store.get(paths[3]), sample(3))
            batch = store.get_batch([paths[2], paths[0], paths[2]])
            assert [int(f["label"]) for f in batch] == [2, 0, 2]
            assert batch.paths == [os.path.realpath(paths[n]) for n in (2, 0, 2)]
            assert [int(f["label"]) for f in batch[1:]] == [0, 2]
            assert int(batch[-1]["label"]) == 2
            with pytest.raises(IndexError):
                batch[3]
        assert paths[0] in store and Path(paths[0]) in store and paths[4] not in store
        assert 3 not in store
        assert len(store) == 3
        stats = store.stats()
        assert (stats.misses, stats.hits, stats.files_read) == (3, 5, 3)
        assert stats.hit_rate == 5 / 8
        assert stats.cached_bytes == 3 * 40
        assert stats.bytes_read == sum(os.path.getsize(paths[n]) for n in (0, 2, 3))
        assert "3 items" in repr(store)


def test_collate_fn_gets_the_list(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        assert store.get_batch(paths, collate_fn=lambda fs: [int(f["label"]) for f in fs]) == [
            0, 1, 2,
        ]  # fmt: skip
        assert len(store.get_batch([])) == 0
        assert len(store.collect([])) == 0


def test_a_store_on_the_default_device(make_files: Files) -> None:
    [path] = make_files(1)
    with GPUFeatureStore() as store:
        assert store.get(path)["feature"].device == store.device


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_cache_bytes": 0}, "max_cache_bytes=0"),
        ({"max_cache_bytes": "lots"}, "max_cache_bytes='lots'"),
        ({"max_cache_items": -1}, "max_cache_items=-1"),
        ({"policy": "psychic"}, "policy='psychic'"),
        ({"reader_threads": 0}, "reader_threads=0"),
        ({"page_bytes": 100}, "page_bytes=100"),
        ({"load_fn": 3}, "load_fn=3"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GPUFeatureStore(**{"device": "cpu", **options})


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


def test_features_without_tensors_are_items_of_no_bytes(make_files: Files) -> None:
    paths = make_files(4, lambda n: {"n": n, "s": "x", "none": None, "b": b"y", "f": [1.5]})
    with GPUFeatureStore("cpu", max_cache_items=3) as store:
        assert store.get(paths[2]) == {"n": 2, "s": "x", "none": None, "b": b"y", "f": [1.5]}
        store.get_batch(paths)[0]["f"].append(2)
        assert store.get(paths[0])["f"] == [1.5]
        assert len(store) == 3 and store.stats().cached_bytes == 0


def test_mutable_values_are_not_shared() -> None:
    with GPUFeatureStore("cpu", load_fn=lambda path: {"ids": {1, 2}}) as store:
        store.get("/x")["ids"].add(3)
        assert store.get("/x") == {"ids": {1, 2}}


def test_errors_name_the_path_and_the_next_request_tries_again(tmp_path: Path) -> None:
    path = tmp_path / "late.pt"
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a torch file")
    with GPUFeatureStore("cpu") as store:
        with pytest.raises(FileNotFoundError) as missing:
            store.get(path)
        assert missing.value.filename == str(path)
        torch.save(sample(1), path)
        assert_same(store.get(path), sample(1))
        for _ in range(2):
            with pytest.raises(FeatureLoadError, match=r"bad\.pt") as broken:
                store.get_batch([path, bad])
            assert broken.value.path == str(bad)
            assert broken.value.__cause__ is not None
        assert_same(store.get(path), sample(1))
        assert store.stats().failures == 3


def test_weights_only_is_the_default(make_files: Files) -> None:
    [path] = make_files(1, lambda n: {"x": {1}, "p": Path("x")})
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match="weights_only"):
        store.get(path)
    with GPUFeatureStore("cpu", weights_only=False) as store:
        assert store.get(path)["p"] == Path("x")


def test_an_error_in_the_callers_thread(tmp_path: Path) -> None:
    with GPUFeatureStore("cpu", asynchronous=False) as store:
        with pytest.raises(FileNotFoundError):
            store.get(tmp_path / "no.pt")
        store.prefetch([tmp_path / "no.pt"])  # nobody has asked yet


def test_an_interrupt_while_reading_leaves_nothing_behind(make_files: Files) -> None:
    paths = make_files(3)
    interrupts = [KeyboardInterrupt()]

    def load(path: str) -> Any:
        if path.endswith("1.pt") and interrupts:
            raise interrupts.pop()
        return torch.load(path)

    with GPUFeatureStore("cpu", asynchronous=False, load_fn=load) as store:
        with pytest.raises(KeyboardInterrupt):
            store.get_batch(paths)
        store.check()
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1, 2]


def test_prefetch_returns_at_once_and_is_joined() -> None:
    gate = Gate({"/a": torch.tensor([1.0]), "/b": torch.tensor([2.0])})
    with GPUFeatureStore("cpu", load_fn=gate, reader_threads=2) as store:
        store.prefetch(["/a"])
        gate.wait_until_started("/a")
        ticket = store.request(["/a", "/b", "/a"])
        other = store.request(["/b"])
        gate.wait_until_started("/b")
        assert "/a" not in store
        gate.open("/a", "/b")
        assert [float(f) for f in ticket.result()] == [1, 2, 1]
        assert float(other.result()[0]) == 2
        assert sorted(gate.loads) == ["/a", "/b"]  # once each
        assert store.stats().misses == 1  # only /b was read because of a request
        assert store.stats().wait_seconds >= 0
        with pytest.raises(RuntimeError, match="has been used"):
            ticket.result()


def test_an_error_reaches_everybody_who_waits_and_nobody_else() -> None:
    gate = Gate({"/a": OSError("disk on fire"), "/b": torch.tensor([2.0])})
    with GPUFeatureStore("cpu", load_fn=gate, reader_threads=2) as store:
        tickets = [store.request(["/b", "/a"]), store.request(["/a"])]
        fine = store.request(["/b"])
        gate.open("/b", "/a")
        for ticket in tickets:
            with pytest.raises(FeatureLoadError, match="disk on fire"):
                ticket.result()
        assert float(fine.result()[0]) == 2


def test_close_wakes_who_waits() -> None:
    gate = Gate({"/a": torch.tensor([1.0])})
    store = GPUFeatureStore("cpu", load_fn=gate)
    ticket = store.request(["/a"])
    gate.wait_until_started("/a")
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            ticket.result()
        except BaseException as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=store.close)
    closer.start()
    consumer.join(60)
    gate.open("/a")
    closer.join(60)
    assert [str(e) for e in errors] == ["this GPUFeatureStore is closed"]
    for call in (store.get, lambda p: store.prefetch([p]), lambda p: store.release([p])):
        with pytest.raises(RuntimeError, match="closed"):
            call("/a")
    store.close()


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


def test_release_and_clear(make_files: Files) -> None:
    paths = make_files(4)
    with GPUFeatureStore("cpu") as store:
        held = store.request(paths)
        store.get_batch(paths)
        store.release([paths[0], "/never/seen"])
        assert paths[0] not in store and len(store) == 3
        store.clear()
        assert len(store) == 0 and store.stats().bypassed_items == 4
        assert store.stats().reserved_bytes > 0
        assert [int(f["label"]) for f in held.result()] == [0, 1, 2, 3]
        assert store.stats().bypassed_items == 0
        store.clear()
        assert store.stats().reserved_bytes == 0 and store.stats().page_bytes == 0
        assert int(store.get(paths[1])["label"]) == 1


def test_release_while_loading() -> None:
    gate = Gate({"/a": torch.tensor([1.0])})
    with GPUFeatureStore("cpu", load_fn=gate) as store:
        ticket = store.request(["/a"])
        gate.wait_until_started("/a")
        store.release(["/a"])
        gate.open("/a")
        assert float(ticket.result()[0]) == 1
        assert "/a" not in store


def test_a_dropped_ticket_lets_go(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu", max_cache_items=1) as store:
        ticket = store.request(paths)
        store.get_batch(paths)
        assert store.stats().bypassed_items == 2
        del ticket
        gc.collect()
        store.check()
        assert store.stats().bypassed_items == 0


def test_warm(make_files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_files(300)
    with GPUFeatureStore("cpu") as store:
        assert store.warm(paths) == 300
        assert "warming" in capsys.readouterr().err
        assert store.stats().hits == store.stats().misses == 0
        store.get_batch(paths)
        assert store.stats().hit_rate == 1.0
    with GPUFeatureStore("cpu", max_cache_items=20, policy="lru") as store:
        assert store.warm(paths, progress=False) == 20
    assert not capsys.readouterr().err


def test_warm_reports_the_first_bad_file(make_files: Files) -> None:
    paths = make_files(3)
    Path(paths[1]).write_bytes(b"")
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=r"0001\.pt"):
        store.warm(paths, progress=False)


def test_a_store_is_collected_without_close(make_files: Files) -> None:
    paths = make_files(2)
    store = GPUFeatureStore("cpu")
    store.get_batch(paths)
    threads = [t for t in threading.enumerate() if t.name.startswith("gpucache-reader")]
    assert threads
    del store
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_store_cannot_be_pickled() -> None:
    with GPUFeatureStore("cpu") as store, pytest.raises(TypeError, match="one process"):
        pickle.dumps(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_store_refuses_to_work_after_a_fork(make_files: Files) -> None:
    paths = make_files(1)
    with GPUFeatureStore("cpu") as store:
        store.get(paths[0])
        child = os.fork()
        if child == 0:
            try:
                store.get(paths[0])
            except RuntimeError as error:
                store.close()
                os._exit(7 if "before a fork" in str(error) else 1)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert_same(store.get(paths[0]), sample(0))


def test_the_interpreter_ends_in_the_middle_of_everything(make_files: Files) -> None:
    paths = make_files(50)
    code = f"""
import sys
from gpucache_pipes import GPUFeatureStore
store = GPUFeatureStore("cpu")
tickets = [store.request({paths!r}) for _ in range(3)]
store.get({paths[0]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


class Broken(AcceleratorBackend):
    """Its device has room for two pages."""

    def grow(self, needed: int, useful: int | None) -> int:
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


def test_a_policy_that_names_what_is_not_cached_is_told_so(make_files: Files) -> None:

    class Wrong(LRU):
        def victims(self, key: int) -> Any:
            return iter([key])

    paths = make_files(2)
    with GPUFeatureStore("cpu", max_cache_items=1, policy=Wrong()) as store:
        store.get(paths[0])
        with pytest.raises(FeatureLoadError, match="not cached"):
            store.get(paths[1])


def test_clear_while_a_request_is_being_made(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        store.get_batch(paths[:2])

        class Clears(os.PathLike[str]):
            def __fspath__(self) -> str:
                store.clear()
                store.get_batch(paths[1:])
                return paths[2]

        assert [int(f["label"]) for f in store.get_batch([paths[0], Clears()])] == [0, 2]


def test_clear_gives_memory_back_with_the_last_batch(make_files: Files) -> None:
    paths = make_files(3)
    with GPUFeatureStore("cpu") as store:
        ticket = store.request(paths)
        store.get_batch(paths)
        store.clear()
        assert store.stats().reserved_bytes > 0
        ticket.result()
        assert store.stats().reserved_bytes == 0


def test_an_interrupt_before_the_readers_know(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store:
        with monkeypatch.context() as patch:

            def interrupted(*arguments: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr(ReaderPool, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.get_batch(paths)
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1]


class Moody(LRU):
    """Raises when told to."""

    mood = ""

    def on_insert(self, key: int) -> None:
        if self.mood == "insert":
            raise ValueError("not today")
        super().on_insert(key)

    def on_access(self, keys: Any, owner: object) -> None:
        if self.mood == "access":
            raise ValueError("not today")
        super().on_access(keys, owner)


@pytest.mark.parametrize("mood", ["insert", "access"])
def test_a_policy_that_raises_hangs_nobody(make_files: Files, mood: str) -> None:
    paths = make_files(3)
    policy = Moody()
    with GPUFeatureStore("cpu", max_cache_items=2, policy=policy) as store:
        policy.mood = mood
        with pytest.raises(FeatureLoadError, match="not today"):
            store.get_batch(paths)
        store.check()
        policy.mood = ""
        assert [int(f["label"]) for f in store.get_batch(paths)] == [0, 1, 2]


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
        ticket = store.request(["/a"])
        gate.wait_until_started("/a")
        errors: list[str] = []

        def wait() -> None:
            try:
                ticket.result()
            except RuntimeError as error:
                errors.append(str(error))

        consumer = threading.Thread(target=wait)
        consumer.start()
        assert waiting.wait(60)
        ticket.cancel()
        consumer.join(60)
        assert not consumer.is_alive() and "cancelled" in errors[0]
        gate.open("/a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_in_a_child_does_not_wait_for_gathers_of_the_parent() -> None:
    """A thread of the parent is in a gather, and has no counterpart in the child."""
    backend: Any = HostBackend()
    gather, gathering, go_on = backend.gather, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        gathering.set()
        assert go_on.wait(60)
        return gather(*arguments)

    def refuse_to_wait(*_: Any) -> None:
        os._exit(1)

    backend.gather = slow
    with GPUFeatureStore(backend, load_fn=lambda path: torch.ones(2)) as store:
        consumer = threading.Thread(target=lambda: store.get("/a"))
        consumer.start()
        assert gathering.wait(60)
        child = os.fork()
        if child == 0:
            threading.Condition.wait = refuse_to_wait  # type: ignore[assignment]
            store.close()
            os._exit(7)
        go_on.set()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        consumer.join(60)


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
        assert backend._arena is not None and len(backend._arena._segments) <= 3


def test_warm_evicts_nothing_and_reads_little_in_vain(make_files: Files) -> None:
    paths = make_files(1500)
    with GPUFeatureStore("cpu", max_cache_bytes=40 * 100 + 39, policy="lru") as store:
        assert store.warm(paths, progress=False) == 100
        stats = store.stats()
        assert (stats.evictions, stats.files_read, stats.bypassed_items) == (0, 100, 0)
        assert store.warm(paths, progress=False) == 100


def test_a_store_is_true_while_it_is_empty() -> None:
    with GPUFeatureStore("cpu") as store:
        assert store
        assert len(store) == 0


def test_arrays_are_refused_and_not_cached_uncounted() -> None:
    import numpy as np

    with (
        GPUFeatureStore("cpu", load_fn=lambda path: {"x": np.ones(3)}) as store,
        pytest.raises(FeatureLoadError, match=r"feature\['x'\].*numpy.*from_numpy"),
    ):
        store.get("/x")
    with GPUFeatureStore("cpu", load_fn=lambda path: {"n": np.float32(2)}) as store:
        assert store.get("/x")["n"] == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x00" * 100, "not a torch.save file, or a damaged one"),
        (b"hello, world", "not a torch.save file, or a damaged one"),
        (os.urandom(1000), "not a torch.save file, or a damaged one"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=says):
        store.get(path)


def test_what_weights_only_refuses_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"when": Path("x")}, path)
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError) as caught:
        store.get(path)
    for word in ("pathlib", "add_safe_globals", "weights_only=False", "load_fn"):
        assert word in str(caught.value)


def test_load_fn_and_errors_see_the_path_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "cat.pt").symlink_to("blob")
    with GPUFeatureStore("cpu", load_fn=lambda path: {"name": Path(path).name}) as store:
        batch = store.get_batch([tmp_path / "cat.pt"])
        assert batch[0] == {"name": "cat.pt"} and batch.paths == [str(tmp_path / "cat.pt")]


def test_a_missing_file_that_a_load_fn_needs_is_named() -> None:
    with (
        GPUFeatureStore("cpu", load_fn=lambda path: Path("/no/index").read_text()) as store,
        pytest.raises(FileNotFoundError, match=r"/no/index.*needed to load.*/x"),
    ):
        store.get("/x")


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


def test_no_thread_can_close_a_pending_batch_during_its_gather(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    items = {f"/{n}": torch.full((4,), n) for n in range(8)}
    backend: Any = HostBackend()
    with GPUFeatureStore(backend, load_fn=items.__getitem__, max_cache_items=2) as store:
        ticket = store.request(["/0", "/1"])
        store.get_batch(["/0", "/1"])
        gather = backend.gather

        def interfere(pages: Any, columns: Any) -> Any:
            monkeypatch.setattr(backend, "gather", gather)
            ticket.cancel()
            with pytest.raises(RuntimeError, match="used"):
                ticket.result()
            store.clear()
            store.get_batch(["/4", "/5", "/6", "/7"])
            return gather(pages, columns)

        monkeypatch.setattr(backend, "gather", interfere)
        assert [int(f[0]) for f in ticket.result()] == [0, 1]


def test_a_file_may_hold_long_keys_deep_down() -> None:
    feature: Any = torch.zeros(1)
    for _ in range(200):
        feature = {"k" * 20_000: feature}
    with GPUFeatureStore("cpu", load_fn=lambda path: feature) as store:
        tracemalloc.start()
        store.get("/x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50 << 20


def test_a_ticket_keeps_its_store(make_files: Files) -> None:
    def request() -> Any:
        return GPUFeatureStore("cpu").request(make_files(40))

    batch = request().result()
    assert [int(feature["label"]) for feature in batch] == list(range(40))


def test_a_ticket_is_cancelled_while_it_is_collected(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store:
        ticket = store.request(paths)
        use_up = PendingBatch.use_up

        def abandoned_meanwhile(self: PendingBatch) -> Any:
            """A finalizer may take the batch just before."""
            if (number := use_up(self)) is not None:
                self.issuer.abandon(number)
            return use_up(self)

        monkeypatch.setattr(PendingBatch, "use_up", abandoned_meanwhile)
        with pytest.raises(RuntimeError, match="used or cancelled"):
            ticket.result()
        monkeypatch.undo()
        twice = store.request(paths)
        with pytest.raises(RuntimeError, match="used or cancelled"):
            store.collect([twice, twice])
        # Nothing is in use or pinned any more, or clear() would wait for it.
        store.clear()
        assert store.stats().reserved_bytes == store.stats().pending_batches == 0


def test_a_ticket_of_another_store(make_files: Files) -> None:
    paths = make_files(2)
    with GPUFeatureStore("cpu") as store, GPUFeatureStore("cpu") as other:
        ticket = store.request(paths)
        with pytest.raises(RuntimeError, match="another store"):
            other.collect([ticket])


@pytest.mark.parametrize("call", ["collect", "cancel"])
def test_a_ticket_of_another_store_closes_none_of_this(make_files: Files, call: str) -> None:
    """Both are the first of their stores, and have one number."""
    paths = make_files(8)
    with (
        GPUFeatureStore("cpu", policy="lru", max_cache_items=2) as store,
        GPUFeatureStore("cpu") as other,
    ):
        mine, others = store.request(paths[:2]), other.request(paths[:1])
        with pytest.raises(RuntimeError, match="another store"):
            getattr(store, call)([others])
        for path in paths[2:]:
            store.get(path)
        assert [int(feature["label"]) for feature in mine.result()] == [0, 1]
        assert [int(feature["label"]) for feature in others.result()] == [0]
        store.check()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_files_are_handed_to_readers(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    paths = make_files(100)
    with GPUFeatureStore("cpu", reader_threads=2) as store:
        submit, calls = ReaderPool.submit, 0

        def interrupted(self: ReaderPool, task: Any, argument: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2 and when == "before":
                raise KeyboardInterrupt
            submit(self, task, argument)
            if calls == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(ReaderPool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.request(paths)
        monkeypatch.undo()
        for _ in range(2):
            batch = store.get_batch(paths)
            assert [int(feature["label"]) for feature in batch] == list(range(100))
            store.check()
        assert store.stats().files_read <= 200


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_weights_only_refuses_is_named(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(2), "v": frozenset([1])}, path, pickle_protocol=protocol)
    says = "refuses frozenset" if protocol == 2 else "protocol 2"
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=says):
        store.get(path)


def test_what_is_left_to_others_does_not_stop_a_batch(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(40)
    runtime = InOrderRuntime(torch.device("cpu"))
    monkeypatch.setattr(runtime, "memory", lambda: (5 << 30, 80 << 30))
    with GPUFeatureStore(AcceleratorBackend(runtime)) as store:
        for count in (1, 2, 40, 3):
            batch = store.get_batch(paths[:count])
            assert [int(feature["label"]) for feature in batch] == list(range(count))
            store.check()
