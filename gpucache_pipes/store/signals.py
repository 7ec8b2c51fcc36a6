"""Deferring signals while the main thread changes something.

Python runs a signal handler in the main thread, between any two bytecode instructions, and the
handler may raise: KeyboardInterrupt by default. In the middle of bookkeeping that leaves a page
with two owners, or an entry that is LOADING and that no thread reads. What does not work:

- `try`/`finally` around the bookkeeping. The exception may come in the `finally` block, or between
  `lock.acquire()` returning and the `try` being entered.
- Catching the exception and doing the bookkeeping again. There is no way to know how much was done.
- Checking a flag that a handler sets, with Python's default handler left in place: it raises.
- One handler of ours, installed for good. Users install theirs later, and so do frameworks (pytest,
  Lightning, IPython), and each expects to find or to replace the previous one.
- Blocking signals in the kernel (`pthread_sigmask`). The mask is that of a thread; a signal to the
  process then goes to a reader thread, and Python still runs the handler in the main thread.
- Deferring SIGINT alone. Clusters end jobs by SIGTERM or SIGUSR1, whose handlers save a checkpoint
  and raise, or call `close()`.
- Deferring every signal. Each takes 60 ns of every section, with or without a handler.

So, while the main thread is inside a section, the handlers of the signals that people and clusters
send are replaced by one that notes the number, and behind the section the original handlers are
put back and called for what was noted. This takes less than two microseconds for a section, in the
main thread alone; other threads never run handlers.

Handlers of other signals run inside a section as ever, between any two steps of the code below too,
and may use stores: so the methods of SignalDeferral may be entered again in the middle of
themselves.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from signal import SIGALRM, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from types import FrameType
from typing import Any

try:
    # What the functions of `signal` call. Those look up enums first, which takes microseconds.
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

_DEFERRED = tuple(map(int, (SIGINT, SIGTERM, SIGALRM, SIGHUP, SIGUSR1, SIGUSR2)))


class SignalDeferral:
    """Notes signals while the main thread is inside a section, and handles them behind it.

    One for the process (`deferral`): sections of several stores nest.

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
        """Leave a section; behind the outermost, put the handlers back and handle what was noted.

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


_FRAMES = 20
"""More than the bookkeeping of a call needs, down to the policies of this package."""


def require_stack(frames: int = _FRAMES) -> None:
    """Raise RecursionError unless this many calls can be nested. Takes 35 ns for each of them.

    Called before anything is changed: near the recursion limit of the interpreter an error could
    come in the middle of a change, and another one in the code that deals with the first.
    """
    if frames:
        require_stack(frames - 1)


deferral = SignalDeferral()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=deferral.reset)
