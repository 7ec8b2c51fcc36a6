"""What the ranks of the tests do. Each function runs in all of them, and returns JSON."""

import gc
import json
import os
import random
import signal
import threading
import time
import weakref
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

BROKEN: set[str] = set()
"""Scenarios after which the ranks cannot meet again."""


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


def one_is_lost(rank: int, directory: str, how: str) -> list[str]:
    """In the second epoch rank 1 dies, breaks off alone, or is late; what the others then see."""

    make_files(directory, 0, 72, "alike")
    loader = loader_of(directory, exchange_timeout=1.5)
    for _ in loader:
        pass
    told: list[str] = []
    batches = iter(loader)
    for at in range(20):
        if rank == 1 and at == 2:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "late":
                time.sleep(3.5)
                return told
            batches = iter(loader)
        started = time.monotonic()
        try:
            next(batches)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error} [{time.monotonic() - started:.0f} s]")
            if len(told) == 2:
                break
    return told


BROKEN |= {"one_is_lost"}


def labels_of(batches: Any) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


def begin_an_epoch(rank: int, directory: str, steps: int) -> dict[str, Any]:
    """The labels of some batches of the second epoch, and the state after them."""
    make_files(directory, 0, 48, "alike")
    loader = loader_of(directory)
    labels_of(loader)
    batches = iter(loader)
    labels = labels_of(next(batches) for _ in range(steps))
    return {"labels": labels, "state": loader.state_dict()}


def end_an_epoch(rank: int, directory: str, state: Any) -> dict[str, Any]:
    """The labels of the rest of that epoch, and of the next ones, with and without sharing."""
    loader = loader_of(directory)
    loader.load_state_dict(state)
    labels = labels_of(loader)
    then = [labels_of(loader) for _ in range(2)]
    plain = NodeLoader(
        GPUCollator(
            GPUPrefetcher(PathLister(directory, batch_size=3, shuffle=True), GPUFeatureStore("cpu"))
        )
    )
    plain.set_epoch(2)
    return {"labels": labels, "then": then, "alone": [labels_of(plain) for _ in range(2)]}


def one_cannot_read(rank: int, directory: str) -> list[str]:
    """Rank 0 fails to read some files each other time: batches are complete all the same."""
    paths = make_files(directory, 0, 24, "alike")

    class Unlucky(CountingFiles):
        def open(self, key: Any, path: str) -> Any:
            feature = super().open(key, path)
            if rank == 0 and path in paths[:8] and epoch > 0 and self.opened[path] % 2 == 0:
                raise OSError("this host has lost its storage")
            return feature

    store = GPUFeatureStore("cpu", process_group=dist.group.WORLD, source=Unlucky())
    lister = PathLister(directory, batch_size=3, shuffle=True)
    loader = NodeLoader(GPUCollator(GPUPrefetcher(lister, store)))
    for epoch in range(4):
        if epoch:
            store.release(paths)
        labels = labels_of(loader)
        every: list[Any] = [None, None]
        dist.all_gather_object(every, labels)
        if sorted(every[0] + every[1]) != list(range(24)):
            return [f"epoch {epoch}: {every}"]
    return ["4 epochs"]


def bad_file(rank: int, directory: str) -> list[str]:
    """What each step of three epochs gives; one file cannot be read by anyone."""
    paths = make_files(directory, 0, 24, "alike")
    if rank == 0:
        Path(paths[5]).write_bytes(b"not a feature")
    dist.barrier()
    store = GPUFeatureStore("cpu", process_group=dist.group.WORLD, reader_threads=1)
    node = GPUCollator(
        GPUPrefetcher(PathLister(directory, batch_size=3, shuffle=True, seed=1), store)
    )
    told = []
    for _ in range(3):
        node.reset()
        for _ in range(4):
            try:
                next(node)
                told.append("batch")
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


class _Batches:
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __iter__(self) -> Any:
        yield self.paths[:3]


def not_shared(rank: int, directory: str) -> dict[str, str]:
    """What is logged where each rank reads for itself."""
    import logging

    from gpucache_pipes.nodes import shared_epoch

    paths = make_files(directory, 0, 24, "alike")
    told: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logging.getLogger("gpucache_pipes").addHandler(Notes())
    store = GPUFeatureStore("cpu", process_group=dist.group.WORLD)
    sampler = torch.utils.data.DistributedSampler(range(24))
    sources = {
        "a stream": PathLister(iter(paths), batch_size=3),
        "a sampler": PathLister(paths, batch_size=3, sampler=sampler),
        "single paths": PathLister(paths),
        "a list": _Batches(paths),
        "all files": PathLister(paths, batch_size=3, num_shards=1, shard_index=0),
    }
    found = {}
    for name, source in sources.items():
        shared_epoch._warned.clear()
        told.clear()
        assert len(list(GPUPrefetcher(source, store))) > 0
        found[name] = (
            told[0]
            .split("since ")[1]
            .removesuffix(f" {rank} of 2: each rank reads its files itself")
        )
    told.clear()
    pairs = GPUPrefetcher(
        PathLister(paths, batch_size=3, shuffle=True), store, path_fn=lambda batch: batch[:2]
    )
    for _ in range(2):
        pairs.reset()
        for batch, given in pairs:
            assert batch.paths == list(given)[:2]
    found["path_fn"] = told[0].split("shared ")[1].split(":")[0]
    return found


