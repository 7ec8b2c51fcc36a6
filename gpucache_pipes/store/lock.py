"""The lock of a store, which defers signals and can be met again by the thread that holds it.

A signal handler runs in the main thread, between any two bytecode instructions; a finalizer runs in
any thread, whenever the garbage collector starts. Both may call the store, and their own thread may
hold the store's lock at that moment. What does not work:

- A plain lock. It deadlocks: the handler waits for the frame that it has interrupted.
- A reentrant lock. It lets the handler in while pages move from one entry to another. A Condition
  over a reentrant lock is worse: waiting gives up all levels, which lets other threads in as well.
- A handler that gives up the lock and waits for another thread, while its own thread issues a
  gather: that thread may need the lock of the backend, which the interrupted frame holds.
- A lock in finalizers, with or without a timeout: whatever the finalizer waits for may be held by
  the frame below it.
- Catching an exception that a handler raised inside: there is no way to know what was done.

So, while a thread holds the lock:

- signals are deferred in the main thread: see signals.py;
- what other handlers and finalizers ask for is postponed (`postpone`) until their thread has left
  the lock and whatever it was doing with device memory (`uses`), or deferred (`defer`) until any
  thread holds the lock next. A call that can be neither gets an error (`__enter__`). Nothing waits.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from threading import get_ident

from gpucache_pipes.store.signals import deferral

_log = logging.getLogger("gpucache_pipes")

_PATIENCE = 0.1
"""Seconds within which a wait of the main thread notices a signal."""

_NEXT_LOOK = 0.02
"""Seconds until a wait for `uses` looks again: a use may end without a notification."""


class StoreLock:
    """A lock for `with`; see the module. Not reentrant: it raises instead of deadlocking.

    Attributes:
        changed: the condition on it.
        uses: what threads do, without the lock, with memory that closing would free: for each a
            token, with the identifier of the thread. Added with the lock held; removed in one step,
            `uses.pop(token, None)`, also without the lock.

    What is done without the lock is one operation of a set, dict or deque, which is atomic with and
    without the global interpreter lock. Iteration is over a copy (`list(...)`), made in one step.
    """

    def __init__(self) -> None:
        self.uses: dict[object, int] = {}
        # Calls to make once this thread is outside, and calls to make under the lock.
        self._postponed: deque[Callable[[], object]] = deque()
        self._deferred: deque[Callable[[], object]] = deque()
        self.reset()

    def reset(self) -> None:
        """In a forked child: a thread that does not exist there may hold the lock."""
        self._lock = threading.Lock()
        self.changed = threading.Condition(self._lock)
        # Threads that hold the lock or are about to take it: from before they take it until after
        # they have released it, since a handler may run between any two steps.
        self._inside: set[int] = set()
        self.uses.clear()

    def __enter__(self) -> None:
        me = get_ident()
        if me in self._inside:
            raise RuntimeError(
                "a store was called from within itself, by a signal handler, a finalizer or a "
                "policy; there only close(), release(), clear(), stats() and state_dict() can be "
                "called"
            )
        if me == deferral.thread:
            deferral.begin()
        try:
            self._inside.add(me)
            self._lock.acquire()
        except BaseException:  # of a handler that is not deferred
            self._inside.discard(me)
            if me == deferral.thread:
                deferral.end()
            raise

    def __exit__(self, *_: object) -> None:
        me = get_ident()
        try:
            self._lock.release()
        finally:
            self._inside.discard(me)
            try:
                if me == deferral.thread:
                    deferral.end()
            finally:
                if self._postponed:
                    self.run_postponed()

    def locked(self) -> bool:
        """Whether any thread holds the lock."""
        return self._lock.locked()

    # Waiting, with the lock held

    def wait_for(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until `condition()`, at most this long; returns whether it came true.

        Raises what it raises, and what signal handlers raise, which run while this waits.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while not condition():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self.wait(left)
        return True

    def wait(self, seconds: float | None = None) -> None:
        """Wait for `changed`, at most this long. May return early.

        Signals are handled within a tenth of a second. What their handlers raise is raised with
        the lock held.
        """
        me = get_ident()
        is_main = me == deferral.thread
        if is_main or self._postponed:
            seconds = _PATIENCE if seconds is None else min(seconds, _PATIENCE)
        self.changed.wait(seconds)
        if self._postponed or (is_main and deferral.noted):
            # All is consistent here: other threads may come in, and so may handlers. Signals stay
            # deferred, since nothing may be raised before the lock is held again.
            self._lock.release()
            self._inside.discard(me)
            try:
                if is_main:
                    deferral.handle()
                self.run_postponed()
            finally:
                self._inside.add(me)
                self._lock.acquire()

    def await_uses(self, seconds: float) -> None:
        """Wait until there are no `uses`, at most this long."""
        deadline = time.monotonic() + seconds
        while self.uses and (left := deadline - time.monotonic()) > 0:
            # A use that the exception of a handler has broken off ends without a notification.
            self.changed.wait(min(left, _NEXT_LOOK))

    # Calls from inside

    def is_entered(self) -> bool:
        """Whether the calling thread is inside, or uses memory, so that it must not wait."""
        me = get_ident()
        return me in self._inside or me in list(self.uses.values())

    def postpone(self, call: Callable[[], object]) -> None:
        """Make `call` when this thread, which is inside, no longer is. Takes no lock."""
        self._postponed.append(call)

    def run_postponed(self) -> None:
        """Make the postponed calls, if this thread is not inside. Logs what they raise."""
        for _ in range(len(self._postponed)):  # a call that postpones itself waits for next time
            if self.is_entered():
                return
            try:
                call = self._postponed.popleft()
            except IndexError:  # another thread has made it
                return
            try:
                call()
            except Exception:
                _log.exception("a call that a signal handler or a finalizer made has failed")

    def defer(self, call: Callable[[], object]) -> None:
        """Make `call` with the lock held, at the next `run_deferred`. Takes no lock."""
        self._deferred.append(call)

    def run_deferred(self) -> None:
        """Make the deferred calls. With the lock held.

        What one of them raises, as a policy may, is logged: it does not concern the caller.
        """
        while self._deferred:
            try:
                self._deferred.popleft()()
            except Exception as error:
                log = partial(_log.error, "what a finalizer has asked for failed", exc_info=error)
                self.postpone(log)
