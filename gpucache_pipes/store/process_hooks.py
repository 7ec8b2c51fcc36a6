"""What happens to stores when the process forks or exits."""

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

EXIT_SECONDS = 0.8
"""How long the exit of the interpreter waits, at most, for readers in the middle of a file.

A thread that is inside the C++ code of torch while the interpreter is torn down can abort the
process; a thread that reads or waits ends silently.
"""


class Closable(Protocol):
    """A store, as the hooks see it."""

    def close(self, timeout: float = ...) -> None:
        """Close, waiting for reader threads at most this long."""

    def refuse_after_fork(self) -> None:
        """In a forked child: refuse all further calls. Must not take a lock of the parent."""


_open: "weakref.WeakSet[Closable]" = weakref.WeakSet()
_readers: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def register(store: Closable) -> None:
    """Tell `store`, for as long as it lives, about forks and the exit of the process."""
    _open.add(store)


def registered() -> list[Closable]:
    """All stores that are registered and alive."""
    return list(_open)


def join_at_exit(thread: threading.Thread) -> None:
    """Wait for a reader thread when the process exits, also if its store is gone by then.

    It may be freeing the memory of a store that was dropped. A thread that comes back to Python
    when the interpreter is being finalised is ended in the midst of what it does, and one that is
    in C++ code then takes the process with it.
    """
    _readers.add(thread)


def _all_readers() -> list[threading.Thread]:
    while True:
        try:
            return list(_readers)
        except RuntimeError:  # another thread has started one meanwhile
            continue


@atexit.register
def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for store in registered():
        store.close(max(0.0, deadline - time.monotonic()))
    for thread in _all_readers():
        thread.join(max(0.0, deadline - time.monotonic()))


def _in_child() -> None:
    for store in registered():
        store.refuse_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
