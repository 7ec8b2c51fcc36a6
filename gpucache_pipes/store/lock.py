"""The lock of a store, which defers signals, and which a thread may meet again inside itself.

A signal handler runs in the main thread, between any two bytecodes; a finalizer runs in any thread,
wherever the garbage collector starts. Both may call the store, and both may do so while their own
thread holds the store's lock. What does not work:

- A plain lock deadlocks: the handler waits for the frame that it has interrupted.
- A reentrant lock lets the handler in, in the middle of moving pages from one entry to another.
  A Condition over it is worse: it gives up all levels at once, so that other threads get in, too.
- A handler that waits for another thread, without the lock, while its own thread issues a gather:
  that thread may need the lock of the backend that the interrupted frame holds.
- Catching an exception that a handler raises inside: there is no way to know what was done.

So, while a thread holds the lock:

- The signals that people and clusters send are noted in the main thread, and handled once the
  lock has been released. This costs less than two microseconds, there alone.
- What other handlers and finalizers ask for is postponed (`postpone`) until that thread has left
  the lock and whatever it was doing with the memory of the device (`uses`). Who cannot postpone
  gets an error (`__enter__`). Nothing waits.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from signal import SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
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

_log = logging.getLogger("gpucache_pipes")

_DEFERRED = tuple(map(int, (SIGINT, SIGTERM, SIGALRM, SIGHUP, SIGUSR1, SIGUSR2)))
"""Those that people and clusters send. Each takes 60 ns of a section, also without a handler."""

_PATIENCE = 0.1
"""Seconds within which a wait of the main thread notices a signal."""

_ANOTHER_LOOK = 0.02
"""Seconds until a wait looks again for threads that have ended without a word."""


class StoreLock:
    """A lock for `with`; see the module. Not reentrant, and says so instead of hanging.

    Attributes:
        changed: the condition on it.
        uses: what is being done, without the lock, with memory that closing would take away: a
            token for each, and the thread that does it. Added to under the lock; taken out of it in
            one step, `uses.pop(token, None)`, also without the lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.uses: dict[object, int] = {}
        # Threads that hold the lock, or are about to take it. From before they take it until
        # after they have released it: a handler may run between any two steps.
        self._inside: set[int] = set()
        self._postponed: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        me = get_ident()
        if me in self._inside:
            raise RuntimeError(
                "a store was called from within itself, by a signal handler, a finalizer or a "
                "policy; there only close(), release(), clear(), stats() and state_dict() can be "
                "called"
            )
        if me == _mask.thread:
            _mask.begin()
        try:
            self._inside.add(me)
            self.lock.acquire()
        except BaseException:  # of a handler that is not deferred
            self._inside.discard(me)
            if me == _mask.thread:
                _mask.end()
            raise

    def __exit__(self, *_: object) -> None:
        me = get_ident()
        try:
            self.lock.release()
        finally:
            self._inside.discard(me)
            try:
                if me == _mask.thread:
                    _mask.end()
            finally:
                if self._postponed:
                    self.run_postponed()

    def wait(self) -> None:
        """Wait for `changed`. With the lock held; signals are handled within a tenth of a second.

        Raises what their handlers raise, with the lock held.
        """
        me = get_ident()
        main = me == _mask.thread
        self.changed.wait(_PATIENCE if main or self._postponed else None)
        if self._postponed or (main and _mask.noted):
            # All is consistent here: others may come in, and so may handlers. Signals stay deferred
            # meanwhile, since nothing may be raised before the lock is held again.
            self.lock.release()
            self._inside.discard(me)
            try:
                if main:
                    _mask.handle()
                self.run_postponed()
            finally:
                self._inside.add(me)
                self.lock.acquire()

    def is_entered(self) -> bool:
        """Whether this thread is inside, or uses memory: it must not wait for anything here."""
        me = get_ident()
        return me in self._inside or me in list(self.uses.values())

    def postpone(self, action: Callable[[], object]) -> None:
        """Call `action` when this thread, which is inside, no longer is. Takes no lock."""
        self._postponed.append(action)

    def run_postponed(self) -> None:
        """Do what was postponed, if this thread is not inside. What it raises goes to the log."""
        for _ in range(len(self._postponed)):  # what is postponed once more waits for the next time
            if self.is_entered():
                return
            try:
                action = self._postponed.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                action()
            except Exception:
                _log.exception("a call that a signal handler or a finalizer made has failed")

    def await_uses(self, seconds: float) -> None:
        """Wait until nothing is used, at most so long. With the lock held."""
        deadline = time.monotonic() + seconds
        while self.uses and (left := deadline - time.monotonic()) > 0:
            # A use that an exception of a handler has broken off ends without a notification.
            self.changed.wait(min(left, _ANOTHER_LOOK))


class SignalDeferral:
    """Defers signals while the main thread is inside a StoreLock, of whatever store."""

    def __init__(self) -> None:
        self.thread = threading.main_thread().ident
        self.depth = 0
        self.noted: deque[int] = deque()
        # The handlers that are replaced.
        self._handlers: dict[int, Any] = {}
        # One object, which is known again; a bound method would be a new one each time.
        self._note: Callable[[int, FrameType | None], None] = self._append

    # Handlers that are not deferred may run between any two steps of what follows, and use stores:
    # so these methods are entered again in the middle of themselves.

    def begin(self) -> None:
        """From now on signals are noted. In the main thread, as all that follows."""
        self.depth += 1
        if self.depth > 1:
            return
        try:
            for number in _DEFERRED:
                handler = getsignal(number)
                # Not one that raises nothing, ignored or the system's; and not our own, where this
                # has come in the middle of `_restore`.
                if callable(handler) and handler is not self._note:
                    self._handlers[number] = handler
                    # From the end of this call on, which is one instruction.
                    set_handler(number, self._note)
        except ValueError:  # not the main interpreter
            self._handlers.clear()
        except BaseException:  # of the handler of one that was not yet replaced
            self.depth -= 1
            self._restore()
            raise

    def end(self) -> None:
        """Handle what was noted, once this thread is inside no StoreLock any more."""
        self.depth -= 1
        if not self.depth:
            if self._handlers:
                self._restore()
            if self.noted:
                self.handle()

    def _restore(self) -> None:
        """Put all handlers back, also if one of them is called meanwhile and raises."""
        try:
            for number, handler in list(self._handlers.items()):
                set_handler(number, handler)
                self._handlers.pop(number, None)
        finally:
            if self._handlers and not self.depth:
                self._restore()

    def handle(self) -> None:
        """Call the handlers of all that was noted, also if one of them raises."""
        try:
            while self.noted:
                number = self.noted.popleft()
                handler = self._handlers.get(number) or getsignal(number)
                if callable(handler) and handler is not self._note:
                    handler(number, None)
        finally:
            if self.noted:
                self.handle()

    def _append(self, number: int, frame: FrameType | None) -> None:
        self.noted.append(number)

    def forget(self) -> None:
        """In a forked child: the thread that was inside is not there."""
        self.thread = threading.main_thread().ident
        self.depth = 0
        self.noted.clear()
        self._restore()


_FRAMES = 16
"""More than the bookkeeping of a call needs, down to the policies of this package."""


def require_stack(frames: int = _FRAMES) -> None:
    """Raise RecursionError unless that many calls can be nested. Takes 35 ns for each of them.

    Called before anything is changed: near the limit of the interpreter an error could come in the
    middle of a change, and another one where the first is dealt with.
    """
    if frames:
        require_stack(frames - 1)


_mask = SignalDeferral()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mask.forget)
