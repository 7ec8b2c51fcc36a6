"""GPUFeatureStore(read_timeout=): readers that hang are left behind, and nothing else is."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gate, device_for, sample, wait_for_readers

from gpucache_pipes import FeatureLoadError, GPUFeatureStore, GPUPrefetcher
from gpucache_pipes.files import FileOpener, LocalFiles, batch_reader
from gpucache_pipes.files.planned import PlannedFeature
from gpucache_pipes.store.load_tracker import LoadTracker
from gpucache_pipes.store.reader_pool import ReaderPool

Files = Callable[..., list[str]]
NAMES = [f"/f/{number:02d}" for number in range(40)]


def a_gate() -> Gate:
    gate = Gate({name: sample(number) for number, name in enumerate(NAMES)})
    gate.open(*NAMES)
    return gate


def label(feature: Any) -> int:
    return int(feature["label"])


@pytest.mark.parametrize("kind", ["host", "staged", "simulated"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_load_fn_that_hangs(kind: str, threads: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "gpucache_pipes")
    gate = a_gate()
    gate.opened[NAMES[7]].clear()
    store = GPUFeatureStore(
        device_for(kind), load_fn=gate, read_timeout=0.2, reader_threads=threads
    )
    with store:
        # What lies before and behind it in the same task is served.
        batch = store.request(NAMES)
        errors = batch.wait()
        assert list(errors) == [7] and isinstance(errors[7].__cause__, TimeoutError)
        with pytest.raises(FeatureLoadError, match=r"07.*read_timeout=0\.2"):
            batch.result()
        others = [*NAMES[:7], *NAMES[8:]]
        assert [label(f) for f in store.get_batch(others)] == [*range(7), *range(8, 40)]
        store.check()
        # The next request tries again, by another reader, and may hang again.
        assert gate.loads.count(NAMES[7]) == 1
        with pytest.raises(FeatureLoadError, match="07"):
            store.get(NAMES[7])
        gate.open(NAMES[7])
        assert label(store.get(NAMES[7])) == 7
        assert gate.loads.count(NAMES[7]) == 3
        store.check()
    assert store.stats().failures == 2
    # Said after who waits has been told, by the watcher, which has ended now.
    assert "another thread goes on" in caplog.text


@pytest.mark.usefixtures("python_reader")
@pytest.mark.parametrize("kind", ["host", "staged", "simulated"])
def test_a_read_that_hangs_keeps_its_pages(
    make_files: Files, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader that was left behind may yet write to belongs to nobody else."""
    paths = make_files(12)
    go_on = threading.Event()
    hung: list[Any] = []
    through = threading.Event()
    read_into = PlannedFeature.read_into

    def slow(self: PlannedFeature, buffers: Sequence[memoryview]) -> None:
        if self._path == paths[3] and not hung:
            hung.append(self)
            assert go_on.wait(60)
            for buffer in buffers:
                buffer[:] = b"\xff" * len(buffer)
            through.set()
            return
        read_into(self, buffers)

    monkeypatch.setattr(PlannedFeature, "read_into", slow)
    store = GPUFeatureStore(device_for(kind), read_timeout=0.2, max_cache_items=6)
    with store:
        assert list(store.request(paths).wait()) == [3]
        store.check()
        assert label(store.get(paths[3])) == 3  # by another reader, while the first one hangs
        for _ in range(2):
            assert [label(f) for f in store.get_batch(paths)] == list(range(12))
        store.check()
        before = store.stats()
        go_on.set()
        assert through.wait(60)
        for _ in range(3):
            assert [label(f) for f in store.get_batch(paths)] == list(range(12))
        # Its pages come back when it does.
        wait_for_readers(store)
        assert store.stats().reserved_bytes == before.reserved_bytes
        store.check()


def test_nobody_waits_at_the_end_for_a_reader_that_hangs(tmp_path: Path) -> None:
    code = """
import threading, time, torch
from gpucache_pipes import *
def load(path):
    if "bad" in path: threading.Event().wait()
    return torch.zeros(3)
stores = [GPUFeatureStore("cpu", load_fn=load, read_timeout=0.1) for _ in range(3)]
for store in stores:
    try: store.get("/bad")
    except FeatureLoadError as error: print(error)
    store.get("/good")
    store.prefetch(["/bad"])
begun = time.monotonic()
import atexit
atexit._run_exitfuncs()
print("took", time.monotonic() - begun)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.count("read_timeout=0.1 seconds") == 3
    assert "Fatal" not in run.stderr and "Traceback" not in run.stderr


def test_a_replaced_reader_is_waited_for_at_the_end() -> None:
    """Else one that is inside torch just then aborts the process."""
    code = """
import time, torch
from gpucache_pipes import *
def load(path):
    end = time.monotonic() + 0.4
    while time.monotonic() < end: x = torch.randn(200, 200) @ torch.randn(200, 200)
    return x
store = GPUFeatureStore("cpu", load_fn=load, read_timeout=0.1)
try: store.get("/a")
except FeatureLoadError: print("replaced")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "replaced" in run.stdout, run.stderr


def test_in_a_pipeline() -> None:
    gate = a_gate()
    for number in (4, 11, 17):
        gate.opened[NAMES[number]].clear()
    with GPUFeatureStore("cpu", load_fn=gate, read_timeout=0.2) as store:
        batches = [NAMES[at : at + 5] for at in range(0, 20, 5)]
        node = GPUPrefetcher(batches, store, depth=4, on_error="skip")
        got = [[label(f) for f in batch] for batch in node]
        assert got == [[0, 1, 2, 3], [5, 6, 7, 8, 9], [10, 12, 13, 14], [15, 16, 18, 19]]
        store.clear()
        gate.open(*NAMES)


