"""What happens to stores when the process forks or ends."""

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

EXIT_SECONDS = 0.8
"""How long the end of the interpreter waits, at most, for readers in the middle of a file.

A thread that is inside torch's C++ while the interpreter is taken down can abort the process; one
that reads or waits ends in silence.
"""


class Mortal(Protocol):
    """Something that must hear of a fork and of the end of the process."""

    def shut(self, seconds: float) -> None:
        """End threads, waiting for them at most so long."""

    def refuse_after_fork(self) -> None:
        """In a forked child: refuse to work from now on. No lock of the parent may be taken."""


_living: "weakref.WeakSet[Mortal]" = weakref.WeakSet()


def watch(mortal: Mortal) -> None:
    """Tell `mortal`, while it lives, of forks and of the end."""
    _living.add(mortal)


_left_behind: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


def await_at_exit(thread: threading.Thread) -> None:
    """Nobody waits for this thread, but the end of the process does, as for readers."""
    _left_behind.add(thread)


@atexit.register
def _at_exit() -> None:
    deadline = time.monotonic() + EXIT_SECONDS
    for mortal in list(_living):
        mortal.shut(max(0.0, deadline - time.monotonic()))
    for thread in list(_left_behind):
        thread.join(max(0.0, deadline - time.monotonic()))


def _in_child() -> None:
    for mortal in list(_living):
        mortal.refuse_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
