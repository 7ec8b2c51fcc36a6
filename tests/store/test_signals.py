"""Signals: handlers may call the store whatever they have interrupted, and never wait for ever."""

import contextlib
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Acting, device_for, sample, wait_for_readers

from gpucache_pipes import (
    FeatureLoadError,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
    PendingBatch,
    PolicyError,
)
from gpucache_pipes.device import AcceleratorBackend, HostBackend, InOrderRuntime
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.testing.contracts import in_threads

Files = Callable[..., list[str]]
KINDS = ["host", "staged", "simulated"]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGVTALRM]
"""Two that are deferred under the lock, and one that is not."""


@pytest.fixture(params=SIGNALS, ids=lambda number: signal.Signals(number).name)
def handled(request: pytest.FixtureRequest) -> Iterator[Any]:
    """handled(function): a signal that is handled by it, and how to send it to the main thread."""
    number = request.param
    before = signal.getsignal(number)

    def install(function: Callable[[], None]) -> Callable[[], None]:
        signal.signal(number, lambda *_: function())
        main = threading.main_thread().ident
        assert main is not None
        return lambda: signal.pthread_kill(main, number)

    yield install
    signal.signal(number, before)


def backend_of(kind: str) -> Any:
    return HostBackend() if kind == "host" else device_for(kind)


FEATURES = {f"/{number}": sample(number) for number in range(4)}
LABELS = [0, 1, 2, 3]


def labels(batch: Any) -> list[int]:
    return [int(feature["label"]) for feature in batch]


def require_closed(store: GPUFeatureStore) -> None:
    assert not store.stats().reserved_bytes
    with pytest.raises(RuntimeError, match="closed"):
        store.get("/0")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_close_by_a_handler_under_the_lock(handled: Any, asynchronous: bool) -> None:
    def close() -> None:
        store.close()

    send = handled(close)
    policy: Any = Acting(send)
    store = GPUFeatureStore(
        "cpu", load_fn=FEATURES.__getitem__, asynchronous=asynchronous, policy=policy,
        max_cache_items=1,
    )  # fmt: skip

    def use() -> None:
        for _ in range(3):
            store.get_batch(list(FEATURES))

    with pytest.raises(RuntimeError, match="closed"):
        use()
    # A reader thread that leaves the lock may do what was postponed: this waits for it.
    store.close()
    require_closed(store)


@pytest.mark.parametrize("kind", KINDS)
def test_close_by_a_handler_in_a_gather(
    handled: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that is being gathered still comes; the memory goes behind it."""
    backend = backend_of(kind)
    store = GPUFeatureStore(backend, load_fn=FEATURES.__getitem__)
    store.get_batch(list(FEATURES))
    send = handled(store.close)
    gather = backend.gather

    def interrupted(*arguments: Any) -> Any:
        send()
        assert store.stats().reserved_bytes
        return gather(*arguments)

    monkeypatch.setattr(backend, "gather", interrupted)
    assert labels(store.get_batch(list(FEATURES))) == LABELS
    require_closed(store)


def test_close_by_a_handler_while_waiting_for_files(handled: Any) -> None:
    go_on = threading.Event()
    started = threading.Event()

    def load(path: str) -> Any:
        started.set()
        assert go_on.wait(60)
        return sample(0)

    store = GPUFeatureStore("cpu", load_fn=load)

    def close() -> None:
        go_on.set()  # close waits for readers, which is not what this is about
        store.close()

    send = handled(close)
    pending = store.request(["/0"])
    assert started.wait(60)
    threading.Timer(0.2, send).start()
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()
    store.close()


class Watched:
    """An event of a device, which says when it is looked at: so with the log's lock held."""

    def __init__(self, event: Any, looked_at: Callable[[], None]) -> None:
        self._event, self._looked_at = event, looked_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._event, name)

    def query(self) -> Any:
        self._looked_at()
        return self._event.query()


class WatchedRuntime(InOrderRuntime):
    looked_at: Callable[[], None] = staticmethod(lambda: None)

    def new_event(self) -> Any:
        return Watched(super().new_event(), lambda: self.looked_at())


