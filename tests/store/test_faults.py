"""Each fault, at each stage, under load: what a consumer sees, and that nothing is left behind."""

import errno
import gc
import itertools
import os
import pickle
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import device_for, sample, wait_for_readers

from gpucache_pipes import FeatureLoadError, GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import InOrderRuntime
from gpucache_pipes.files import batch_reader, chunks, planned
from gpucache_pipes.testing.contracts import in_threads

Files = Callable[..., list[str]]
FILES, BATCH, BAD = 24, 4, 13
GOOD = [list(range(at, at + BATCH)) for at in range(0, FILES, BATCH)]


def label(feature: Any) -> int:
    return int(feature["label"])


class Rig:
    """Files, a store over them, and one file that something is done to."""

    def __init__(
        self, make_files: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Large enough for some of them not to be read in one piece.
        self.paths = make_files(FILES, lambda n: sample(n, 20_000 if n % 2 else 8))
        self.bad = self.paths[BAD]
        self.monkeypatch = monkeypatch
        self.content = Path(self.bad).read_bytes()
        self.mend: Callable[[], None] = self.write_again
        self.options: dict[str, Any] = {}

    def write_again(self) -> None:
        path = Path(self.bad)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(self.content)

    def hook(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        """Also in the native reader, which leaves to Python what it cannot read."""
        self.monkeypatch.setattr(module, name, function)
        native = batch_reader._native
        if native is not None:
            self.monkeypatch.setattr(batch_reader, "_native", Failing(native, self.bad))
        self.mend = self.monkeypatch.undo


class Failing:
    """The native reader, which fails to read one path."""

    def __init__(self, native: Any, bad: str) -> None:
        self._native = native
        self._bad = bad
        self.copy, self.Form = native.copy, native.Form

    def read(self, forms: Any, paths: tuple[str, ...], *rest: Any) -> int:
        end: int = self._native.read(forms, paths, *rest)
        rows = rest[2]
        rows[: len(paths)][[path == self._bad for path in paths], 0] = chunks.LEFT_TO_PYTHON
        return end


def missing(rig: Rig) -> None:
    os.unlink(rig.bad)


def empty(rig: Rig) -> None:
    Path(rig.bad).write_bytes(b"")


def truncated(rig: Rig) -> None:
    Path(rig.bad).write_bytes(rig.content[: len(rig.content) // 2])


def corrupt(rig: Rig) -> None:
    middle = rig.content.index(b"data.pkl")
    Path(rig.bad).write_bytes(rig.content[:middle] + os.urandom(200) + rig.content[middle + 200 :])


def a_directory(rig: Rig) -> None:
    os.unlink(rig.bad)
    os.mkdir(rig.bad)


def a_fifo(rig: Rig) -> None:
    os.unlink(rig.bad)
    os.mkfifo(rig.bad)


def unreadable(rig: Rig) -> None:
    # A superuser may read everything: so it is said that this one may not.
    def refuse(path: str, *rest: Any, **named: Any) -> int:
        if path == rig.bad:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return before(path, *rest, **named)

    before = os.open
    rig.hook(planned.os, "open", refuse)


def cut_while_it_is_read(rig: Rig) -> None:
    """Somebody writes the file anew, shorter, between its directory and its bytes."""

    def cut(fd: int, buffers: Any, offset: int, *rest: int) -> int:
        if os.fstat(fd).st_ino == inode:
            os.truncate(rig.bad, 4096)
        return before(fd, buffers, offset, *rest)

    before, inode = os.preadv, os.stat(rig.bad).st_ino
    rig.hook(planned.os, "preadv", cut)
    rig.mend = lambda: (rig.monkeypatch.undo(), rig.write_again())  # type: ignore[assignment, func-returns-value]


def _faulty(number: int) -> Callable[[Rig], None]:
    def inject(rig: Rig) -> None:
        def fail(fd: int, buffers: Any, offset: int, *rest: int) -> int:
            if os.fstat(fd).st_ino == inode:
                raise OSError(number, os.strerror(number))
            return before(fd, buffers, offset, *rest)

        before, inode = os.preadv, os.stat(rig.bad).st_ino
        rig.hook(planned.os, "preadv", fail)

    inject.__name__ = errno.errorcode[number]
    return inject


def _load_fn(name: str, does: Callable[[], Any]) -> Callable[[Rig], None]:
    def inject(rig: Rig) -> None:
        bad = [True]

        def load(path: str) -> Any:
            return does() if bad and path == rig.bad else torch.load(path)

        rig.options["load_fn"] = load
        if "disk_cache" in rig.options:
            rig.options["disk_cache_key"] = "faults"
        rig.mend = bad.clear

    inject.__name__ = name
    return inject


def _raise(error: BaseException) -> Any:
    raise error


class Locked:
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("cannot be copied")


FAULTS: list[tuple[Callable[[Rig], None], type[Exception]]] = [
    (missing, FileNotFoundError),
    (empty, FeatureLoadError),
    (truncated, FeatureLoadError),
    (corrupt, FeatureLoadError),
    (a_directory, FeatureLoadError),
    (a_fifo, FeatureLoadError),
    (unreadable, FeatureLoadError),
    (cut_while_it_is_read, FeatureLoadError),
    (_faulty(errno.EIO), FeatureLoadError),
    (_faulty(errno.ENOSPC), FeatureLoadError),
    (_faulty(errno.ESTALE), FeatureLoadError),
    (_load_fn("load_fn raises", lambda: _raise(ZeroDivisionError("by zero"))), FeatureLoadError),
    (_load_fn("load_fn stops", lambda: _raise(StopIteration())), FeatureLoadError),
    (_load_fn("load_fn exits", lambda: _raise(SystemExit(3))), FeatureLoadError),
    (_load_fn("load_fn lacks memory", lambda: _raise(MemoryError())), MemoryError),
    (_load_fn("sparse garbage", lambda: torch.eye(3).to_sparse()), FeatureLoadError),
    (_load_fn("meta garbage", lambda: torch.empty(3, device="meta")), FeatureLoadError),
    (_load_fn("a subclass", lambda: {"x": {1: [type("T", (dict,), {})()]}}), FeatureLoadError),
]


each_fault = pytest.mark.parametrize(
    ("fault", "kind_of_error"), FAULTS, ids=lambda f: getattr(f, "__name__", "")
)


@pytest.fixture
def rig(make_files: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(make_files, monkeypatch)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    def count() -> int:
        gc.collect()
        here = Path("/proc/self/fd")
        return len(list(here.iterdir())) if here.exists() else 0

    before = count()
    yield
    assert count() <= before


def require_nothing_left(store: GPUFeatureStore) -> None:
    wait_for_readers(store)
    gc.collect()
    store.check()
    stats = store.stats()
    assert stats.pending_batches == stats.bypassed_items == 0


def epoch(node: Any) -> list[Any]:
    """The labels of each batch, or the error that came in its place."""
    got: list[Any] = []
    while True:
        try:
            got.append([label(feature) for feature in next(node)])
        except StopIteration:
            return got
        except Exception as error:
            got.append(error)


@each_fault
@pytest.mark.parametrize("kind", ["host", "staged", "tiers"])
@pytest.mark.parametrize("stage", ["cold", "cached by others", "mid-epoch", "no reader threads"])
def test_a_fault_reaches_who_needs_the_file_and_nobody_else(
    rig: Rig,
    fault: Callable[[Rig], None],
    kind_of_error: type[Exception],
    kind: str,
    stage: str,
    tmp_path: Path,
) -> None:
    if kind == "tiers":
        if stage == "cached by others":
            pytest.skip("as in mid-epoch")
        kind = "staged"
        rig.options.update(host_cache_bytes="1MiB", disk_cache=tmp_path / "cache")
        for path in rig.paths:  # but for the bad one, which is too new for a disk cache
            if path != rig.bad:
                os.utime(path, (10**9, 10**9))
    rig.options["asynchronous"] = stage != "no reader threads"
    if stage == "no reader threads" and fault.__name__ == "load_fn exits":
        pytest.skip("in the caller's thread it is the caller who exits")

    def make() -> GPUPrefetcher:
        return GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=3)

    early = stage in ("cold", "no reader threads")
    if early:
        fault(rig)
    elif fault.__name__.startswith(("load_fn", "sparse", "meta", "a sub")):
        fault(rig)  # which sets the load_fn of the store
    store = GPUFeatureStore(device_for(kind), max_cache_items=10, **rig.options)
    with store:
        node = make()
        if stage == "cached by others":
            store.get_batch([path for path in rig.paths if path != rig.bad])
        if stage == "mid-epoch":
            assert [label(f) for f in next(node)] == GOOD[0]
            # Everything that was requested ahead has been read, and only then it happens.
            wait_for_readers(store)
        if not early and "load_fn" not in rig.options:
            store.release([rig.bad])
            fault(rig)
        got = epoch(node)
        bad = BAD // BATCH
        expected = GOOD[1:] if stage == "mid-epoch" else list(GOOD)
        at = bad - (stage == "mid-epoch")
        error = got[at]
        if stage == "mid-epoch" and isinstance(error, list):
            assert error == GOOD[bad]  # it had been read before it happened
        else:
            assert type(error) is kind_of_error and rig.bad in str(error)
            if isinstance(error, FeatureLoadError):
                assert error.path == rig.bad and error.__cause__ is not None
            expected[at] = error
        assert got == expected
        # Each request tries again; and others are served meanwhile.
        if stage != "mid-epoch":
            with pytest.raises(kind_of_error):
                store.get(rig.bad)
        assert label(store.get(rig.paths[0])) == 0
        node.shutdown()
        require_nothing_left(store)
        rig.mend()
        assert label(store.get(rig.bad)) == BAD
        node.reset()
        assert epoch(node) == GOOD
        require_nothing_left(store)


@each_fault
def test_under_load_everybody_meets_the_fault_at_the_same_batch(
    rig: Rig, fault: Callable[[Rig], None], kind_of_error: type[Exception]
) -> None:
    fault(rig)
    with GPUFeatureStore("cpu", max_cache_items=6, reader_threads=2, **rig.options) as store:

        def consume(who: int) -> None:
            source = PathLister(rig.paths, batch_size=BATCH, shuffle=True, seed=who)
            node = GPUPrefetcher(source, store, depth=who + 1)
            for number in range(2):
                lister = PathLister(rig.paths, batch_size=BATCH, shuffle=True, seed=who)
                lister.set_epoch(number)
                node.reset()
                got = epoch(node)
                for paths, batch in zip(lister, got, strict=True):
                    if rig.bad in paths:
                        assert type(batch) is kind_of_error
                    else:
                        assert batch == [rig.paths.index(path) for path in paths]

        in_threads(consume, 4)
        require_nothing_left(store)


def test_no_host_memory_for_staging(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    store = GPUFeatureStore(device_for("staged"))
    with store:
        lacking = [True]

        def pinned(self: InOrderRuntime, nbytes: int) -> torch.Tensor:
            if lacking:
                raise MemoryError("cannot pin memory")
            return before(self, nbytes)

        before = InOrderRuntime.pinned
        monkeypatch.setattr(InOrderRuntime, "pinned", pinned)
        node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=3)
        for number in range(3):
            with pytest.raises(MemoryError, match=f"{rig.paths[number * BATCH]}.*cannot pin"):
                next(node)
        wait_for_readers(store)
        store.check()
        assert len(store) == store.stats().bypassed_items == 0
        lacking.clear()
        node.reset()
        assert epoch(node) == GOOD
        node.shutdown()
        require_nothing_left(store)


def test_no_device_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = device_for("staged")
    lacking = [True]
    before = backend.grow

    def grow(needed: int, useful: int | None, known: int | None) -> int:
        return 0 if lacking else before(needed, useful, known)

    monkeypatch.setattr(backend, "grow", grow)
    with GPUFeatureStore(backend) as store:
        node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=2)
        with pytest.raises(MemoryError, match="no device memory for"):
            next(node)
        lacking.clear()
        node.reset()
        assert epoch(node) == GOOD
        require_nothing_left(store)


class Interrupting:
    """A collate_fn that fails in the middle of an epoch."""

    def __init__(self, error: BaseException) -> None:
        self.errors = [error]

    def __call__(self, features: list[Any]) -> Any:
        if self.errors and label(features[0]) == 8:
            raise self.errors.pop()
        return [label(feature) for feature in features]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("odd"), StopIteration()])
def test_an_exception_in_collate_fn(rig: Rig, error: BaseException) -> None:
    with GPUFeatureStore("cpu", max_cache_items=5) as store:
        features = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=3)
        batches = GPUCollator(features, collate_fn=Interrupting(error))
        got: list[Any] = []
        for _ in GOOD:
            try:
                got.append(next(batches))
            except (KeyboardInterrupt, ValueError, RuntimeError) as raised:
                got.append(type(raised))
        expected: list[Any] = list(GOOD)
        expected[2] = RuntimeError if isinstance(error, StopIteration) else type(error)
        assert got == expected
        batches.shutdown()
        require_nothing_left(store)


