"""Signals of every kind, at random moments of the thread that trains."""

import gc
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.common import device_of, feature_of, require_right, store_options
from gpucache_pipes import GPUFeatureStore, GPUPrefetcher, PathLister

FILES, SIGNALS = 20, 60


class GivenUpError(Exception):
    """What a handler raises, as those of time limits do."""


class Rig:
    """A store, a pipeline over it, and handlers that call them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.options = store_options(self.draw, FILES)
        self.options["max_cache_bytes"] = self.draw.choice([None, 20_000])
        self.device = device_of(self.draw)
        self.paths = [f"/files/{number:04d}" for number in range(FILES)]
        self.counts: Counter[str] = Counter()
        self.calls = random.Random(seed + 1)
        # Set while an exception may come: one at a time.
        self.armed = False
        self.store = self.open()
        self.node: Any = None

    def open(self) -> GPUFeatureStore:
        # A backend of ours is used up with its store.
        device = self.device if self.device == "cpu" else type(self.device)(self.device._runtime)
        return GPUFeatureStore(
            device, load_fn=lambda path: feature_of(int(path[-4:])), **self.options
        )

    def raising(self, error: type[BaseException]) -> Callable[[int, Any], None]:
        def handler(number: int, frame: Any) -> None:
            if self.armed:
                self.armed = False
                self.counts[error.__name__] += 1
                raise error

        return handler

    def calling(self, number: int, frame: Any) -> None:
        try:
            self.call()
        except RuntimeError as error:
            if "closed" not in str(error):
                raise

    def call(self) -> None:
        some = self.calls.sample(self.paths, 5)
        name = self.calls.choice(["stats", "release", "clear", "state_dict", "close"])
        if name == "state_dict":
            if self.node is not None:
                self.node.state_dict()
        elif name == "release":
            self.store.release(some)
        elif name == "close":
            if self.calls.random() < 0.2:
                self.store.close()
        else:
            getattr(self.store, name)()
        self.counts[f"{name} by a handler"] += 1

    def work(self) -> None:
        draw = self.draw
        some = draw.choices(self.paths, k=draw.randint(1, 8))
        for feature, path in zip(self.store.get_batch(some), some, strict=True):
            require_right(feature, int(path[-4:]))
        lister = PathLister(self.paths, batch_size=draw.randint(1, 7), shuffle=True)
        self.node = GPUPrefetcher(lister, self.store, depth=draw.randint(1, 3))
        for _ in range(2):
            batch = next(self.node)
            for feature, path in zip(batch, batch.paths, strict=True):
                require_right(feature, int(path[-4:]))
        self.node.shutdown()

    def once(self) -> None:
        try:
            self.armed = True
            self.work()
            self.armed = False
            self.counts["rounds"] += 1
        except (KeyboardInterrupt, GivenUpError):
            pass
        except RuntimeError as error:
            self.armed = False
            if isinstance(error.__cause__, GivenUpError):
                return  # in the middle of reading: taken for an error of the file
            if "closed" not in str(error):
                raise
            self.node = None
            self.store.close()
            self.store = self.open()
            self.counts["closed and opened again"] += 1
        self.armed = False


def signals(seed: int, directory: Path) -> Counter[str]:
    """The main thread makes batches under a rain of signals; nothing is lost, and nothing hangs."""
    # Python swallows an exception that comes in a finalizer, and would say so.
    sys.unraisablehook = lambda *_: None
    rig = Rig(seed)
    handlers: dict[int, Any] = {
        signal.SIGINT: rig.raising(KeyboardInterrupt),
        signal.SIGALRM: rig.raising(GivenUpError),
        signal.SIGTERM: rig.calling,
        signal.SIGUSR1: rig.calling,
        signal.SIGUSR2: rig.calling,
        signal.SIGVTALRM: rig.calling,  # which is not deferred
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    main = threading.main_thread().ident
    assert main is not None
    rain = random.Random(seed + 2)

    def send() -> None:
        for _ in range(SIGNALS):
            time.sleep(rain.random() * 0.003)
            signal.pthread_kill(main, rain.choice(list(handlers)))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        while sender.is_alive():
            rig.once()
        time.sleep(0.01)  # the last one may still be on its way
    finally:
        sender.join()
        for number, handler in before.items():
            assert signal.signal(number, handler) == handlers[number], "a handler was not put back"
    rig.node = None
    gc.collect()
    try:
        rig.store.check()
        for feature, number in zip(rig.store.get_batch(rig.paths), range(FILES), strict=True):
            require_right(feature, number)
        rig.store.clear()
        # Readers may still be at what an interrupted request has asked for.
        patience = time.monotonic() + 10
        while rig.store.stats().reserved_bytes and time.monotonic() < patience:
            time.sleep(0.01)
        assert rig.store.stats().reserved_bytes == 0, "something is still held"
    except RuntimeError as error:
        if "closed" not in str(error):
            raise
    rig.store.close()
    return rig.counts
