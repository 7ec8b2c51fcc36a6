"""The native reader alone: microseconds a file, in one thread and in two, and a preadv in Python.

Reads 4,000 files of 6 KB in calls of 256, and compares each with its form. Page cache warm, memory
touched before. "opened" is the call with the features that are made of it in Python, and "copied"
the second call, which copies the leaves to their places.

    python benchmarks/native.py [--rounds 7] [--json FILE]
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from _common import save, temporary_directory

from gpucache_pipes.files import Progress, batch_reader, read_many
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.pt.reader import PtReader

FILES, CALL = 4000, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    with temporary_directory() as directory:
        paths = [f"{directory}/{number:06d}.pt" for number in range(FILES)]
        for number, path in enumerate(paths):
            feature = {"feature": torch.randn(1024), "label": torch.tensor([number])}
            torch.save(feature, path)
        figures = measure(paths, args.rounds)
    for name, value in figures.items():
        print(f"{name:28} {value:6.2f}")
    save(args.json, figures)


def measure(paths: list[str], rounds: int) -> dict[str, float]:
    """Medians of all rounds, in microseconds a file, and the ratio of two threads to one."""
    reader = BatchReader(PtReader())
    for _ in range(3):
        reader.open(paths[:CALL], Progress())
    halves = paths[: FILES // 2], paths[FILES // 2 :]
    target = memoryview(bytearray(CALL * 4112))
    offsets = np.arange(CALL, dtype=np.int64) * 4112
    some = [feature for feature in reader.open(paths[:CALL], Progress()) if feature is not None]

    def opened(part: list[str]) -> None:
        for at in range(0, len(part), CALL):
            reader.open(part[at : at + CALL], Progress())

    def called(part: list[str]) -> None:
        known, native = reader._known, batch_reader._native
        assert known is not None and native is not None
        scratch = np.ones(8 << 20, np.uint8)
        rows, control = np.empty((CALL, 6), np.int64), np.zeros(3, np.int64)
        for at in range(0, len(part), CALL):
            native.read(known.forms, tuple(part[at : at + CALL]), 1 << 20, scratch, rows, control)

    def in_two_threads(work: Callable[[list[str]], None]) -> None:
        threads = [threading.Thread(target=work, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def by_preadv() -> None:
        buffer = bytearray(8192)
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.preadv(fd, [buffer], 0)
            os.close(fd)

    def copied() -> None:
        for _ in range(FILES // CALL):
            assert not read_many(some, target, offsets)

    cases: dict[str, Callable[[], None]] = {
        "the call, one thread": lambda: called(paths),
        "the call, two threads": lambda: in_two_threads(called),
        "opened, one thread": lambda: opened(paths),
        "opened, two threads": lambda: in_two_threads(opened),
        "copied": copied,
        "preadv in Python": by_preadv,
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) / FILES * 1e6)
    one, two = times["the call, one thread"], times["the call, two threads"]
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    figures = {name: statistics.median(found) for name, found in times.items()}
    return {**figures, "two threads against one": statistics.median(ratios)}


if __name__ == "__main__":
    main()