def other_settings(rank: int, directory: str) -> dict[str, str]:
    """The errors of a group or pipelines that are wrong."""

    paths = make_files(directory, 0, 24, "alike")
    found: dict[str, str] = {}

    def noted(name: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            found[name] = str(error)

    noted("no group", lambda: GPUFeatureStore("cpu", process_group="world"))
    group = dist.group.WORLD
    noted("timeout", lambda: GPUFeatureStore("cpu", process_group=group, exchange_timeout=0))
    store = GPUFeatureStore("cpu", process_group=group)
    node = GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True), store)
    node.reset()
    thread = threading.Thread(target=noted, args=("thread", lambda: next(node)))
    thread.start()
    thread.join()
    others: dict[str, dict[str, Any]] = {
        "another seed": {"seed": rank}, "another size": {"batch_size": 3 + rank},
        "drop_last": {"drop_last": rank == 0, "batch_size": 5},
    }  # fmt: skip
    for name, given in others.items():
        lister = PathLister(paths, **{"batch_size": 3, "shuffle": True, **given})
        noted(name, lambda lister=lister: list(GPUPrefetcher(lister, store)))
    held = GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True), store)
    held.reset()
    next(held)
    held.shutdown()
    noted("shut down", lambda: next(held))
    if rank == 0:  # alone, and without a batch: this is no collective operation
        held.reset()
    held.reset()
    found["batches"] = str(len([*held]))
    return found


def train_until_killed(
    rank: int, directory: str, victim: int, delay: float, last: int, timeout: float
) -> dict[str, Any]:
    """Go on from the last state, with random settings; the victim is killed after `delay`
    seconds."""

    folder = Path(directory)
    if rank == 0 and not folder.exists():
        folder.mkdir()
        for n in range(97):
            torch.save({"feature": torch.full((11,), float(n)), "label": n}, folder / f"{n:03}.pt")
    dist.barrier()
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else None
    choose = random.Random(repr(state))
    store = GPUFeatureStore(
        "cpu", process_group=dist.group.WORLD, exchange_timeout=timeout,
        max_cache_items=choose.choice([None, 10, 40]), reader_threads=choose.choice([1, 2]),
    )  # fmt: skip

    def lister() -> PathLister:
        return PathLister(directory, batch_size=4, shuffle=True, seed=5)

    node = GPUCollator(GPUPrefetcher(lister(), store, depth=choose.choice([None, 1, 3])))
    plain = lister()
    told = {"wrong": [], "batches": 0, "error": None, "epoch": 0, "received": 0}
    dist.barrier()

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        threading.Thread(target=die, daemon=True).start()
    try:
        while told["epoch"] < last:
            node.reset(state)
            plain.reset(None if state is None else state["source"]["source"])
            state = None
            for expected in plain:
                batch = next(node)
                numbers = [int(Path(path).stem) for path in expected]
                exact = torch.tensor(numbers)[:, None].expand(-1, 11)
                if batch["label"].tolist() != numbers or not torch.equal(batch["feature"], exact):
                    told["wrong"].append([numbers, batch["label"].tolist()])
                told["batches"] += 1
                if rank == 0:
                    text = json.dumps(node.state_dict())
                    unfinished = saved.with_suffix(".unfinished")
                    unfinished.write_text(text)
                    unfinished.replace(saved)
            told["epoch"] = plain.state_dict()["epoch"] + 1
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
        told["epoch"] = plain.state_dict()["epoch"]
    told["received"] = store.stats().files_received
    return told


BROKEN |= {"train_until_killed"}


