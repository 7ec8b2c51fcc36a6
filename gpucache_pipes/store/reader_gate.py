"""A gate that reader threads pass before each task, so that they can be held."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

_NEXT_LOOK = 0.1
"""Seconds after which a thread that waits here looks again: an interrupt may have lost a mark."""


class ReaderGate:
    """Holds readers between two tasks, for as long as a thread wants the device to be quiet.

    A reader inside a task is waited for, and not stopped: files are read as a whole.

    There is no lock between readers and the thread that holds them, which an interrupt could leave
    locked: a reader first says that it is inside, and then looks whether readers are held; the
    other thread does it the other way round. So one of them sees the other.

    Attributes:
        holder: the identifier of the thread that holds the readers, or None.
        inside: for each task under way a token, with the identifier of its thread. Single
            operations on it are atomic; `inside.pop(token, None)` ends one.
    """

    def __init__(self) -> None:
        self.holder: int | None = None
        self.inside: dict[object, int] = {}
        # Of several threads that want to hold readers, one does.
        self._holding = threading.RLock()
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._is_open_for_ever = False

    def enter(self, token: object) -> None:
        """The calling thread begins a task. Waits while another thread holds the readers."""
        self.inside[token] = get_ident()
        while self.holder not in (None, get_ident()) and not self._is_open_for_ever:
            self.leave(token)
            self._opened.wait(_NEXT_LOOK)
            self.inside[token] = get_ident()

    def leave(self, token: object) -> None:
        """A task has ended, or its reader has been replaced. May be called again."""
        self.inside.pop(token, None)
        if self.holder is not None:
            self._left.put(None)

    def held_by(self) -> int | None:
        """The identifier of the thread that holds the readers, or None."""
        return self.holder

    def open_for_ever(self) -> None:
        """Let held readers go on, since the store was closed. Takes no lock."""
        self._is_open_for_ever = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no thread is inside a task but the calling one."""
        with self._holding:
            me = get_ident()
            before = self.holder
            try:
                self.holder = me
                self._opened.clear()
                while any(thread != me for thread in list(self.inside.values())):
                    self._wait_for_mark()
                yield
            finally:
                self.holder = before
                if before is None:
                    self._opened.set()

    def _wait_for_mark(self) -> None:
        try:
            self._left.get(timeout=_NEXT_LOOK)
        except queue.Empty:
            return
