"""A gate that reader threads pass before each task, so that they can be held."""

import queue
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

_NEXT_LOOK = 0.1
"""Seconds after which a reader that is held looks whether the store was closed."""


class ReaderGate:
    """Holds readers between two tasks, for as long as a thread wants the device to be quiet.

    A reader inside a task is waited for, and not stopped: files are read as a whole.

    There is no lock between readers and the thread that holds them, which an interrupt could leave
    locked: a reader first says that it is inside, and then looks whether readers are held; the
    other thread does it the other way round. So one of them sees the other.

    Attributes:
        holder: the identifier of the thread that holds the readers, or None.
    """

    def __init__(self) -> None:
        self.holder: int | None = None
        # Of several threads that want to hold readers, one does.
        self._holding = threading.RLock()
        # Who is inside a task. Adding and discarding an item of a set is atomic.
        self._inside: set[Hashable] = set()
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._is_open_for_ever = False

    def enter(self, reader: Hashable) -> None:
        """A reader begins a task. Waits while another thread holds the readers."""
        self._inside.add(reader)
        while self.is_held_by_another() and not self._is_open_for_ever:
            self.leave(reader)
            self._opened.wait(_NEXT_LOOK)
            self._inside.add(reader)

    def held_by(self) -> int | None:
        """The identifier of the thread that holds the readers, or None."""
        return self.holder

    def is_held_by_another(self) -> bool:
        """Whether a thread holds the readers that is not the calling one."""
        return self.holder not in (None, threading.get_ident())

    def leave(self, reader: Hashable) -> None:
        """A reader has ended its task, or has been replaced. May be called again."""
        self._inside.discard(reader)
        if self.holder is not None:
            self._left.put(None)

    def open_for_ever(self) -> None:
        """Let held readers go on, since the store was closed. Takes no lock."""
        self._is_open_for_ever = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A context in which no reader is inside a task but the calling thread."""
        with self._holding:
            me = threading.get_ident()
            before = self.holder
            try:
                self.holder = me
                self._opened.clear()
                while self._inside - {me}:
                    self._left.get()
                yield
            finally:
                self.holder = before
                if before is None:
                    self._opened.set()
