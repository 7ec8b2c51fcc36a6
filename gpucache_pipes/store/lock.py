"""The lock of a store, which defers signals and can be met again by the thread that holds it.

**Signals.** Python runs a signal handler in the main thread, between any two bytecode instructions,
and the handler may raise: KeyboardInterrupt by default. In the middle of bookkeeping that leaves a
page with two owners, or an entry that is LOADING and that no thread reads. What does not work:

- `try`/`finally` around the bookkeeping. The exception may come in the `finally` block, or between
  `lock.acquire()` returning and the `try` being entered.
- Catching the exception and doing the bookkeeping again. There is no way to know how much was done.
- A flag that a handler sets, with Python's own handler left in place: that one raises.
- One handler of ours, installed for good. Users install theirs later, and so do frameworks (pytest,
  Lightning, IPython); each expects to find, or to replace, the one before.
- Blocking signals in the kernel (`pthread_sigmask`). The mask belongs to a thread; a signal to the
  process then goes to a reader thread, and Python still runs the handler in the main thread.
- Deferring SIGINT alone. Clusters end jobs by SIGTERM or SIGUSR1, whose handlers save a checkpoint
  and raise, or call `close()`.
- Deferring every signal. Each takes 60 ns of every section, with or without a handler.

So while the main thread holds the lock, the handlers of the signals that people and clusters send
are replaced by one that notes the number. After the section the original handlers are put back and
called for what was noted. This takes less than two microseconds for a section, in the main thread
alone: other threads never run handlers.

**Calls from inside.** A handler of another signal runs at once, and a finalizer runs in any thread
whenever the garbage collector starts. Both may call the store, and their own thread may hold the
lock at that moment. What does not work:

- A plain lock. It deadlocks: the handler waits for the frame that it has interrupted.
- A reentrant lock. It lets the handler in while pages move from one entry to another. A Condition
  over a reentrant lock is worse: waiting gives up all levels, which lets other threads in as well.
- A handler that waits for another thread, without the lock, while its own thread issues a gather:
  that thread may need the lock of the backend, which the interrupted frame holds.
- A lock in finalizers, with or without a timeout: whatever the finalizer waits for may be held by
  the frame below it.

So what they ask for is postponed (`postpone`) until their thread has left the lock and whatever it
was doing with device memory (`uses`), or queued (`enqueue`) until any thread holds the lock next. A
call that can be neither gets an error (`__enter__`). Nothing waits.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from signal import SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from threading import get_ident
from types import FrameType
from typing import Any

try:
    # What the functions of `signal` call. Those look up enums first, which takes microseconds.
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

_log = logging.getLogger("gpucache_pipes")

_DEFERRED = tuple(map(int, (SIGINT, SIGTERM, SIGALRM, SIGHUP, SIGUSR1, SIGUSR2)))

_PATIENCE = 0.1
"""Seconds within which a wait of the main thread notices a signal."""

_NEXT_LOOK = 0.02
"""Seconds until a wait for `uses` looks again: a use may end without a notification."""

_FRAMES = 20
"""More nested calls than the bookkeeping of a call needs, down to the policies of this package."""


class StoreLock:
    """A lock for `with`; see the module. Not reentrant: it raises instead of deadlocking.

    Attributes:
        changed: the condition on it.
        uses: what threads do, without the lock, with memory that closing would free: for each a
            token, with the identifier of the thread. Added with the lock held; removed in one step,
            `uses.pop(token, None)`, also without the lock.
        queued: calls for the next `run_queued`.

    What is done without the lock is one operation of a set, dict or deque, which is atomic with and
    without the global interpreter lock. Iteration is over a copy (`list(...)`), made in one step.
    """

    def __init__(self) -> None:
        self.uses: dict[object, int] = {}
        self.queued: deque[Callable[[], object]] = deque()
        self._postponed: deque[Callable[[], object]] = deque()
        # Threads that hold the lock or are about to take it: from before they take it until after
        # they have released it, since a handler may run between any two steps.
        self._inside: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """In a forked child: a thread that does not exist there may hold the lock.

        If the thread that forks holds it, it holds the new one as well, which it will release.
        """
        me = get_ident()
        is_held = me in self._inside
        self._lock = threading.Lock()
        self.changed = threading.Condition(self._lock)
        self._inside = {me} if is_held else set()
        if is_held:
            self._lock.acquire()
        for left_over in (self.uses, self.queued, self._postponed):
            left_over.clear()

    def __enter__(self) -> None:
        me = get_ident()
        if me in self._inside:
            raise RuntimeError(
                "a store was called from within itself, by a signal handler, a finalizer or a "
                "policy; there only close(), release(), clear(), stats() and state_dict() can be "
                "called"
            )
        if me == _deferral.thread:
            _deferral.begin()
        try:
            self._inside.add(me)
            self._lock.acquire()
        except BaseException:  # of a handler that is not deferred
            self._inside.discard(me)
            if me == _deferral.thread:
                _deferral.end()
            raise

    def __exit__(self, *_: object) -> None:
        me = get_ident()
        try:
            self._lock.release()
        finally:
            self._inside.discard(me)
            try:
                if me == _deferral.thread:
                    _deferral.end()
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
        is_main = me == _deferral.thread
        if is_main or self._postponed:
            seconds = _PATIENCE if seconds is None else min(seconds, _PATIENCE)
        self.changed.wait(seconds)
        if self._postponed or (is_main and _deferral.noted):
            # All is consistent here: other threads may come in, and so may handlers. Signals stay
            # deferred, since nothing may be raised before the lock is held again.
            self._lock.release()
            self._inside.discard(me)
            try:
                if is_main:
                    _deferral.handle()
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

    def enqueue(self, call: Callable[[], object]) -> None:
        """Make `call` with the lock held, at the next `run_queued`. Takes no lock."""
        self.queued.append(call)

    def run_queued(self) -> None:
        """Make the queued calls. With the lock held.

        What one of them raises, as a policy may, is logged: it does not concern the caller.
        """
        while self.queued:
            try:
                self.queued.popleft()()
            except Exception as error:
                log = partial(_log.error, "what a finalizer has asked for failed", exc_info=error)
                self.postpone(log)


class SignalDeferral:
    """Notes signals while the main thread is inside a section, and handles them after it.

    There is one for the process: sections of several stores nest.

    Handlers of other signals run between any two steps of its methods, and may use stores. So the
    methods may be entered again in the middle of themselves.

    Attributes:
        thread: the identifier of the main thread. All methods are called in it.
        depth: how many sections the main thread is in.
        noted: the numbers of signals that came in a section.
    """

    def __init__(self) -> None:
        self.thread = threading.main_thread().ident
        self.depth = 0
        self.noted: deque[int] = deque()
        # The handlers that are replaced, by signal.
        self._handlers: dict[int, Any] = {}
        # One object, so that `is` tells it; a bound method would be a new object each time.
        self._note: Callable[[int, FrameType | None], None] = self._append

    def begin(self) -> None:
        """Enter a section: signals are noted from now on."""
        self.depth += 1
        if self.depth > 1:
            return
        try:
            for number in _DEFERRED:
                handler = getsignal(number)
                # Not SIG_IGN or SIG_DFL, which raise nothing. Not our own, which is still there
                # where this is entered in the middle of `_restore`.
                if callable(handler) and handler is not self._note:
                    self._handlers[number] = handler
                    # Deferred from the end of this call on, which is one instruction.
                    set_handler(number, self._note)
        except ValueError:  # not the main interpreter
            self._handlers.clear()
        except BaseException:  # of a handler that was not yet replaced
            self.depth -= 1
            self._restore()
            raise

    def end(self) -> None:
        """Leave a section; after the outermost, put the handlers back and handle what was noted.

        Raises what they raise.
        """
        self.depth -= 1
        if not self.depth:
            if self._handlers:
                self._restore()
            if self.noted:
                self.handle()

    def _restore(self) -> None:
        """Put all handlers back, even if one of them runs meanwhile and raises."""
        try:
            for number, handler in list(self._handlers.items()):
                set_handler(number, handler)
                self._handlers.pop(number, None)
        finally:
            if self._handlers and not self.depth:
                self._restore()

    def handle(self) -> None:
        """Call the handlers of all noted signals, even if one of them raises."""
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

    def reset(self) -> None:
        """In a forked child: no section of another thread of the parent is open."""
        self.thread = threading.main_thread().ident
        self.depth = 0
        self.noted.clear()
        self._restore()


def require_stack(frames: int = _FRAMES) -> None:
    """Raise RecursionError unless this many calls can be nested. Takes 35 ns for each of them.

    Called before anything is changed: near the recursion limit of the interpreter an error could
    come in the middle of a change, and another one in the code that deals with the first.
    """
    if frames:
        require_stack(frames - 1)


_deferral = SignalDeferral()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_deferral.reset)
