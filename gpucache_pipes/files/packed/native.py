"""Reads, versions and copies of many at once: natively, or in Python where nothing was compiled."""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.batch_reader import import_native
from gpucache_pipes.files.source import Progress

_packed, _ = import_native("packed._packed")
native, _ = import_native("_native")

DESCRIPTOR, START, COUNT, PLACE, GOT, COLUMNS = range(6)
"""The columns of what `read` takes, and their number: see `_packed.c`."""


def read(records: npt.NDArray[np.int64], memory: npt.NDArray[np.uint8], progress: Progress) -> int:
    """Read byte ranges of open files to their places in memory.

    Args:
        records: int64 [n, COLUMNS]; GOT becomes how many bytes could be read.
        memory: uint8, writable.
        progress: is kept up to date.

    Returns:
        How many were read: all, unless there is a signal or `progress` says to stop.
    """
    done = 0
    if _packed is not None:
        while not done and len(records) and not progress.stopped:  # a signal ends the call early
            done = _packed.read(records, memory, progress.shared)
        return done
    begin = time.monotonic_ns()
    view = memory.data
    for descriptor, start, count, place, _ in records.tolist():
        if progress.stopped:
            break
        progress.begin(done, time.monotonic_ns() - begin)
        got = 0
        try:
            while got < count:
                more = os.preadv(descriptor, [view[place + got : place + count]], start + got)
                got += more
                if not more:
                    break
        except OSError:
            pass
        records[done, GOT] = got
        done += 1
    return done


def versions(paths: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
    """Size and modification time in nanoseconds of files, int64 [n, 2]; -1 where there is none.

    Fewer than all, if there is a signal or `progress` says to stop.
    """
    found = np.empty((len(paths), 2), np.int64)
    done = 0
    if _packed is not None:
        while not done and paths and not progress.stopped:
            done = _packed.versions(tuple(paths), found, progress.shared)
        return found[:done]
    begin = time.monotonic_ns()
    for path in paths:
        if progress.stopped:
            break
        progress.begin(done, time.monotonic_ns() - begin)
        try:
            status = os.stat(path)
            found[done] = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            found[done] = -1
        done += 1
    return found[:done]


def is_native() -> bool:
    """Whether there is native code."""
    return _packed is not None


def copy(source: Any, target: npt.NDArray[np.uint8], moves: npt.NDArray[np.int64]) -> None:
    """Copy bytes: triples of a position in `source`, one in `target`, and a count."""
    if native is not None:
        native.copy(source, target, moves)
        return
    view = memoryview(source)
    for origin, place, nbytes in moves.tolist():
        target[place : place + nbytes] = view[origin : origin + nbytes]