def test_close_by_a_handler_while_another_thread_needs_what_this_one_holds(handled: Any) -> None:
    """This thread is interrupted with the log of the device locked, and the other gathers.

    A handler that waited for the other thread would wait for ever.
    """
    runtime = WatchedRuntime(torch.device("cpu"))
    backend = AcceleratorBackend(runtime)
    store = GPUFeatureStore(backend, load_fn=FEATURES.__getitem__)
    store.get_batch(list(FEATURES))
    send = handled(store.close)
    gather, main = backend.gather, threading.main_thread()
    in_gather, sent = threading.Event(), threading.Event()
    got: list[int] = []

    def in_the_log() -> None:
        if threading.current_thread() is main and not sent.is_set():
            other.start()
            assert in_gather.wait(60)
            sent.set()
            send()

    def gathering(*arguments: Any) -> Any:
        if threading.current_thread() is not main:
            in_gather.set()
        return gather(*arguments)

    other = threading.Thread(target=lambda: got.extend(labels(store.get_batch(list(FEATURES)))))
    backend.gather = gathering  # type: ignore[method-assign]
    runtime.looked_at = in_the_log
    assert labels(store.get_batch(list(FEATURES))) == LABELS
    other.join(60)
    assert not other.is_alive() and got == LABELS and sent.is_set()
    require_closed(store)


def test_a_state_that_a_handler_takes_resumes_between_batches(handled: Any) -> None:
    """Also in the middle of several elements that are taken as one batch."""
    paths = list(FEATURES) * 3
    with GPUFeatureStore("cpu", load_fn=FEATURES.__getitem__) as store:

        def batches() -> Any:
            lister = PathLister(paths)
            return GPUCollator(GPUPrefetcher(lister, store), batch_size=4, collate_fn=labels)

        node = batches()
        states: list[Any] = []
        send = handled(lambda: states.append(node.state_dict()))
        cancel = PendingBatch.cancel

        def interrupted(self: PendingBatch) -> None:
            send()
            cancel(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PendingBatch, "cancel", interrupted)
            assert list(node) == [LABELS] * 3
        assert len(states) == 12
        for at, state in enumerate(states):
            resumed = batches()
            resumed.reset(state)
            assert list(resumed) == [LABELS] * (3 - at // 4)


def test_closing_twice_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = HostBackend()
    store = GPUFeatureStore(backend, load_fn=FEATURES.__getitem__)
    store.get_batch(list(FEATURES))
    begun, go_on = threading.Event(), threading.Event()
    close = backend.close

    def slow() -> None:
        begun.set()
        assert go_on.wait(60)
        close()

    monkeypatch.setattr(backend, "close", slow)
    first, second = threading.Thread(target=store.close), threading.Thread(target=store.close)
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    second.join(60)
    assert not second.is_alive()
    require_closed(store)
    first.join(60)


@pytest.mark.parametrize("kind", ["host", "staged"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_cache_items": 3},
        {"max_cache_items": 3, "asynchronous": False},
        {},
        {"max_cache_items": 3, "host_cache_bytes": 400},
    ],
    ids=str,
)
def test_all_that_a_handler_may_call(handled: Any, kind: str, options: dict[str, Any]) -> None:
    """At random moments, until each call has come many times; then the store is as it should be."""
    features = {f"/{number}": sample(number) for number in range(12)}
    paths = list(features)
    with GPUFeatureStore(device_for(kind), load_fn=features.__getitem__, **options) as store:
        node = GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True), store, depth=2)
        calls: list[Callable[[], Any]] = [
            store.stats,
            node.state_dict,
            lambda: store.release(paths[:6]),
            lambda: store.release(["/unknown"]),
            store.clear,
        ]
        made = [0]

        def call() -> None:
            calls[made[0] % len(calls)]()
            made[0] += 1

        send = handled(call)
        over = threading.Event()

        def keep_sending() -> None:
            while made[0] < 150 and not over.is_set():
                time.sleep(0.0005)
                send()

        thread = threading.Thread(target=keep_sending)
        thread.start()
        while thread.is_alive():
            node.reset()
            for batch in node:
                assert all(torch.equal(f["feature"], sample(int(f["label"]))["feature"])
                           for f in batch)  # fmt: skip
            assert [int(f["label"]) for f in store.get_batch(paths)] == list(range(12))
        thread.join()
        over.set()
        assert made[0] >= 150
        node.shutdown()
        wait_for_readers(store)
        store.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_what_a_handler_raises_waits_until_the_lock_is_released(number: int) -> None:
    lock = StoreLock()
    steps: list[str] = []

    class GivenUpError(Exception):
        pass

    def give_up(number: int, frame: Any) -> None:
        steps.append("handled")
        raise GivenUpError

    def inside(wait: bool) -> None:
        with lock:
            signal.pthread_kill(main, number)
            steps.append("inside")
            while wait:
                lock.wait()
        steps.append("behind")

    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(number, give_up)
    try:
        for wait in (False, True):
            with pytest.raises(GivenUpError):
                inside(wait)
            assert steps == ["inside", "handled"] and not lock.locked()
            steps.clear()
    finally:
        assert signal.signal(number, before) is give_up
    with lock:
        pass