def test_closing_in_the_middle_of_everything(rig: Rig) -> None:
    """From another thread, while consumers are in all stages of a batch."""
    for attempt in range(10):
        store = GPUFeatureStore("cpu", max_cache_items=5, reader_threads=2)
        begun = threading.Barrier(4)
        told: list[str] = []

        def consume(
            who: int, store: Any = store, begun: Any = begun, told: list[str] = told
        ) -> None:
            node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=who)
            next(node)
            begun.wait(60)
            try:
                for epochs in itertools.count():
                    for batch in node:
                        assert len(batch) == BATCH
                    node.reset()
                    assert epochs < 100_000
            except RuntimeError as error:
                told.append(str(error))

        threads = [threading.Thread(target=consume, args=(who,)) for who in (1, 2, 3)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        for _ in range(attempt):
            store.stats()
        store.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert told == ["this GPUFeatureStore is closed"] * 3


def test_collection_at_any_moment(rig: Rig) -> None:
    """Pipelines and tickets in cycles, and a collector that runs at every allocation."""
    thresholds = gc.get_threshold()
    with GPUFeatureStore("cpu", max_cache_items=5) as store:
        gc.set_threshold(1, 1, 1)
        try:
            for depth in (1, 3):
                node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=depth)
                pending = store.request(rig.paths[:6])
                cycle: list[Any] = [node, pending]
                cycle.append(cycle)
                assert [label(f) for f in next(node)] == GOOD[0]
                del node, pending, cycle
                assert label(store.get(rig.paths[1])) == 1
        finally:
            gc.set_threshold(*thresholds)
        require_nothing_left(store)


