"""Interrupts while files are handed to reader threads, or read."""

import contextlib
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Acting

import gpucache_pipes
from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.store.lock import StoreLock
from gpucache_pipes.store.reader_pool import ReaderPool

Files = Callable[..., list[str]]


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


# A descriptor whose owner was interrupted before it was told of it is closed by its FileIO, with a
# ResourceWarning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_interrupt_at_the_entry_of_any_function(
    make_files: Files, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """One of them after the other; under the lock, where signals are deferred, there is none."""
    paths = make_files(6)
    package = str(Path(gpucache_pipes.__file__).parent)
    me = threading.get_ident()
    inside = [0]
    enter, leave = StoreLock.__enter__, StoreLock.__exit__

    def entering(self: StoreLock) -> None:
        inside[0] += threading.get_ident() == me
        enter(self)

    def leaving(self: StoreLock, *rest: Any) -> None:
        leave(self, *rest)
        inside[0] -= threading.get_ident() == me

    monkeypatch.setattr(StoreLock, "__enter__", entering)
    monkeypatch.setattr(StoreLock, "__exit__", leaving)

    def interrupted_at(nth: int) -> bool:
        seen = [0]

        def trace(frame: Any, event: str, argument: Any) -> None:
            name = frame.f_code.co_filename
            if name.startswith(package) and not name.endswith("lock.py") and not inside[0]:
                seen[0] += 1
                if seen[0] == nth:
                    sys.settrace(None)
                    raise KeyboardInterrupt

        with GPUFeatureStore(
            "cpu", asynchronous=asynchronous, max_cache_items=3, policy="lru"
        ) as store:
            store.get_batch(paths[:2])
            with contextlib.suppress(KeyboardInterrupt):
                sys.settrace(trace)
                try:
                    store.get_batch(paths[:5])
                finally:
                    sys.settrace(None)
            batch = store.request(paths[:5])
            assert not batch.wait()
            assert [int(feature["label"]) for feature in batch.result()] == [0, 1, 2, 3, 4]
            assert store.wait_idle(60)
            gc.collect()
            assert store.stats().pending_batches == 0
            store.clear()
            assert store.stats().reserved_bytes == 0  # no use of memory is left
        return seen[0] >= nth

    places = 1
    while interrupted_at(places):
        places += 1
    assert places > 40


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_policy_raises_ends_no_wake_up(make_files: Files, asynchronous: bool) -> None:
    """A SystemExit in the middle of a group: all of it fails, and nobody waits for it."""
    paths = make_files(4)
    chosen = [0]

    def leave() -> None:
        chosen[0] += 1
        if chosen[0] == 2:
            raise SystemExit

    policy: Any = Acting(leave)
    options: dict[str, Any] = {"policy": policy, "max_cache_items": 1}
    with GPUFeatureStore("cpu", asynchronous=asynchronous, **options) as store:
        if asynchronous:
            assert store.request(paths).wait()
        else:
            with pytest.raises(SystemExit):
                store.request(paths)
        store.check()
        gc.collect()
        assert [int(feature["label"]) for feature in store.get_batch(paths)] == [0, 1, 2, 3]
