"""Kills processes that write into a disk cache, at random moments, and looks at what is left.

Each round one or two processes read files through one disk cache, with small segments and a small
budget now and then, and are killed within milliseconds. Files change between rounds. Afterwards
every segment must be whole, what a store serves must be what the files hold, no name may be stored
twice in one version, and nothing may be left of the killed but what the next one removes.

    python tests/kills.py [--kills 1000] [--seed 0]
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.files.packed.segment import Segment

FILES = 150
LONG_AGO = 1_000_000_000


def write(path: Path, number: int, version: int) -> None:
    torch.save(torch.full((300,), number * 100_000 + version), path)
    os.utime(path, (LONG_AGO + version, LONG_AGO + version))


def work(cache: str, paths: list[str], seed: int) -> None:
    """What a process does until it is killed."""
    rng = random.Random(seed)
    budget = rng.choice([None, None, "300KB", "10MB"])
    while True:
        with GPUFeatureStore(
            "cpu", max_cache_items=5, disk_cache=cache, disk_cache_bytes=budget
        ) as store:
            for _ in range(rng.randint(1, 3)):
                store.begin_epoch()
                order = rng.sample(paths, len(paths))
                for at in range(0, len(order), 16):
                    store.get_batch(order[at : at + 16])


def kill_some(cache: str, paths: list[str], rng: random.Random, template: float) -> int:
    children = []
    for _ in range(rng.choice([1, 1, 2])):
        seed = rng.getrandbits(30)
        child = os.fork()
        if not child:
            try:
                work(cache, paths, seed)
            finally:
                os._exit(3)
        children.append(child)
    time.sleep(rng.random() * template)
    for child in children:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"a process has ended by itself: {status}"
    return len(children)


def look(cache: Path, paths: list[str], versions: list[int], read: bool) -> None:
    """Every segment is whole, and what is served is what the files hold."""
    stored: Counter[tuple[str, int]] = Counter()
    for path in (cache / "segments").glob("*"):
        segment = Segment(str(path), with_names=True)
        stored.update(zip(segment.names(), segment.versions[:, 1].tolist(), strict=True))
    assert not stored or max(stored.values()) == 1, stored.most_common(3)
    if not read:
        return
    with GPUFeatureStore("cpu", disk_cache=cache) as store:
        for n, feature in enumerate(store.get_batch(paths)):
            assert torch.equal(feature, torch.full((300,), n * 100_000 + versions[n])), paths[n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    kills = 0
    with tempfile.TemporaryDirectory() as root:
        paths = [str(Path(root, f"{n}.pt")) for n in range(FILES)]
        versions = [0] * FILES
        for n, path in enumerate(paths):
            write(Path(path), n, 0)
        cache = Path(root, "cache")
        while kills < args.kills:
            kills += kill_some(str(cache), paths, rng, 0.15)
            for n in rng.sample(range(FILES), rng.choice([0, 0, 3, 20])):
                versions[n] += 1
                write(Path(paths[n]), n, versions[n])
            read = rng.random() < 0.1
            # A store has threads, and a process with threads is not forked: so another one looks.
            child = os.fork()
            if not child:
                try:
                    if cache.exists():
                        look(cache, paths, versions, read)
                    os._exit(0)
                except BaseException as error:
                    print(f"after {kills} kills: {error!r}", file=sys.stderr)
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(f"failed after {kills} kills: --seed {args.seed}")
        left = len(list((cache / "writers").iterdir()))
    print(f"{kills} kills: every segment whole, every feature right, {left} files of the last ones")


if __name__ == "__main__":
    main()
