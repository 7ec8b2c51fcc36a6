"""A device that runs operations late and in any order, used and freed on several streams."""

import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from attacks.common import feature_of, require_right, store_options
from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister
from gpucache_pipes.device import AcceleratorBackend
from gpucache_pipes.testing import SimulatedRuntime

FILES, CONSUMERS, ROUNDS = 24, 3, 8


def devices(seed: int, directory: Path) -> Counter[str]:
    """Consumers on streams of their own; an access that is not ordered raises when it is issued."""
    draw = random.Random(seed)
    runtime = SimulatedRuntime(seed, haste=draw.choice([0.0, 0.1, 0.3, 0.9]))
    options = store_options(draw, FILES)
    if draw.random() < 0.5:
        options["staging_bytes"] = draw.choice([4096, 20_000])
    alike = draw.random() < 0.5
    paths = [f"/files/{number:04d}" for number in range(FILES)]
    counts: Counter[str] = Counter()
    wrong: list[BaseException] = []

    def number_of(path: str) -> int:
        return int(path[-4:]) * (5 if alike else 1)

    store = GPUFeatureStore(
        AcceleratorBackend(runtime), load_fn=lambda path: feature_of(number_of(path)), **options
    )

    def consume(who: int) -> None:
        mine = random.Random(seed * CONSUMERS + who)
        streams = [runtime.new_stream() for _ in range(2)]
        kept: list[tuple[Any, str]] = []
        try:
            for _ in range(ROUNDS):
                with runtime.on(mine.choice(streams)):
                    _use(store, paths, mine, number_of, kept, counts)
                if mine.random() < 0.3:
                    kept.clear()  # freed on whatever stream is current, or on none
                if mine.random() < 0.1:
                    store.clear()
                if mine.random() < 0.2:
                    store.release(mine.sample(paths, 8))
        except BaseException as error:
            if "max_cache_bytes" not in str(error):
                wrong.append(error)

    threads = [threading.Thread(target=consume, args=(who,)) for who in range(CONSUMERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a consumer stands still"
    if wrong:
        raise wrong[0]
    store.check()
    store.close()
    counts["operations of the device"] += runtime.operations
    return counts


def _use(
    store: GPUFeatureStore,
    paths: list[str],
    draw: random.Random,
    number_of: Any,
    kept: list[tuple[Any, str]],
    counts: Counter[str],
) -> None:
    kind = draw.random()
    some = draw.sample(paths, draw.randint(1, 8))
    if kind < 0.4:
        batch = store.get_batch(some)
        for feature, path in zip(batch, some, strict=True):
            require_right(feature, number_of(path))
            kept.append((feature["x"], path))
    elif kind < 0.7:
        node = GPUPrefetcher(PathLister(some, batch_size=2), store, depth=draw.randint(1, 3))
        for batch in node:
            for feature, path in zip(batch, batch.paths, strict=True):
                require_right(feature, int(feature["label"]))
                assert int(feature["label"]) == number_of(path.replace("//", "/"))
    else:
        mode = draw.choice(["pad", "list", "jagged"])
        [batch] = GPUCollator(GPUPrefetcher([some], store), ragged={"x": mode})
        rows = batch["x"].unbind() if mode == "jagged" else batch["x"]
        if mode == "pad":
            rows = batch["x"].values
        for row, path in zip(rows, some, strict=True):
            expected = feature_of(number_of(path))["x"]
            assert row[: len(expected)].cpu().equal(expected), path
    counts["uses"] += 1
