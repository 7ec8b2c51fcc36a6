"""A lock under which Ctrl-C waits: bookkeeping is done as a whole or not at all."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_PATIENCE = 0.1
"""Seconds within which a wait notices that there was an interrupt."""


class Guard:
    """A lock for `with`, which keeps the main thread's KeyboardInterrupt until it is released.

    An interrupt may come between any two instructions of the main thread, and in the middle of
    moving pages from one entry to another there is no way to do right by it. So while the lock is
    held, SIGINT is only noted; its handler is called when the lock has been released. Costs about
    a microsecond, in the main thread alone. Not reentrant. Other signals whose handlers raise are
    their owner's risk.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)

    def __enter__(self) -> None:
        _mask.begin()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        _mask.end()

    def wait(self) -> None:
        """Wait for `changed`. With the lock held; Ctrl-C is raised within a tenth of a second."""
        if not _mask.on:
            self.changed.wait()
            return
        self.changed.wait(_PATIENCE)
        _mask.raise_noted()


class _Mask:
    """Whether the main thread is inside a Guard, and what it is to hear of afterwards."""

    def __init__(self) -> None:
        self.depth = 0
        self._noted = False
        self._handler: Callable[[int, FrameType | None], Any] | None = None

    @property
    def on(self) -> bool:
        """Whether this is the main thread, and its interrupts are noted only."""
        return self.depth > 0 and threading.current_thread() is threading.main_thread()

    def begin(self) -> None:
        """From now on interrupts are noted, if this is the main thread."""
        if threading.get_ident() != threading.main_thread().ident:
            return
        if self.depth:
            self.depth += 1
            return
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            return  # nobody's, or the system's own: nothing is raised
        self._handler = handler
        try:
            # From the end of this call on, which is one instruction.
            signal.signal(signal.SIGINT, self._note)
        except ValueError:
            return  # not the main interpreter
        self.depth = 1

    def end(self) -> None:
        """What was noted is raised, once there is nobody inside any more."""
        if not self.depth or threading.get_ident() != threading.main_thread().ident:
            return
        self.depth -= 1
        if not self.depth:
            signal.signal(signal.SIGINT, self._handler)
            self.raise_noted()

    def raise_noted(self) -> None:
        """Call the handler for an interrupt that was noted, if there was one."""
        if self._noted:
            self._noted = False
            assert self._handler is not None
            self._handler(signal.SIGINT, None)

    def forget(self) -> None:
        """In a forked child: the thread that was inside is not there."""
        if self.depth:
            self.depth = 0
            signal.signal(signal.SIGINT, self._handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True


_mask = _Mask()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mask.forget)
