"""Uses of shared caches, right and wrong ones. Functions return JSON."""

import gc
import threading
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from scenarios import CountingFiles, Epochs, assert_alike, labels_of, loader_of, make_files, merged

from gpucache_pipes import (
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    NodeLoader,
    PathLister,
)


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
