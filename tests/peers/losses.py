"""What ranks do of which one is lost, or cannot read a file. Functions return JSON."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scenarios import CountingFiles, Epochs, labels_of, loader_of, make_files

from gpucache_pipes import (
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    NodeLoader,
    PathLister,
)

BROKEN = {"interrupted", "one_is_lost", "train_until_killed"}
"""After these the ranks cannot meet again."""


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


def request_fails(rank: int, directory: str) -> list[str]:
    """What each step gives where rank 1 cannot say what it needs in one, nor serve what it owns."""
    make_files(directory, 0, 48, "alike")
    asked = 0

    def path_fn(batch: Any) -> Any:
        nonlocal asked
        asked += 1
        if rank == 1 and asked == 12:  # the fourth batch of the second epoch
            raise OSError("no such table")
        return batch

    store = GPUFeatureStore("cpu", process_group=dist.group.WORLD, reader_threads=1)
    lister = PathLister(directory, batch_size=3, shuffle=True)
    node = GPUPrefetcher(lister, store, path_fn=path_fn)
    told = []
    for _ in range(3):
        node.reset()
        for _ in range(8):
            try:
                batch, paths = next(node)
                numbers = [int(feature["label"]) for feature in batch]
                told.append("batch" if numbers == [int(Path(p).stem) for p in paths] else "wrong")
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
    store.check()
    return told