@pytest.mark.parametrize(
    "where",
    [(ReaderPool, "start_another"), (LoadTracker, "take_over"), (ReaderPool, "forget")],
    ids=["before", "in between", "behind"],
)
def test_closing_while_a_reader_is_replaced(
    monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]
) -> None:
    """The watcher stops at each of its steps until the store has been closed."""
    owner, name = where
    step, at_step, closed = getattr(owner, name), threading.Event(), threading.Event()

    def stopping(*arguments: Any) -> Any:
        at_step.set()
        assert closed.wait(60)
        return step(*arguments)

    monkeypatch.setattr(owner, name, stopping)
    before = set(threading.enumerate())
    gate = a_gate()
    gate.opened[NAMES[0]].clear()
    store = GPUFeatureStore("cpu", load_fn=gate, read_timeout=0.01)
    batch = store.request(NAMES)
    assert at_step.wait(60)
    if name == "forget":  # the file at hand has failed by then, and the others are read
        assert isinstance(batch.wait()[0].__cause__, TimeoutError)
    store.close(0.0)
    closed.set()
    with pytest.raises(RuntimeError, match="closed"):
        batch.result()
    gate.open(*NAMES)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive(), thread
    assert store.stats().reserved_bytes == 0


@pytest.mark.usefixtures("python_reader")
def test_a_stat_that_hangs_says_nothing_of_what_was_read_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a.pt")

    def write(value: int, age: int) -> None:
        torch.save(torch.full((4,), value), path + "~")
        os.utime(path + "~", (10**9 - age, 10**9 - age))
        os.replace(path + "~", path)

    write(1, age=1000)
    real, go_on, hung = LocalFiles.version, threading.Event(), [True]
    late = threading.Event()

    def version(self: LocalFiles, key: str) -> Any:
        if hung and hung.pop():
            assert go_on.wait(60)
            try:
                return real(self, key)
            finally:
                late.set()
        return real(self, key)

    monkeypatch.setattr(LocalFiles, "version", version)
    with GPUFeatureStore("cpu", revalidate=True, read_timeout=0.1) as store:
        with pytest.raises(FeatureLoadError, match="read_timeout"):
            store.get(path)
        assert store.get(path).tolist() == [1] * 4
        write(2, age=500)
        go_on.set()
        assert late.wait(60)
        for thread in threading.enumerate():
            if thread.name == "gpucache-reader-0":
                thread.join()  # it was replaced, and ends
        assert store.get(path).tolist() == [2] * 4


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = a_gate()
    gate.opened[NAMES[0]].clear()
    start, failed = threading.Thread.start, threading.Event()

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith("gpucache-reader") and not failed.is_set():
            failed.set()
            raise RuntimeError("can't start new thread")
        start(self)

    with GPUFeatureStore("cpu", load_fn=gate, read_timeout=0.1) as store:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        batch = store.request(NAMES[:4])
        assert list(batch.wait()) == [0] and failed.is_set()
        gate.open(NAMES[0])


@pytest.mark.usefixtures("python_reader")
def test_descriptors_behind_a_hang_are_closed(
    make_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(32, lambda number: sample(number, 30_000))
    go_on = threading.Event()
    probe = FileOpener.probe

    def hang(self: FileOpener, path: str) -> Any:
        if path == paths[-1] and not go_on.is_set():
            assert go_on.wait(60)
        return probe(self, path)

    def descriptors() -> int:
        return sum(
            os.readlink(f"/proc/self/fd/{fd}").endswith(".pt")
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
        )

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no way to count them here")
    monkeypatch.setattr(FileOpener, "probe", hang)
    with GPUFeatureStore("cpu", read_timeout=0.1, staging_bytes="64MiB") as store:
        for _ in range(3):
            store.clear()
            assert list(store.request(paths).wait()) == [31]
        store.clear()
        store.stats()
        assert descriptors() == 0
        go_on.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"read_timeout": 0}, "read_timeout=0 must be a positive"),
        ({"read_timeout": float("inf")}, "read_timeout=inf must be a positive, finite number"),
        ({"read_timeout": 5, "asynchronous": False}, "needs reader threads"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPUFeatureStore("cpu", **options)


def test_a_native_read_that_hangs(make_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file fails; those before and after it are read by another reader."""
    paths = make_files(40)
    with GPUFeatureStore("cpu", read_timeout=0.2) as store:
        store.get_batch(paths[:8])  # the form is known
        native, go_on, rows = batch_reader._native, threading.Event(), []
        if native is None:
            pytest.skip("there is no native reader")

        class Hanging:
            copy, Form = native.copy, native.Form

            @staticmethod
            def read(forms: Any, names: tuple[str, ...], *rest: Any) -> int:
                if paths[20] not in names or rows:
                    return native.read(forms, names, *rest)
                at = names.index(paths[20])
                assert native.read(forms, names[:at], *rest) == at
                rest[-1][0] = at
                rows.append(rest[-1])
                assert go_on.wait(60)
                return at + 1

        monkeypatch.setattr(batch_reader, "_native", Hanging)
        batch = store.request(paths[8:])
        assert list(batch.wait()) == [12]
        assert rows[0][2], "the reader that was left behind is told to stop"
        with pytest.raises(FeatureLoadError, match="read_timeout"):
            batch.result()
        go_on.set()
        wait_for_readers(store)
        assert [label(f) for f in store.get_batch(paths)] == list(range(40))
        store.check()
