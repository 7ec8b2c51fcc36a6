"""Random pipelines over ranks that share their caches, and what the other scenarios need."""

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpucache_pipes import (
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    NodeLoader,
    PathLister,
)
from gpucache_pipes.files import LocalFiles
from gpucache_pipes.testing import assert_same


class CountingFiles(LocalFiles):
    """Local files that are opened one by one, and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: Counter[str] = Counter()

    def open_many(self, keys: Any, paths: Any, progress: Any = None) -> Any:
        return []

    def open(self, key: Any, path: str) -> Any:
        self.opened[path] += 1
        return super().open(key, path)


def make_files(directory: str, seed: int, count: int, kind: str) -> list[str]:
    """Files of one of several kinds; written by rank 0."""
    folder = Path(directory)
    paths = [str(folder / f"{n:03}.pt") for n in range(count)]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        random_ = random.Random(seed)
        for n, path in enumerate(paths):
            torch.save(feature_of(kind, n, random_), path)
            os.utime(path, (n, n))  # long ago, so that a disk cache takes it
    dist.barrier()
    return paths


def feature_of(kind: str, n: int, random_: random.Random) -> Any:
    number = float(n)
    if kind == "alike":
        return {"feature": torch.full((11,), number), "label": torch.tensor(n)}
    if kind == "values":
        return {"feature": torch.full((5,), number), "label": n, "name": f"file {n}"}
    if kind == "ragged":
        return {"feature": torch.full((random_.randint(0, 9), 3), number), "label": n}
    if kind == "unlike":
        return random_.choice([
            torch.full((3,), number), [torch.full((2,), n), "text"], {"a": torch.ones(0)}, n,
            {"a": torch.full((40, 9), number, dtype=torch.bfloat16)},
        ])  # fmt: skip
    return {"feature": torch.full((300,), number), "mask": torch.tensor([n % 2 == 0])}


def equal_to_the_plain_one(
    rank: int, directory: str, seeds: list[int], device: str = "cpu"
) -> dict[str, int]:
    """Random pipelines, each with the caches shared and not: batches are the same."""
    seen: Counter[str] = Counter()
    if device != "cpu":
        torch.accelerator.set_device_index(rank)
    for seed in seeds:
        compare(rank, f"{directory}/{seed}", random.Random(seed), seen, device)
    return dict(seen)


class Epochs:
    """Resets a node for each iteration, and reads no batch before it is asked for one."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.state: Any = None

    def __iter__(self) -> Any:
        state, self.state = self.state, None
        self.node.reset(state)
        return self.node

    def state_dict(self) -> Any:
        return self.node.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def compare(
    rank: int, directory: str, choose: random.Random, seen: "Counter[str]", device: str
) -> None:
    world = dist.get_world_size()
    kind = choose.choice(["alike", "values", "ragged", "unlike", "two sizes"])
    count = choose.randint(world, 40)
    paths = make_files(directory, choose.randint(0, 999), count, kind)
    parts = choose.random() < 0.2 and count >= 2 * world
    source: Any = paths
    if parts:
        half = count // 2
        source = {"left": paths[:half], "right": paths[half : 2 * half]}
    samples = count // 2 if parts else count
    size = choose.randint(1, 6)
    options: dict[str, Any] = {
        "batch_size": size, "shuffle": choose.random() < 0.9, "seed": choose.randint(0, 9),
        "drop_last": samples // world >= size and choose.random() < 0.3,
        "shard": choose.choice(["epoch", "epoch", "epoch", "static"]),
    }  # fmt: skip
    if choose.random() < 0.2:
        options["bucket_by"] = lambda path: hash_of(path)
    on_error = choose.choice(["raise", "raise", "skip", "replace"])
    bad = set()
    if choose.random() < 0.3:
        bad = set(choose.sample(paths, choose.randint(1, 3)))
        if rank == 0:
            for path in bad:
                Path(path).write_bytes(b"not a feature")
        dist.barrier()
    depth = choose.choice([None, 1, 2, 5])
    page_bytes = choose.choice([None, 16, 64])
    epochs = choose.randint(2, 4)
    budget = choose.choice([None, 1, 3, count // world, count])
    breaks = choose.choice([None, None, choose.randint(0, 5)])
    ragged: Any = "pad" if kind == "ragged" else "error"
    by_loader = choose.random() < 0.3
    collated = kind not in ("unlike",)
    resumes = choose.random() < 0.5

    source_of: dict[int, CountingFiles] = {}

    def make(shared: bool) -> Any:
        files = CountingFiles()
        store = GPUFeatureStore(
            device, max_cache_items=budget, page_bytes=page_bytes, source=files,
            process_group=dist.group.WORLD if shared else None, exchange_timeout=20,
            reader_threads=1,
        )  # fmt: skip
        source_of[id(store)] = files
        return store, pipeline(store)

    def replaced(path: str, error: Exception) -> Any:
        return feature_of(kind, 77, random.Random(1))

    def pipeline(store: GPUFeatureStore) -> Any:
        lister = PathLister(source, **options)
        how = replaced if on_error == "replace" else on_error
        if by_loader and collated:
            return GPUCachedPathDataLoader(
                lister, store=store, ragged=ragged, on_error=how, prefetch_batches=depth
            )
        features = GPUPrefetcher(lister, store, depth=depth, on_error=how)
        return Epochs(GPUCollator(features, ragged=ragged) if collated else features)

    mine, plain = make(True), make(False)
    for epoch in range(epochs):
        stop = breaks if epoch == 1 else None
        batches = [list(batches_of(loader, stop, bad)) for _, loader in (mine, plain)]
        seen["epochs"] += 1
        assert_alike(*batches)
        if stop is not None and resumes:
            # A new process would begin with this state and an empty store.
            state = mine[1].state_dict()
            mine[0].check()
            mine = (mine[0], pipeline(mine[0])) if choose.random() < 0.5 else renewed(make, mine)
            mine[1].load_state_dict(state)
            other = pipeline(plain[0])
            other.load_state_dict(plain[1].state_dict())
            plain = plain[0], other
            seen["resumed"] += 1
        seen["batches"] += len(batches[0])
    mine[0].check()
    stats = mine[0].stats()
    seen["received"] += stats.files_received
    if budget in (None, count) and not bad and breaks is None and not by_loader:
        opened = merged(source_of[id(mine[0])].opened)
        assert all(times == 1 for times in opened.values()), opened
        seen["read once"] += 1
    mine[0].close()
    plain[0].close()


def renewed(make: Any, old: Any) -> Any:
    old[0].close()
    return make(True)


def merged(opened: Any) -> "Counter[str]":
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, dict(opened))
    total: Counter[str] = Counter()
    for one in every:
        total.update(one)
    return total


def hash_of(path: Any) -> float:
    text = str(path)
    return float(sum(map(ord, text)) * 7919 % 101)


def batches_of(loader: Any, stop: int | None, bad: set[str]) -> Any:
    """The batches, or the texts of errors, of an epoch or of its beginning."""
    iterator = iter(loader)
    while stop is None or stop > 0:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except Exception as error:
            text = str(error)
            yield f"{type(error).__name__}: {text}"
            if len(bad) == 0 and "collate" not in text:
                raise
        if stop is not None:
            stop -= 1


def assert_alike(shared: list[Any], plain: list[Any]) -> None:
    """Where a batch is an error of another rank, the plain one may have it."""
    assert len(shared) == len(plain), (len(shared), len(plain))
    for one, other in zip(shared, plain, strict=True):
        if isinstance(one, str) and one.startswith("RankError"):
            continue
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
            continue
        if hasattr(one, "paths"):
            assert one.paths == other.paths
            one, other = list(one), list(other)
        elif hasattr(one, "parts"):
            one, other = list(one), list(other)
        assert_same(one, other)


def loader_of(directory: str, **options: Any) -> Any:
    """A shuffled pipeline over the files there, with the caches of all ranks."""
    timeout = options.pop("exchange_timeout", 20)
    store = GPUFeatureStore(
        "cpu", process_group=dist.group.WORLD, exchange_timeout=timeout, reader_threads=1
    )
    lister = PathLister(directory, batch_size=3, shuffle=True, **options)
    return NodeLoader(GPUCollator(GPUPrefetcher(lister, store)))


def labels_of(batches: Any) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]