def two_groups(rank: int, directory: str) -> dict[str, Any]:
    """Four ranks, as two nodes of two: caches are shared within a node, by a device mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    paths = make_files(directory, 0, 40, "ragged")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "gpu"))
    files = CountingFiles()
    store = GPUFeatureStore("cpu", process_group=mesh["gpu"].get_group(), source=files)
    plain = GPUFeatureStore("cpu")
    loaders = [
        Epochs(
            GPUCollator(
                GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True), each), ragged="pad"
            )
        )
        for each in (store, plain)
    ]
    for _ in range(14):
        batches = [[*loader] for loader in loaders]
        assert_alike(*batches)
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, dict(files.opened))
    node = Counter(every[rank - rank % 2]) + Counter(every[rank - rank % 2 + 1])
    came = store.stats().files_received
    # Two shards, of which two ranks of model parallelism have each.
    across = mesh["node"].get_group()
    halves = {"num_shards": 2, "shard_index": dist.get_rank(across)}
    store = GPUFeatureStore("cpu", process_group=across)
    loaders = [
        Epochs(
            GPUCollator(
                GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True, **halves), each),
                ragged="pad",
            )
        )
        for each in (store, plain)
    ]
    for _ in range(3):
        assert_alike(*([*loader] for loader in loaders))
    return {
        "most": max(node.values()), "files": len(node), "came": came,
        "came for halves": store.stats().files_received,
    }  # fmt: skip


def train_and_validate(rank: int, directory: str) -> dict[str, Any]:
    """Two pipelines on one store, one within the epochs of the other; then all that is left."""
    paths = make_files(directory, 0, 60, "values")
    store = GPUFeatureStore("cpu", process_group=dist.group.WORLD, max_cache_items=25)
    plain = GPUFeatureStore("cpu", max_cache_items=25)
    pipelines = [
        [
            Epochs(GPUCollator(GPUPrefetcher(PathLister(some, batch_size=4, shuffle=mixed), each)))
            for some, mixed in ((paths[:45], True), (paths[45:], False))
        ]
        for each in (store, plain)
    ]
    for epoch in range(4):
        batches: list[list[Any]] = []
        for training, validation in pipelines:
            seen: list[Any] = []
            for at, batch in enumerate(training):
                seen.append(batch)
                if at == 2:
                    seen += validation
                if at == 3 and epoch == 2:
                    break  # all ranks do
            batches.append(seen)
        assert_alike(*batches)
    for training, validation in pipelines:
        training.node.reset()
        validation.node.reset()
    store.wait_idle()
    store.check()
    held = store.stats()
    gc.disable()  # what is dropped in the middle of an epoch is freed at once
    dropped = GPUFeatureStore("cpu", process_group=dist.group.WORLD)
    node = GPUPrefetcher(PathLister(paths, batch_size=4, shuffle=True), dropped)
    for _ in range(2):
        node.reset()
        for _ in range(3):
            next(node)
    alive = weakref.ref(dropped)
    del dropped, node
    assert alive() is None
    gc.enable()
    return {"pending": held.pending_batches, "bypassed": held.bypassed_items, "items": held.items}


def odd_uses(rank: int, directory: str) -> dict[str, int]:
    """Uses that are right, and rare: all batches are those of a store of its own."""
    paths = make_files(directory, 0, 48, "alike")
    files = CountingFiles()
    backwards = dist.new_group([1, 0])

    def load(path: str) -> Any:
        feature = torch.load(path)
        # What other processes cannot have, in two files of three.
        return {**feature, "made by": load if int(feature["label"]) % 3 else 7}

    found = {}
    options: list[dict[str, Any]] = [
        {"source": files}, {"load_fn": load}, {"process_group": backwards, "max_cache_items": 30},
        {"max_cache_items": 5, "disk_cache": f"{directory}-packed"},
    ]  # fmt: skip
    for number, given in enumerate(options):
        store = GPUFeatureStore("cpu", **{"process_group": dist.group.WORLD, **given})
        plain = GPUFeatureStore("cpu", load_fn=given.get("load_fn"))
        both = [
            Epochs(GPUPrefetcher(PathLister(paths, batch_size=3, shuffle=True), each))
            for each in (store, plain)
        ]
        for _ in range(3):
            seen: list[list[Any]] = [[], []]
            for at, batches in enumerate(zip(*both, strict=True)):
                for one, batch in zip(seen, batches, strict=True):
                    one.append(batch)
                if at == 4:
                    store.clear()
            assert_alike(*seen)
        found[f"came {number}"] = store.stats().files_received
        if number == 3:
            found["from disk"] = store.stats().disk_hits
        if number == 0:
            files.opened.clear()
            store = GPUFeatureStore("cpu", process_group=dist.group.WORLD, source=files)
            for some in (paths, paths[:20], paths[10:40]):
                lister = PathLister(some, batch_size=3, shuffle=True)
                labels_of(Epochs(GPUCollator(GPUPrefetcher(lister, store))))
            found["opened"] = sum(merged(files.opened).values())
    return found


def interrupted(rank: int, directory: str) -> dict[str, Any]:
    """Ctrl-C on rank 1 as it waits for the others; what each was given, and what its state says."""
    from gpucache_pipes.peers import agreement, group

    make_files(directory, 0, 48, "alike")
    loader = loader_of(directory)
    labels_of(loader)
    agree_at, asked = agreement.agree_at, 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        if rank == 1 and asked == 5:
            raise KeyboardInterrupt
        return agree_at(*arguments)

    group.agree_at = interrupt
    given: list[int] = []
    error = ""
    node = loader.root
    node.reset()
    try:
        while True:
            given += labels_of([next(node)])
    except (RuntimeError, KeyboardInterrupt) as raised:
        error = f"{type(raised).__name__}: {raised}"
    lister = PathLister(directory, batch_size=3, shuffle=True)
    plain = Epochs(GPUCollator(GPUPrefetcher(lister, GPUFeatureStore("cpu"))))
    plain.load_state_dict(node.state_dict())
    return {"given": given, "error": error, "rest": labels_of(plain)}


BROKEN |= {"interrupted"}
