"""A lock under which Ctrl-C waits: bookkeeping is done as a whole or not at all."""

import os
import threading
from signal import SIGINT
from threading import get_ident
from types import FrameType
from typing import Any

try:
    # What the functions of `signal` call: those look for enums first, for several microseconds.
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

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
        if get_ident() == _mask.thread:
            _mask.begin()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        if get_ident() == _mask.thread:
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
        self.thread = threading.main_thread().ident
        self.depth = 0
        self._noted = False
        self._handler: Any = None

    @property
    def on(self) -> bool:
        """Whether this is the main thread, and its interrupts are noted only."""
        return self.depth > 0 and get_ident() == self.thread

    def begin(self) -> None:
        """From now on interrupts are noted. In the main thread, as all that follows."""
        if not self.depth:
            handler = getsignal(SIGINT)
            if not callable(handler):
                return  # nobody's, or the system's own: nothing is raised
            self._handler = handler
            try:
                # From the end of this call on, which is one instruction.
                set_handler(SIGINT, self._note)
            except ValueError:
                return  # not the main interpreter
        self.depth += 1

    def end(self) -> None:
        """What was noted is raised, once there is nobody inside any more."""
        if self.depth:
            self.depth -= 1
            if not self.depth:
                set_handler(SIGINT, self._handler)
                if self._noted:
                    self.raise_noted()

    def raise_noted(self) -> None:
        """Call the handler for an interrupt that was noted, if there was one."""
        if self._noted:
            self._noted = False
            self._handler(int(SIGINT), None)

    def forget(self) -> None:
        """In a forked child: the thread that was inside is not there."""
        self.thread = threading.main_thread().ident
        if self.depth:
            self.depth = 0
            set_handler(SIGINT, self._handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True


_mask = _Mask()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mask.forget)
