"""Copies in host memory: by the calling thread, and large ones by a few threads that do not spin.

What does not work: torch's own threads. Those that have finished wait for the others in a loop, and
where another process has the core of one of them, all of them wait until it is scheduled again. A
gather of 1 MB takes 0.1 ms at best then, and 10 ms on average. `torch.set_num_threads` would hold
for the whole program, which is the user's. So torch gets pieces that it gives to one thread.

Starting a thread and waiting for it takes 0.1 ms, and many times that where no core is idle.
"""

import ctypes
import os
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.device.results import empty

_GRAIN = 32768
"""Elements up to which torch uses one thread (at::internal::GRAIN_SIZE)."""

_MANY = 16 << 20
"""Bytes that are worth more than one thread: more than 1 ms of copying."""

_MOST_THREADS = 4
"""Threads for one copy. As many use up most of the bandwidth of host memory."""

Numbers = npt.NDArray[np.int64]

# The functions of ctypes release the interpreter lock. To get it back can take 5 ms if a reader
# thread computes meanwhile, so where many short copies are made by one thread, these keep it.
_C = ctypes.PyDLL(None)
_C.memmove.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
_C.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_C.memmove.restype = _C.memset.restype = None


def select_rows(rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """`rows.index_select(0, at)` of a 2-D host tensor whose rows are contiguous.

    Raises IndexError for a row that `rows` does not have.
    """
    count, words = at.numel(), rows.size(1)
    most = _GRAIN // words
    if count <= most:
        return rows.index_select(0, at)
    numbers = at.numpy()
    if not 0 <= numbers.min() <= numbers.max() < len(rows):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {len(rows)}")
    out = empty((count, words), rows.dtype)
    if most:
        pieces = zip(repeat(rows), torch.split(at, most), torch.split(out, most))
        spread(_select_into, list(pieces), out.nbytes)
    else:
        size = words * rows.itemsize
        targets = out.data_ptr() + size * np.arange(count)
        sources = rows.data_ptr() + rows.stride(0) * rows.itemsize * numbers
        move(targets, sources, np.full(count, size))
    return out


def _select_into(rows: torch.Tensor, at: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(rows, 0, at, out=out)


def move(targets: Numbers, sources: Numbers, sizes: Numbers) -> None:
    """Copy `sizes[i]` bytes from address `sources[i]` to `targets[i]`, without bounds checks."""
    nbytes = int(sizes.sum())
    pieces = list(zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True))
    spread(ctypes.memmove if nbytes >= _MANY else _C.memmove, pieces, nbytes)


def clear(targets: Numbers, sizes: Numbers) -> None:
    """Write `sizes[i]` zeros to address `targets[i]`, without bounds checks."""
    nbytes = int(sizes.sum())
    pieces = list(zip(targets.tolist(), repeat(0), sizes.tolist()))
    spread(ctypes.memset if nbytes >= _MANY else _C.memset, pieces, nbytes)


def spread(copy: Callable[..., object], pieces: list[tuple[Any, ...]], nbytes: int) -> None:
    """Call `copy(*piece)` for all pieces, `nbytes` together. Returns when all are done.

    Threads help if there are many bytes and cores without work. Each takes the next piece when it
    is done with one, so a thread that loses its core delays the others by one piece. `copy` must
    release the interpreter lock for that to be of use.
    """
    todo, errors = iter(pieces), list[BaseException]()

    def help_out(working: Lock) -> None:
        piece: tuple[Any, ...] | None = ()
        while piece is not None:
            # From before it is taken: what is taken and not done must be waited for.
            with working:
                piece = next(todo, None)
                try:
                    if piece is not None:
                        copy(*piece)
                except BaseException as error:
                    errors.append(error)

    helpers = [Lock() for _ in range(_idle_cores() if nbytes >= _MANY else 0)]
    try:
        for working in helpers:
            # Not threading.Thread: its `start` waits until the thread runs. Nobody waits for one
            # that runs when all is done.
            with suppress(RuntimeError):  # no more threads: the others do it
                start_new_thread(help_out, (working,))
        for piece in todo:
            copy(*piece)
    finally:
        deque(todo, maxlen=0)  # after an error the rest is not needed
        for working in helpers:
            with working:
                pass
    if errors:
        raise errors[0]


def _idle_cores() -> int:
    """How many cores have no work now, as far as the system says so. At most those of use."""
    most = min(_MOST_THREADS, torch.get_num_threads()) - 1
    if most < 1:
        return 0
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, IndexError, ValueError):
        return 0
    return max(0, min(most, (os.cpu_count() or 1) - running))
