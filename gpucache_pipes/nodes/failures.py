"""Failures: what a pipeline does about files that cannot be loaded."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

from gpucache_pipes.errors import PolicyError
from gpucache_pipes.files import Paths, Samples, as_plain_data, from_plain_data
from gpucache_pipes.nodes.callbacks import guarded
from gpucache_pipes.nodes.lookahead import Lookahead
from gpucache_pipes.nodes.options import OnError
from gpucache_pipes.nodes.pending_element import PendingElement
from gpucache_pipes.nodes.shared_batch import SharedBatch
from gpucache_pipes.store import PendingBatch

LAST_GOOD = "last_good"
"""In a state: the element to repeat where a rank has no other one left to yield."""

SERVED = "served"
"""In a state: False while no element of its epoch has been yielded."""


class Failures:
    """Resolves elements with failed files: leaves features out, replaces them, or raises.

    The rules are those of `on_error` in GPUPrefetcher, which checks the arguments. One thread at
    a time uses it: the one that iterates over the prefetcher, in which on_error is called.

    Attributes:
        on_error, max_failures: see GPUPrefetcher.
        tolerant: whether a file that cannot be loaded may be left out or replaced.
        last: the latest error in this epoch that was not raised.
    """

    def __init__(self, on_error: OnError, max_failures: int | None) -> None:
        self.on_error = on_error
        self.max_failures = max_failures
        self.tolerant = on_error != "raise"
        self.last: Exception | None = None
        self._failed_paths: set[str] = set()
        # Ranks that must yield equally many elements; the last element of which something was
        # left; and whether this epoch has yielded any.
        self._ranks = 1
        self._last_good: Any = None
        self._served = False

    def begin_epoch(
        self, ranks: int, state: dict[str, Any] | None, numbered: Callable[[Any], Any] | None
    ) -> None:
        """Begin an epoch, or go on in the one in which the prefetcher's `state` was taken.

        `numbered` makes of an element in a state what the source has yielded: see PathLister.
        """
        self._ranks = ranks
        self._served = state is not None and state.get(SERVED, True)
        good = copy.deepcopy((state or {}).get(LAST_GOOD))
        self._last_good = from_plain_data(good, None, ()) if numbered is None else numbered(good)
        self.last = None

    def get_state(self) -> dict[str, Any]:
        """What of this belongs into the prefetcher's state; nothing where nothing has failed."""
        state = {}
        if self._last_good is not None:
            state[LAST_GOOD] = as_plain_data(self._last_good)
        if self.tolerant and not self._served:
            state[SERVED] = False
        return state

    def require_served(self, ready: int) -> None:
        """Note that `ready` elements are about to be yielded.

        Raises:
            RuntimeError: once, if there is none, and none was before, since all have failed.
        """
        if ready:
            self._served = True
        elif not self._served and self.last is not None:
            self._served = True
            raise RuntimeError(
                f"nothing of this epoch could be loaded; the last error: {self.last}"
            ) from self.last

    def resolve(self, pending: PendingElement, lookahead: Lookahead) -> bool:
        """Wait for the files of an element, and decide what replaces the features that failed.

        What that raises becomes the element's error, for its turn. An interrupt leaves what was
        decided until then in the request, so that on_error is not called for it again.

        Returns:
            False if nothing of the element is left: it is not to be yielded.
        """
        if pending.error is not None:
            return True  # the consumer gets the error
        try:
            batch = lookahead.batch_of(pending)
            if pending.resolved is batch:
                return True
            left = self._resolve_features(pending, batch)
            if not left and self._ranks > 1:
                # The other ranks wait in a collective operation until this one has a batch, too.
                pending.value = _copied(self._stand_in_for(pending, lookahead))
                lookahead.request(pending)
                left = self._resolve_features(pending, lookahead.batch_of(pending))
                if not left:
                    assert self.last is not None
                    raise self.last
        except Exception as error:
            pending.error = error
            return True
        pending.resolved = pending.batch
        if left and self._ranks > 1:
            # A copy: the consumer may change the element that it gets.
            self._last_good = _copied(pending.value)
        return left

    def _stand_in_for(self, pending: PendingElement, lookahead: Lookahead) -> Any:
        """What to yield instead of an element of which nothing is left.

        The next element of the epoch of which something is left: that is the same one wherever
        the run was interrupted and resumed. At the end of the epoch, where none follows, the one
        before, which is therefore in the state. Raises the error of the file if there is neither.
        """
        at = next(at for at, other in enumerate(lookahead.elements) if other is pending) + 1
        lookahead.draw(at + 1)
        while at < len(lookahead.elements):
            other = lookahead.elements[at]
            if other.error is None:
                batch = lookahead.batch_of(other)
                if other.resolved is batch or self._resolve_features(other, batch):
                    return other.value
            at += 1
            lookahead.draw(at + 1)
        if self._last_good is None:
            assert self.last is not None
            raise self.last
        return self._last_good

    def _resolve_features(self, pending: PendingElement, batch: PendingBatch | SharedBatch) -> bool:
        """Replace or leave out the failed features of an element; whether anything is left."""
        left_out = self._resolve_batch(batch, pending.paths)
        if pending.divisible and left_out:
            pending.value = pending.kept()
            return len(pending.value) > 0
        # Which parts of any other element belong to a path is known to the user only.
        return not left_out

    def _resolve_batch(self, batch: PendingBatch | SharedBatch, paths: Sequence[Any]) -> set[int]:
        """Wait for a request and decide about each feature that failed; which are left out."""
        for position, error in batch.wait().items():
            path = os.fspath(paths[position])
            batch.replace(position, guarded(self._substitute, "on_error", path, error))
        # All of them, and not only the new ones: some may have been decided before an interrupt.
        return batch.left_out

    def _substitute(self, path: str, error: Exception) -> Any:
        """The feature to take instead of a file, or None to leave it out.

        Raises:
            MemoryError, PolicyError: `error`, if it is one: the file is not at fault.
            RuntimeError: at more than max_failures different files.
            Exception: what on_error raises.
        """
        if isinstance(error, (MemoryError, PolicyError)):
            raise error
        self._failed_paths.add(path)
        if self.max_failures is not None and len(self._failed_paths) > self.max_failures:
            raise RuntimeError(
                f"{len(self._failed_paths)} files could not be loaded, which is more than "
                f"max_failures={self.max_failures}; the last one: {error}"
            ) from error
        self.last = error
        return None if isinstance(self.on_error, str) else self.on_error(path, error)


def _copied(element: Any) -> Any:
    """A copy of an element of the source, which still knows its labels."""
    return element if isinstance(element, (Paths, Samples)) else copy.copy(element)