def test_pickling(rig: Rig) -> None:
    with GPUFeatureStore("cpu") as store:
        node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store)
        for thing in (store, node, GPUCollator(node)):
            with pytest.raises(TypeError, match="cannot be pickled; give worker processes paths"):
                pickle.dumps(thing)
        assert epoch(node) == GOOD


@pytest.mark.parametrize("end", ["", "raise SystemExit(4)", "os.kill(os.getpid(), 15)", "1 / 0"])
def test_the_process_ends_in_the_middle_of_an_epoch(rig: Rig, end: str) -> None:
    code = f"""
import os, sys
from gpucache_pipes import *
store = GPUFeatureStore("cpu", max_cache_items=3)
node = GPUPrefetcher(PathLister({rig.paths!r}, batch_size=4), store, depth=4)
next(node)
print("begun", flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    codes = {"": 0, "raise SystemExit(4)": 4, "os.kill(os.getpid(), 15)": -15, "1 / 0": 1}
    assert done.returncode == codes[end] and "begun" in done.stdout
    assert ("ZeroDivisionError" in done.stderr) == (end == "1 / 0")
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr


def test_a_file_that_takes_its_time_holds_up_only_who_needs_it(rig: Rig) -> None:
    go_on = threading.Event()

    def load(path: str) -> Any:
        if path == rig.bad:
            assert go_on.wait(60)
        return torch.load(path)

    with GPUFeatureStore("cpu", load_fn=load, reader_threads=2) as store:
        node = GPUPrefetcher(PathLister(rig.paths, batch_size=BATCH), store, depth=2)
        others = [path for path in rig.paths if path != rig.bad]
        assert [label(f) for f in next(node)] == GOOD[0]
        assert [label(f) for f in next(node)] == GOOD[1]
        ahead = store.request(rig.paths[BAD : BAD + 1])
        assert [label(f) for f in store.get_batch(others[:8])] == list(range(8))
        go_on.set()
        assert label(ahead.result()[0]) == BAD
        assert epoch(node) == GOOD[2:]


def test_a_superuser_is_told_as_well(tmp_path: Path) -> None:
    """What can be seen of a file's kind without opening it: a socket, a device."""
    path = "/dev/zero"
    if not stat.S_ISCHR(os.stat(path).st_mode):
        pytest.skip("no such device here")
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match="not a regular"):
        store.get(path)
