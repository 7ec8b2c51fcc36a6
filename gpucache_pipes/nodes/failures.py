"""What a pipeline does about files that cannot be loaded."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from gpucache_pipes.nodes.callbacks import guarded
from gpucache_pipes.store import PendingBatch
from gpucache_pipes.units import positive_int

OnError = str | Callable[[str, Exception], Any]
"""See GPUPrefetcher."""


class Failures:
    """Decides what becomes of a feature that could not be loaded, and keeps count.

    Attributes:
        tolerant: whether anything but raising may come of it.
        last: the latest error that was not raised.
    """

    def __init__(self, on_error: OnError, max_failures: int | None) -> None:
        if not callable(on_error) and on_error not in ("raise", "skip"):
            raise ValueError(f'on_error={on_error!r} must be "raise", "skip" or callable')
        self.tolerant = on_error != "raise"
        if max_failures is not None:
            positive_int("max_failures", max_failures, least=0)
            if not self.tolerant:
                raise ValueError('max_failures is for on_error="skip" or a callable')
        self.on_error = on_error
        self.max_failures = max_failures
        self.last: Exception | None = None
        self._failed: set[str] = set()

    def substitute(self, path: str, error: Exception) -> Any:
        """The feature to take instead, or None to leave it out. May raise."""
        if isinstance(error, MemoryError):  # which is no matter of the file
            raise error
        self._failed.add(path)
        if self.max_failures is not None and len(self._failed) > self.max_failures:
            raise RuntimeError(
                f"{len(self._failed)} files could not be loaded, which is more than "
                f"max_failures={self.max_failures}; the last one: {error}"
            ) from error
        self.last = error
        return None if isinstance(self.on_error, str) else self.on_error(path, error)

    def settle(self, ticket: PendingBatch, paths: Sequence[Any]) -> set[int]:
        """Wait for a ticket's files and deal with those that failed; what is left out of them."""
        for position, error in ticket.wait().items():
            path = os.fspath(paths[position])
            ticket.replace(position, guarded(self.substitute, "on_error", path, error))
        # Also what was decided before an interrupt.
        return {position for position, feature in ticket.instead.items() if feature is None}