@pytest.mark.parametrize("step", range(6))
def test_a_handler_between_the_steps_of_deferring(
    monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """One that is not deferred, and uses a store: in the end all handlers are where they were."""
    from gpucache_pipes.store import lock as module

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGALRM]
    handlers = [lambda *_, n=n: handled.append(n) for n in numbers]
    handled: list[int] = []
    before = [signal.signal(n, h) for n, h in zip(numbers, handlers, strict=True)]
    set_handler, calls = module.set_handler, [0]

    def interrupted(number: int, handler: Any) -> Any:
        found = set_handler(number, handler)
        calls[0] += 1
        if calls[0] == step + 1:
            with StoreLock():
                for sent in numbers:
                    signal.raise_signal(sent)
        return found

    monkeypatch.setattr(module, "set_handler", interrupted)
    try:
        with StoreLock():
            pass
        assert calls[0] > step
        assert [signal.getsignal(number) for number in numbers] == handlers
        assert sorted(handled) == sorted(numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("nth", range(8))
def test_an_error_at_the_end_of_any_section_leaves_nothing_in_use(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool, nth: int
) -> None:
    """What a deferred signal raises comes where the lock is released."""
    options: dict[str, Any] = {"load_fn": FEATURES.__getitem__, "asynchronous": asynchronous}
    with GPUFeatureStore("cpu", **options) as store:
        leave, left, main = StoreLock.__exit__, [0], threading.current_thread()

        def interrupted(self: StoreLock, *rest: Any) -> None:
            leave(self, *rest)
            if threading.current_thread() is main:
                left[0] += 1
                if left[0] == nth + 1:
                    raise KeyboardInterrupt

        monkeypatch.setattr(StoreLock, "__exit__", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            store.get_batch(list(FEATURES))
        monkeypatch.undo()
        gc.collect()  # the pending is told of the interrupt, whose traceback has the pending
        wait_for_readers(store)
        store.check()
        assert labels(store.get_batch(list(FEATURES))) == LABELS
        store.clear()
        assert store.stats().reserved_bytes == 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_finalizer_may_close_a_store_from_inside(asynchronous: bool) -> None:
    """In a thread that holds the lock, where the garbage collector may run."""

    class Owner:
        def __del__(self) -> None:
            store.close()

    def collect() -> None:
        owner = Owner()
        owner.itself = owner  # type: ignore[attr-defined]
        del owner
        gc.collect()

    policy: Any = Acting(collect)
    store = GPUFeatureStore(
        "cpu", load_fn=FEATURES.__getitem__, asynchronous=asynchronous, policy=policy,
        max_cache_items=1,
    )  # fmt: skip

    def use() -> None:
        for _ in range(2):
            store.get_batch(list(FEATURES))

    with pytest.raises(RuntimeError, match="closed"):
        use()
    store.close()  # waits for the one who is at it
    require_closed(store)


def test_what_may_not_be_called_from_inside_says_so() -> None:
    policy: Any = Acting(lambda: store.get("/1"))
    options: dict[str, Any] = {"load_fn": FEATURES.__getitem__, "asynchronous": False}
    with GPUFeatureStore("cpu", policy=policy, max_cache_items=1, **options) as store:
        store.get("/0")
        with pytest.raises(PolicyError, match="called from within itself"):
            store.get("/2")
        store.check()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_job_that_is_told_to_end(make_files: Files, tmp_path: Path, threads: int) -> None:
    """As clusters do it: SIGTERM, and a handler that closes the store and ends the process."""
    paths = make_files(40)
    code = f"""
import os, signal, sys, threading
from gpucache_pipes import *
store = GPUFeatureStore("cpu", max_cache_items=15, asynchronous={bool(threads)})
def end(number, frame):
    store.close()
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
def consume(seed):
    node = GPUPrefetcher(PathLister({paths!r}, batch_size=4, shuffle=True, seed=seed), store)
    try:
        while True:
            for batch in node:
                pass
            node.reset()
    except RuntimeError as error:
        if threading.current_thread() is threading.main_thread() or "closed" not in str(error):
            raise
for seed in range({threads}):
    threading.Thread(target=consume, args=(seed,)).start()
print("begun", flush=True)
consume(9)
"""

    def run(number: int) -> None:
        for attempt in range(2):
            with subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"begun\n"
                time.sleep(0.05 + 0.0137 * (attempt + 4 * number))
                process.terminate()
                try:
                    _, said = process.communicate(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
                assert process.returncode == 7, said

    in_threads(run, 2)


def test_closing_a_store_in_the_middle_of_an_upload_of_another_thread() -> None:
    """With asynchronous=False: the upload ends, or fails by an error that says why."""
    started, go_on = threading.Event(), threading.Event()
    said: list[str] = []

    def load(path: str) -> Any:
        started.set()
        assert go_on.wait(60)
        return sample(int(path[1:]))

    store = GPUFeatureStore(device_for("staged"), load_fn=load, asynchronous=False)

    def consume() -> None:
        try:
            store.get_batch(["/0", "/1"])
        except RuntimeError as error:
            said.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert started.wait(60)
    closer = threading.Thread(target=store.close)
    closer.start()
    wait_until_it_refuses(store)
    go_on.set()
    consumer.join(60)
    closer.join(60)
    assert not consumer.is_alive() and not closer.is_alive()
    assert len(said) == 1 and "closed" in said[0], said
    require_closed(store)


def wait_until_it_refuses(store: GPUFeatureStore) -> None:
    try:
        while True:
            store.prefetch([])
            time.sleep(0.001)
    except RuntimeError:
        pass


def test_an_operation_that_outlasts_closing_gives_memory_back_itself() -> None:
    started, go_on = threading.Event(), threading.Event()

    def load(path: str) -> Any:
        if path == "/1":
            started.set()
            assert go_on.wait(60)
        return sample(int(path[1:]))

    store = GPUFeatureStore("cpu", load_fn=load, asynchronous=False)
    store.get("/0")

    def consume() -> None:
        with pytest.raises(RuntimeError):
            store.get("/1")

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert started.wait(60)
    store.close(0.01)
    assert store.stats().reserved_bytes
    go_on.set()
    consumer.join(60)
    require_closed(store)


def test_near_the_limit_of_recursion_nothing_is_left_loading() -> None:
    features = {f"/{number}": sample(number) for number in range(400)}
    paths = iter(features)
    for asynchronous in (False, True):
        with GPUFeatureStore(
            "cpu", load_fn=features.__getitem__, asynchronous=asynchronous, max_cache_items=5
        ) as store:

            def deeper(then: Callable[[], Any], frames: int, store: GPUFeatureStore = store) -> Any:
                return deeper(then, frames - 1) if frames else then()

            room = sys.getrecursionlimit() - len(list_frames())
            failed = 0
            for frames in range(room - 120, room - 4):
                path = next(paths)
                for call in (lambda p=path: store.get(p), lambda p=path: store.release([p])):
                    try:
                        deeper(call, frames)
                    except RecursionError:
                        failed += 1
                    except FeatureLoadError:  # of reading, in this thread
                        failed += 1
                wait_for_readers(store)
                store.check()
                assert int(store.get(path)["label"]) == int(path[1:])
            assert failed > 20


def list_frames() -> list[Any]:
    frames, frame = [], sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def test_nothing_is_imported_while_a_store_is_used(make_files: Files) -> None:
    """A handler that raises in the middle of a lazy import of numpy leaves numpy broken."""
    paths = make_files(8)
    code = f"""
import sys
from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

before = set()
with GPUFeatureStore("cpu", max_cache_bytes="30KiB", revalidate=True) as store:
    for turn in range(2):
        store.warm({paths}, progress=False)
        lister = PathLister({paths}, batch_size=3, shuffle=True)
        for _ in GPUCollator(GPUPrefetcher(lister, store)):
            pass
        {paths[0]!r} in store
        store.release({paths})
        store.get_batch({paths})
        store.stats()
        store.clear()
        if not turn:
            before = set(sys.modules)
            lazy = [name for name in before if name == "numpy.ma"]
print(sorted(set(sys.modules) - before) + lazy)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr
