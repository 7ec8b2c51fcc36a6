"""Ctrl-C at any moment: real signals, as fast as they can be sent."""

import gc
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import device_for, sample, wait_for_readers

from gpucache_pipes import GPUFeatureStore, GPUPrefetcher
from gpucache_pipes.store.lock import StoreLock

Files = Callable[..., list[str]]


def interrupt() -> None:
    """To the main thread itself, so that it has come when that thread goes on."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def under_interrupts(seed: int, wanted: int, work: Callable[[], None]) -> None:
    """Do `work` again and again while interrupts come at random moments.

    Until it has been interrupted `wanted` times and has come to its end as often. One interrupt at
    a time: the next is let through when work begins anew.
    """
    draw = random.Random(seed)
    armed: list[bool] = []
    enough = threading.Event()

    def handler(number: int, frame: Any) -> None:
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def send() -> None:
        while not enough.is_set():
            time.sleep(draw.random() * 0.002)
            interrupt()

    before = signal.signal(signal.SIGINT, handler)
    thread = threading.Thread(target=send)
    thread.start()
    done = interrupted = 0
    while done < wanted or interrupted < wanted:
        try:
            # Now and then none is let through, or slow work would never come to its end.
            if done >= wanted or draw.random() < 0.7:
                armed.append(True)
            work()
            armed.clear()
            done += 1
        except KeyboardInterrupt:
            interrupted += 1
    enough.set()
    thread.join()
    assert signal.signal(signal.SIGINT, before) is handler


@pytest.mark.parametrize("kind", ["host", "staged"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_cache_items": 3},
        {"max_cache_items": 3, "asynchronous": False},
        {"max_cache_items": 100},
        {"max_cache_items": 2, "policy": "w-tinylfu"},
        {"max_cache_items": 2, "host_cache_bytes": 500, "asynchronous": False},
        {"max_cache_items": 2, "host_cache_bytes": 500, "policy": "lru"},
        {"max_cache_items": 2, "disk_cache_key": "a", "asynchronous": False},
    ],
    ids=str,
)
def test_nothing_is_lost_or_left(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "disk_cache_key" in options:
        options = {**options, "disk_cache": tmp_path, "disk_cache_check": "never"}
    # Python swallows an interrupt that comes in a finalizer, and would say so.
    monkeypatch.setattr("sys.unraisablehook", lambda *_: None)
    features = {f"/{number}": sample(number) for number in range(12)}
    paths = list(features)
    store = GPUFeatureStore(device_for(kind), load_fn=features.__getitem__, **options)
    draw = random.Random(0)

    def use() -> None:
        some = draw.choices(paths, k=draw.randint(1, 6))
        batch = store.get_batch(some)
        assert [int(f["label"]) for f in batch] == [int(path[1:]) for path in some]
        if draw.random() < 0.1:
            store.release(some)
        if draw.random() < 0.05:
            store.clear()
        node = GPUPrefetcher([some, paths[:3]], store, depth=2)
        next(node)
        next(node)
        node.shutdown()

    with store:
        under_interrupts(1, 30, use)
        wait_for_readers(store)
        gc.collect()
        store.check()
        assert [int(f["label"]) for f in store.get_batch(paths)] == list(range(12))
        store.clear()
        assert store.stats().pending_batches == 0
        assert store.stats().reserved_bytes == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_lock_keeps_an_interrupt_until_it_is_released() -> None:
    lock = StoreLock()
    steps: list[Any] = []

    def inside() -> None:
        with lock:
            interrupt()
            steps.extend(["inside", lock.locked()])
        steps.append("behind")

    def waiting() -> None:
        with lock:
            threading.Timer(0.05, interrupt).start()
            while True:
                lock.wait()

    with pytest.raises(KeyboardInterrupt):
        inside()
    assert steps == ["inside", True] and not lock.locked()
    with lock:
        pass
    # Not while waiting: that may take long.
    with pytest.raises(KeyboardInterrupt):
        waiting()
    assert not lock.locked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_lock_without_a_handler_or_outside_the_main_thread() -> None:
    lock = StoreLock()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with lock:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def elsewhere() -> None:
        with lock:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
