"""GPUPrefetcher: paths in, features on the device out, a few elements ahead."""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

from torchdata.nodes import BaseNode

from gpucache_pipes.batches import FeatureBatch, RaggedOptions
from gpucache_pipes.nodes.callbacks import call, guarded
from gpucache_pipes.nodes.consumer import ConsumerStream
from gpucache_pipes.nodes.failures import Failures, OnError
from gpucache_pipes.nodes.identity import SourceIdentity
from gpucache_pipes.nodes.pending_element import PendingElement
from gpucache_pipes.nodes.sharding import find_rank
from gpucache_pipes.nodes.upstream import as_node, find_upstream
from gpucache_pipes.store import GPUFeatureStore, PendingBatch
from gpucache_pipes.units import positive_int

_LAST_GOOD = "last_good"
"""In a state: an element that may have to be yielded again, where ranks need as many batches."""

SERVED = "served"
"""In a state: False while nothing of its epoch could be loaded."""

_Key = tuple[SourceIdentity, SourceIdentity]
_latest: "WeakValueDictionary[_Key, GPUPrefetcher]" = WeakValueDictionary()
"""Of the pipelines over one source and store, the one that has begun last."""


class GPUPrefetcher(BaseNode[Any]):
    """Keeps the files of the next `depth` elements on their way to the device.

    Elements of source and what becomes of them, in the same order:

    - a path: the feature;
    - a sequence of paths: a FeatureBatch, a sequence of features that was gathered at once;
    - anything else, with path_fn: join_fn(features, element), where features is one of the
      above for `path_fn(element)`; without join_fn the tuple of both.

    The gather is issued in `next()`, on the stream that is current in the thread that calls it.
    If that is not the thread that has reset the node, as with torchdata's Prefetcher behind it,
    the stream that was current at the reset is used: that of the thread that trains. (What a
    ParallelMapper behind the node calls in its threads runs on the streams of these threads.)

    The state is that of the source behind the last element that was consumed: resuming after k
    elements gives elements k + 1, k + 2, ...

    Args:
        source: a node, or an iterable that is read through once in each epoch.
        store: where features are kept; may be shared by several pipelines.
        depth: elements ahead of the consumer, at least 1.
        path_fn: element -> path or sequence of paths.
        join_fn: (features, element) -> what to yield.
        on_error: what to do about a file that cannot be loaded: "raise"; "skip", to leave the
            feature out, with one line in the log for each file; or a function (path, error) ->
            a feature to take instead, or None to skip. It is called in the thread that trains. Of
            an element of path_fn that holds more than paths, nothing can be left out: it is
            skipped as a whole. An element of which nothing is left is not yielded; where
            torch.distributed has several ranks, which must have equally many batches, the next
            one of the epoch of which something is left is yielded in its place as well, or behind
            that the one before. Lack of memory is raised.
        max_failures: how many different files may fail before that is raised after all.

    Raises:
        FeatureLoadError: in `next()`, at the element that needed the file. The node goes on
            with the following element.
        RuntimeError: with on_error, if more than max_failures files fail, or all of an epoch.
    """

    def __init__(
        self,
        source: BaseNode[Any] | Iterable[Any],
        store: GPUFeatureStore,
        *,
        depth: int = 2,
        path_fn: Callable[[Any], Any] | None = None,
        join_fn: Callable[[Any, Any], Any] | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
    ) -> None:
        super().__init__()
        if join_fn is not None and path_fn is None:
            raise ValueError(
                "join_fn needs a path_fn: elements that are paths have nothing to join"
            )
        if not isinstance(store, GPUFeatureStore):
            raise TypeError(f"store must be a GPUFeatureStore, not {type(store).__name__}")
        self.source = as_node(source)
        self.store = store
        self.depth = positive_int("depth", depth)
        self.path_fn = path_fn
        self.join_fn = join_fn
        self.failures = Failures(on_error, max_failures)
        self._ahead: deque[PendingElement] = deque()
        self._exhausted = False
        self._state: dict[str, Any] = {}
        # Names this pipeline to the policy; the same for all over one source, since some make
        # a new pipeline in each epoch.
        self._owner = SourceIdentity(source)
        self._key = (SourceIdentity(store), self._owner)
        # What comes, where a lister knows it.
        self._upcoming = find_upstream(self.source, "upcoming")
        self._stream = ConsumerStream(store)
        # With on_error: how many ranks must have as many batches, the last element of which
        # something was left, and whether there was one in this epoch.
        self._ranks = 1
        self._last_good: Any = None
        self._served = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode. Nothing is read before the first `next()`."""
        super().reset(initial_state)
        self._stream = ConsumerStream(self.store)
        self._let_go()
        self.source.reset(None if initial_state is None else initial_state["source"])
        self._state = copy.deepcopy(self.source.state_dict())
        _latest[self._key] = self
        self._exhausted = False
        self._ranks, _ = find_rank() if self.failures.tolerant else (1, 0)
        self._served = initial_state is not None and initial_state.get(SERVED, True)
        self._last_good = copy.deepcopy((initial_state or {}).get(_LAST_GOOD))
        self.failures.last = None
        self.store.begin_epoch(self._owner)
        if self._upcoming is not None:
            # With a path_fn the paths may be others, which the policy would notice.
            self.store.announce(self._owner, self._upcoming)

    def next(self) -> Any:
        """See BaseNode."""
        with self._stream():
            if not self._have(1):
                raise StopIteration
            head = self._ahead[0]
            batch = self._use([head])
            return self._join(batch[0] if head.single else batch, head)

    def next_collated(self, ragged: RaggedOptions) -> Any:
        """What `collate(ragged)` makes of the next batch, with a copy less on the host.

        For elements that are sequences of paths, without path_fn.
        """
        with self._stream():
            if not self._have(1):
                raise StopIteration
            head = self._ahead[0]
            if head.single and head.error is None:
                self._pass([head])
                raise TypeError(
                    "a GPUCollator collates sequences of features, not single ones; with "
                    "batch_size it makes batches of these itself"
                )
            return self._use([head], ragged)

    def _join(self, features: Any, head: PendingElement) -> Any:
        if self.path_fn is not None:
            element = head.element
            return call(self.join_fn, "join_fn", features, element) if self.join_fn else (
                features, element,
            )  # fmt: skip
        if features is None:
            raise TypeError(
                f"{head.paths[0]!r} holds None, which a torchdata pipeline cannot carry"
            )
        return features

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` elements, fewer at the end, gathered at once.

        For elements of one path each. Without path_fn a FeatureBatch. On the current stream.
        """
        heads = [self._ahead[i] for i in range(self._have(count))]
        for head in heads:
            if head.error is None:
                self._ticket_of(head)
            if head.error is None and not head.single:
                raise TypeError(
                    "batch_size is for a source of single paths, but the source yields "
                    f"{type(head.element).__name__}: leave batch_size away"
                )
        if not heads:
            return []
        batch: FeatureBatch = self._use(heads)
        if self.path_fn is None:
            return batch
        return [self._join(feature, head) for feature, head in zip(batch, heads, strict=True)]

    def get_state(self) -> dict[str, Any]:
        """See BaseNode."""
        state: dict[str, Any] = {"source": self._state}
        if self._last_good is not None:
            state[_LAST_GOOD] = self._last_good
        if self.failures.tolerant and not self._served:
            state[SERVED] = False
        return state

    def shutdown(self) -> None:
        """Let go of what is on its way. The node can be reset and used again. Takes no lock."""
        self._let_go()
        self._retract()

    def __del__(self) -> None:
        # Tickets cancel themselves when they are collected; and an __init__ may have failed.
        if hasattr(self, "_key"):
            self._retract()

    def _retract(self) -> None:
        # What another pipeline over the same source has announced since stays.
        if _latest.get(self._key) in (None, self):
            self.store.retract(self._owner)

    def _have(self, count: int) -> int:
        """Draw elements until `count` are there of which something is left; how many there are."""
        self._draw(count)
        have = 0
        while have < min(count, len(self._ahead)):
            head = self._ahead[have]
            if not self.failures.tolerant or self._settle(head):
                have += 1
            elif have < len(self._ahead) and self._ahead[have] is head:
                self._leave_out(have)
                self._draw(count)
        if have:
            self._served = True
        elif not self._served and self.failures.last is not None:
            self._served = True
            raise RuntimeError(
                f"nothing of this epoch could be loaded; the last error: {self.failures.last}"
            ) from self.failures.last
        return have

    def _settle(self, head: PendingElement) -> bool:
        """Decide what is taken instead of what failed; False if nothing is left of the element."""
        if head.error is not None:
            return True  # which is raised
        try:
            ticket = self._ticket_of(head)
            if head.settled is ticket:
                return True
            left = self._sift(head, ticket)
            if not left and self._ranks > 1:
                # Other ranks wait for a batch.
                head.element = copy.copy(self._stand_in(head))
                self._request(head)
                left = self._sift(head, self._ticket_of(head))
                if not left:
                    assert self.failures.last is not None
                    raise self.failures.last
        except Exception as error:
            head.error = error
            return True
        head.settled = head.ticket
        if left and self._ranks > 1:
            self._last_good = copy.copy(head.element)  # the consumer's own from now on
        return left

    def _stand_in(self, head: PendingElement) -> Any:
        """What to yield instead of an element of which nothing is left.

        The next element of the epoch of which something is: so it does not matter where the run
        was resumed. Behind the last one, the one before. Raises the error of the file if there is
        neither.
        """
        at = next(at for at, other in enumerate(self._ahead) if other is head) + 1
        self._draw(at + 1)
        while at < len(self._ahead):
            other = self._ahead[at]
            if other.error is None:
                ticket = self._ticket_of(other)
                if other.settled is ticket or self._sift(other, ticket):
                    return other.element
            at += 1
            self._draw(at + 1)
        if self._last_good is None:
            assert self.failures.last is not None
            raise self.failures.last
        return self._last_good

    def _sift(self, head: PendingElement, ticket: PendingBatch) -> bool:
        """Leave out of the element what failed; whether anything is left."""
        left_out = self.failures.settle(ticket, head.paths)
        if head.divisible and left_out:
            rest = [path for at, path in enumerate(head.paths) if at not in left_out]
            head.element = rest
            return bool(rest)
        # Nothing can be taken out of an element whose parts nobody here knows.
        return not left_out

    def _leave_out(self, at: int) -> None:
        head = self._ahead[at]
        del self._ahead[at]
        if head.ticket is not None:
            head.ticket.cancel()
        # What comes before it is consumed together with it.
        if at:
            self._ahead[at - 1].state = head.state
        elif head.state is not None:
            self._state = head.state

    def _draw(self, needed: int) -> None:
        """Have `needed` elements, and `depth` behind them, requested."""
        while len(self._ahead) < needed + self.depth and not self._exhausted:
            try:
                head = PendingElement(next(self.source))
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                # What was drawn before it comes first.
                head = PendingElement(None)
                head.error = error
                self._ahead.append(head)
                return
            # In the queue first: an interrupt while it is requested must not lose it.
            self._ahead.append(head)
            # A copy: what users keep in a state may change as more is drawn.
            state = self.source.state_dict()
            head.state = copy.deepcopy(state) if self._upcoming is None else state
            try:
                self._request(head)
            except Exception as error:
                head.error = error

    def _request(self, head: PendingElement) -> None:
        element = head.element
        paths = element
        if self.path_fn is not None:
            paths = guarded(self.path_fn, "path_fn", element)
        head.divisible = paths is element
        if isinstance(paths, (str, os.PathLike)):
            head.single, head.divisible = True, False
            paths = [paths]
        elif not isinstance(paths, Sequence) or isinstance(paths, bytes):
            what = "an element" if self.path_fn is None else "what path_fn gave"
            raise TypeError(
                f"{what} is neither a path nor a sequence of paths: {paths!r:.200}; "
                "path_fn(element) says which files an element needs"
            )
        head.paths = paths
        head.ticket = self.store.request(paths, owner=self._owner)

    def _use(self, heads: Sequence[PendingElement], ragged: RaggedOptions | None = None) -> Any:
        """Gather the first elements in the queue and take them out."""
        try:
            tickets = []
            for head in heads:
                if head.error is not None:
                    raise head.error
                tickets.append(self._ticket_of(head))
            batch = self.store.collect(tickets, ragged)
        except Exception:
            self._pass(heads)
            raise
        self._pass(heads)
        return batch

    def _ticket_of(self, head: PendingElement) -> PendingBatch:
        """Its ticket; a new one after an interrupt."""
        if head.ticket is None or head.ticket.used:
            self._request(head)
        assert head.ticket is not None
        return head.ticket

    def _pass(self, heads: Sequence[PendingElement]) -> None:
        state = self._state
        for head in heads:
            self._ahead.popleft()
            if head.ticket is not None:
                head.ticket.cancel()
            if head.state is not None:
                state = head.state
        # At once: a signal handler that asks for it meanwhile gets the one before all of them.
        self._state = state

    def _let_go(self) -> None:
        # Also in the finalizer of a generator that has this node: so without the store's lock.
        ahead, self._ahead = self._ahead, deque()
        for head in ahead:
            if head.ticket is not None:
                head.ticket.abandon()
