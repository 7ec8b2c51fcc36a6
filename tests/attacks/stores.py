"""One store under several threads, small budgets, faults and readers that hang."""

import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attacks.common import device_of, feature_of, require_right, store_options
from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

FILES, THREADS, OPERATIONS = 40, 4, 60

FAULTS: list[Callable[[], BaseException]] = [
    lambda: OSError(errno.EIO, "injected"),
    lambda: FileNotFoundError(errno.ENOENT, "injected"),
    lambda: MemoryError("injected"),
    lambda: ValueError("injected"),
    lambda: SystemExit("injected"),
]


class Files:
    """A load_fn that fails at times, or takes longer than `read_timeout`."""

    def __init__(self, seed: int, threads: bool) -> None:
        self.draw, self.lock = random.Random(seed), threading.Lock()
        self.hangs = threads
        self.over = threading.Event()
        self.counts: Counter[str] = Counter()

    def __call__(self, path: str) -> Any:
        with self.lock:
            drawn = self.draw.random()
            fault = self.draw.choice(FAULTS if self.hangs else FAULTS[:-1])
        if drawn < 0.02:
            self.counts["faults"] += 1
            raise fault()
        if self.hangs and drawn > 0.998:
            self.counts["readers that hang"] += 1
            self.over.wait(5)
        return feature_of(int(path[-4:]))


def stores(seed: int, directory: Path) -> Counter[str]:
    """Operations of four threads against what they must give; then nothing may be left."""
    draw = random.Random(seed)
    options = store_options(draw, FILES)
    files = Files(seed, options["asynchronous"])
    if options["asynchronous"]:
        options["read_timeout"] = 0.2
    counts: Counter[str] = files.counts
    wrong: list[BaseException] = []
    paths = [f"/files/{number:04d}" for number in range(FILES)]
    store = GPUFeatureStore(device_of(draw), load_fn=files, **options)
    closes = draw.random() < 0.3

    def work(who: int) -> None:
        mine = random.Random(seed * THREADS + who)
        try:
            for turn in range(OPERATIONS):
                if closes and who == 0 and turn == OPERATIONS // 2:
                    store.close()
                try:
                    OPERATION[mine.choices(range(len(OPERATION)), WEIGHTS)[0]](store, paths, mine)
                    counts["operations"] += 1
                except Exception as error:
                    _require_expected(error, closes)
                    counts["errors"] += 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread stands still"
    files.over.set()
    if wrong:
        raise wrong[0]
    if not closes:
        store.check()
        for at in range(0, FILES, 5):
            while True:
                try:
                    batch = store.get_batch(paths[at : at + 5])
                except Exception as error:
                    _require_expected(error, closes)
                    if "max_cache_bytes" in str(error):
                        break
                    continue
                for feature, number in zip(batch, range(at, at + 5), strict=True):
                    require_right(feature, number)
                break
        store.check()
    store.close()
    stats = store.stats()
    assert stats.reserved_bytes == 0 or not options["asynchronous"], stats
    return counts


def _require_expected(error: Exception, closes: bool) -> None:
    text = f"{error} {error.__cause__!r}"
    expected = ("injected", "max_cache_bytes", "TimeoutError")
    if not any(word in text for word in expected) and not (closes and "closed" in text):
        raise error


def _batch(store: GPUFeatureStore, paths: list[str], draw: random.Random) -> None:
    some = draw.choices(paths, k=draw.randint(1, 12))
    for feature, path in zip(store.get_batch(some), some, strict=True):
        require_right(feature, int(path[-4:]))
        feature["x"].zero_()  # results are the consumer's own


def _pipeline(store: GPUFeatureStore, paths: list[str], draw: random.Random) -> None:
    some = draw.sample(paths, draw.randint(1, 20))
    lister = PathLister(some, batch_size=draw.randint(1, 6), shuffle=True, seed=draw.randint(0, 9))
    node = GPUPrefetcher(lister, store, depth=draw.randint(1, 4), on_error=draw.choice(ON_ERROR))
    for _ in range(draw.choice([1, 2, 100])):
        try:
            batch = next(node)
        except StopIteration:
            break
        for feature, path in zip(batch, batch.paths, strict=True):
            require_right(feature, int(path[-4:]))
    if draw.random() < 0.5:
        node.shutdown()


def _ragged(store: GPUFeatureStore, paths: list[str], draw: random.Random) -> None:
    some = draw.sample(paths, draw.randint(1, 8))
    [batch] = GPUCollator(GPUPrefetcher([some], store), ragged={"x": "pad"})
    for at, path in enumerate(some):
        expected = feature_of(int(path[-4:]))["x"]
        assert torch.equal(batch["x"].values[at, : len(expected)], expected), path


def _tickets(store: GPUFeatureStore, paths: list[str], draw: random.Random) -> None:
    tickets = [store.request(draw.sample(paths, 3), owner=draw.choice([1, "a"])) for _ in range(3)]
    tickets[0].cancel()
    cycle: list[Any] = [tickets[1]]
    cycle.append(cycle)
    for feature in tickets[2].result():
        require_right(feature, int(feature["label"]))


ON_ERROR: list[Any] = ["raise", "skip", lambda path, error: feature_of(int(path[-4:]))]
OPERATION: list[Callable[[GPUFeatureStore, list[str], random.Random], Any]] = [
    _batch,
    _pipeline,
    _ragged,
    _tickets,
    lambda store, paths, draw: store.prefetch(draw.sample(paths, 10)),
    lambda store, paths, draw: store.release(draw.sample(paths, 10)),
    lambda store, paths, draw: store.clear(),
    lambda store, paths, draw: store.check(),
    lambda store, paths, draw: store.warm(draw.sample(paths, 10), progress=False),
    lambda store, paths, draw: store.announce(draw.choice([1, "a"]), draw.sample(paths, 10)),
    lambda store, paths, draw: store.retract(draw.choice([1, "a"])),
    lambda store, paths, draw: store.begin_epoch(draw.choice([1, "a", None])),
    lambda store, paths, draw: os.fspath(paths[0]) in store,
]
WEIGHTS = [40, 15, 8, 8, 5, 5, 2, 5, 3, 3, 2, 2, 2]
