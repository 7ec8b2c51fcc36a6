"""What happens to stores when the process forks or ends."""

import atexit
import os
import weakref
from typing import Protocol

EXIT_SECONDS = 5.0
"""How long the end of the interpreter waits, at most, for readers in the middle of a file.

A thread that runs on while the interpreter is taken down can abort the process.
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


@atexit.register
def _at_exit() -> None:
    for mortal in list(_living):
        mortal.shut(EXIT_SECONDS)


def _in_child() -> None:
    for mortal in list(_living):
        mortal.refuse_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
