"""What a pipeline has announced, until its plan is needed."""

import threading
from collections.abc import Callable
from logging import getLogger

from gpucache_pipes.cache import AccessPlan

_log = getLogger("gpucache_pipes")


class Announcement:
    """An access plan that is built once, by the first reader thread whose files need room.

    Numbering a million files and linking their uses takes a second or more. So it is not done in
    the thread that trains, and not at all while the budget is not used up.

    Args:
        build: makes the plan. Called without any lock held that it might take.

    Attributes:
        plan: None before `build`.
    """

    def __init__(self, build: Callable[[], AccessPlan]) -> None:
        self.plan: AccessPlan | None = None
        self._build = [build]
        # Reentrant: a signal handler may request a batch while this thread builds. It has no plan.
        self._lock = threading.RLock()

    def build(self) -> None:
        """Build the plan; other threads wait for the first. A plan that cannot be made is empty."""
        with self._lock:
            if not self._build:
                return
            build = self._build.pop()
            try:
                self.plan = build()
            except Exception as error:  # such as a path that none can be: its batch will say so
                _log.warning("what a pipeline has announced is of no use: %s", error)
                self.plan = AccessPlan(())
            except BaseException:
                self._build.append(build)
                raise
