"""Lookahead: the elements that a GPUPrefetcher requests before the consumer needs them."""

import copy
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torchdata.nodes import BaseNode

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.files import NumberedPath, Paths, Samples, as_samples
from gpucache_pipes.nodes.callbacks import guarded
from gpucache_pipes.nodes.pending_element import PendingElement
from gpucache_pipes.nodes.shared_batch import SharedBatch
from gpucache_pipes.nodes.shared_epoch import SharedEpoch
from gpucache_pipes.store import GPUFeatureStore, PendingBatch


class Lookahead:
    """A queue of PendingElements, filled from `source` and requested from `store`.

    Guarantees, whatever KeyboardInterrupt or other signal comes between any two operations:

    - An element in the queue is not lost. It enters the queue before it is requested, and leaves
      it after the gather; an element whose request was interrupted or used up is requested anew
      when it is needed. (What is not covered: an interrupt within the source's own `next()`, or
      before the result of that is in the queue. The element is then missing in this pass.)
    - `state` never covers an element that is still in the queue: it is assigned in one step,
      after the elements are taken out. An interrupt before that step leaves an older state; a run
      that is resumed from it gets these elements again, and misses none.

    One thread at a time uses it: the one that iterates over the prefetcher. `release` alone may
    be called from any thread, and from finalizers; it takes no lock.

    Args:
        source: the node to draw from.
        store: where features are requested.
        owner: names the pipeline to the store's policy.
        depth: elements that are kept requested in addition to the one that is needed; None leaves
            it to the store.
        path_fn: element -> path or paths; None where elements are paths.
        copies_states: whether to copy the states of `source`, which a source of the user's may
            go on changing while more is drawn.

    Attributes:
        elements: the queue. Only this class changes it.
        shared: the epoch, where ranks share their caches; set after `reset`.
        state: the source's, after the last element that was consumed.
    """

    def __init__(
        self,
        source: BaseNode[Any],
        store: GPUFeatureStore,
        owner: object,
        depth: int | None,
        path_fn: Callable[[Any], Any] | None,
        copies_states: bool,
    ) -> None:
        self._source = source
        self._store = store
        self._owner = owner
        self._fixed_depth = depth
        self._files = 1  # of the last element
        self._depth = depth or 1
        self._path_fn = path_fn
        self._copies_states = copies_states
        self.shared: SharedEpoch | None = None
        self._steps = 0  # drawn since the reset
        self.elements: deque[PendingElement] = deque()
        self._exhausted = False
        self.state: dict[str, Any] = {}

    def reset(self, source_state: dict[str, Any] | None) -> None:
        """Release all elements, and begin anew from a state of the source. Reads no files."""
        self.release()
        self.shared, self._steps = None, 0
        self._source.reset(source_state)
        self.state = copy.deepcopy(self._source.state_dict())
        self._exhausted = False

    def draw(self, needed: int) -> None:
        """Have `needed` elements, and `depth` more, in the queue, or all that are left.

        What the source or the request of an element raises is kept in `PendingElement.error`:
        the elements that were drawn before it are the consumer's first.
        """
        self._find_depth()
        while len(self.elements) < needed + self._depth and not self._exhausted:
            try:
                pending = PendingElement(next(self._source))
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                self._steps += 1
                pending = PendingElement(None)
                pending.error = error
                self.elements.append(pending)
                return
            pending.step = self._steps
            self._steps += 1
            # Into the queue before all else: an interrupt of what follows must not lose it.
            self.elements.append(pending)
            state = self._source.state_dict()
            pending.state = copy.deepcopy(state) if self._copies_states else state
            try:
                self.request(pending)
            except Exception as error:
                pending.error = error

    def request(self, pending: PendingElement) -> None:
        """Request the files of an element, in place of an earlier request of it.

        Raises:
            TypeError: for an element, or a result of path_fn, that is not paths.
            Exception: what path_fn raises.
            RuntimeError: for a closed store.
        """
        value = pending.value
        paths = value
        if self._path_fn is not None:
            paths = guarded(self._path_fn, "path_fn", value)
        pending.divisible = paths is value
        # Each time: a stand-in for an element that failed may be of the other kind.
        pending.single = isinstance(paths, (str, os.PathLike))
        samples = pending.samples = as_samples(paths)
        if pending.single:
            pending.divisible = False
            paths = [paths]
        elif samples is None and (not isinstance(paths, Sequence) or isinstance(paths, bytes)):
            what = "an element" if self._path_fn is None else "what path_fn gave"
            raise TypeError(
                f"{what} is neither a path nor a sequence of paths: {paths!r:.200}; "
                "path_fn(element) returns the paths of the files that an element needs"
            )
        files = paths if samples is None else samples.paths
        pending.paths = files
        self._files = len(files)
        self._find_depth()
        # Not NumberedPath: the store would keep the list of files alive, and its labels.
        if not isinstance(files, Paths) and len(files) and isinstance(files[0], NumberedPath):
            files = [str(path) for path in files]
        asked = files if samples is None else Samples(samples.parts, files)
        step, pending.step = pending.step, None
        if self.shared is not None and step is not None:
            pending.batch = self.shared.batch(step, asked, self._depth)
            return
        pending.batch = self._store.request(asked, owner=self._owner, ahead=self._depth)

    def _find_depth(self) -> None:
        self._depth = self._fixed_depth or self._store.requests_ahead(self._files)
        if self.shared is not None:  # what a step serves must be there before its messages go
            self._depth += 2 * self.shared.ahead

    def batch_of(self, pending: PendingElement) -> PendingBatch | SharedBatch:
        """The open request of an element: a new one if an interrupt has used up the first."""
        if pending.batch is None or pending.batch.used:
            self.request(pending)
        assert pending.batch is not None
        return pending.batch

    def collect(self, heads: Sequence[PendingElement], ragged: RaggedOptions | None = None) -> Any:
        """Gather the elements at the head of the queue into one batch, and take them out.

        They are taken out after an error as well, so that the consumer goes on with the next ones.
        After an interrupt they stay.

        Args:
            heads: the first elements of the queue, in order.
            ragged: how to collate the batch; None for a FeatureBatch.

        Raises:
            Exception: the error of the first element that has one, or of the store.
        """
        try:
            batches: list[Any] = []
            for pending in heads:
                if pending.error is not None:
                    raise pending.error
                batches.append(self.batch_of(pending))
            if isinstance(batches[0], SharedBatch):
                [shared] = batches
                batch = shared.result(ragged)
            else:
                batch = self._store.collect(batches, ragged)
        except Exception:
            self.take_out(heads)
            raise
        self.take_out(heads)
        return batch

    def take_out(self, heads: Sequence[PendingElement]) -> None:
        """Take the elements at the head of the queue out of it, as consumed."""
        state = self.state
        for pending in heads:
            self.elements.popleft()
            if pending.batch is not None:
                pending.batch.cancel()
            if pending.state is not None:
                state = pending.state
        # In one step: a signal handler that asks for the state before it gets the one in front
        # of all of these elements, and never one in their midst.
        self.state = state

    def leave_out(self, at: int) -> None:
        """Take out the element at this position of the queue, of which nothing can be used."""
        pending = self.elements[at]
        del self.elements[at]
        if pending.batch is not None:
            pending.batch.cancel()
        # It counts as consumed together with the element before it.
        if at:
            self.elements[at - 1].state = pending.state
        elif pending.state is not None:
            self.state = pending.state

    def release(self) -> None:
        """Empty the queue, and give up the requests in it. Takes no lock.

        A generator or DataPipe over the prefetcher calls this in its finalizer. The garbage
        collector may run that at any allocation, in any thread: also in one that holds the
        store's lock, which is therefore not to be taken here. So requests are abandoned, for the
        store to close later, and not cancelled.

        The queue is replaced before it is read, since a deque must not change while it is iterated
        over, and the iterating thread may go on appending. Two calls at once may find the same
        queue; `abandon` gives each request up once, which relies on `list.pop` being atomic under
        the GIL.
        """
        if self.shared is not None:
            self.shared.release()
        elements, self.elements = self.elements, deque()
        for pending in elements:
            if pending.batch is not None:
                pending.batch.abandon()
