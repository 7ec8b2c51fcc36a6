"""GPUPrefetcher: paths in, features on the device out, a few elements ahead."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torchdata.nodes import BaseNode

from gpucache_pipes.batch import FeatureBatch
from gpucache_pipes.nodes.consumer import ConsumerStream
from gpucache_pipes.nodes.sources import as_node, call, guarded
from gpucache_pipes.store import GPUFeatureStore
from gpucache_pipes.ticket import Ticket
from gpucache_pipes.units import positive_int


class _Ahead:
    """An element that was drawn from the source and is not consumed yet."""

    __slots__ = ("element", "error", "paths", "single", "state", "ticket")

    def __init__(self, element: Any) -> None:
        self.element = element
        self.paths: Sequence[Any] = ()
        self.single = False
        self.ticket: Ticket | None = None
        # What drawing or requesting it raised; the consumer gets it in its turn.
        self.error: Exception | None = None
        # The source's state behind it, None if the source failed to give the element.
        self.state: dict[str, Any] | None = None


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

    Raises:
        FeatureLoadError: in `next()`, at the element that needed the file. The node goes on
            with the following element.
    """

    def __init__(
        self,
        source: BaseNode[Any] | Iterable[Any],
        store: GPUFeatureStore,
        *,
        depth: int = 2,
        path_fn: Callable[[Any], Any] | None = None,
        join_fn: Callable[[Any, Any], Any] | None = None,
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
        self._ahead: deque[_Ahead] = deque()
        self._exhausted = False
        self._state: dict[str, Any] = {}
        # Names this pipeline to the policy; the same for all over one source, since some make
        # a new pipeline in each epoch.
        self._owner = ("pipeline over", id(source))
        self._stream = ConsumerStream(store)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode. Nothing is read before the first `next()`."""
        super().reset(initial_state)
        self._stream = ConsumerStream(self.store)
        self._let_go()
        self.source.reset(None if initial_state is None else initial_state["source"])
        self._state = self.source.state_dict()
        self._exhausted = False
        self.store.begin_epoch(self._owner)
        upcoming = find_upstream(self.source, "upcoming")
        if upcoming is not None:
            # With a path_fn the paths may be others, which the policy would notice.
            self.store.foresee(self._owner, upcoming())

    def next(self) -> Any:
        """See BaseNode."""
        with self._stream():
            self._draw(1)
            if not self._ahead:
                raise StopIteration
            head = self._ahead[0]
            batch = self._use([head])
            return self._join(batch[0] if head.single else batch, head)

    def _join(self, features: Any, head: "_Ahead") -> Any:
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
        self._draw(count)
        heads = [self._ahead[i] for i in range(min(count, len(self._ahead)))]
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
        batch = self._use(heads)
        if self.path_fn is None:
            return batch
        return [self._join(feature, head) for feature, head in zip(batch, heads, strict=True)]

    def get_state(self) -> dict[str, Any]:
        """See BaseNode."""
        return {"source": self._state}

    def shutdown(self) -> None:
        """Let go of what is on its way. The node can be reset and used again. Takes no lock."""
        self._let_go()
        self.store.withdraw(self._owner)

    def __del__(self) -> None:
        # Tickets cancel themselves when they are collected; and an __init__ may have failed.
        if hasattr(self, "_owner"):
            self.store.withdraw(self._owner)

    def _draw(self, needed: int) -> None:
        """Have `needed` elements, and `depth` behind them, requested."""
        while len(self._ahead) < needed + self.depth and not self._exhausted:
            try:
                head = _Ahead(next(self.source))
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:
                # What was drawn before it comes first.
                head = _Ahead(None)
                head.error = error
                self._ahead.append(head)
                return
            # In the queue first: an interrupt while it is requested must not lose it.
            self._ahead.append(head)
            head.state = self.source.state_dict()
            try:
                self._request(head)
            except Exception as error:
                head.error = error

    def _request(self, head: _Ahead) -> None:
        element = head.element
        paths = element
        if self.path_fn is not None:
            paths = guarded(self.path_fn, "path_fn", element)
        if isinstance(paths, (str, os.PathLike)):
            head.single = True
            paths = [paths]
        elif not isinstance(paths, Sequence) or isinstance(paths, bytes):
            what = "an element" if self.path_fn is None else "what path_fn gave"
            raise TypeError(
                f"{what} is neither a path nor a sequence of paths: {paths!r:.200}; "
                "path_fn(element) says which files an element needs"
            )
        head.paths = paths
        head.ticket = self.store.request(paths, owner=self._owner)

    def _use(self, heads: Sequence[_Ahead]) -> FeatureBatch:
        """Gather the first elements in the queue and take them out."""
        try:
            tickets = []
            for head in heads:
                if head.error is not None:
                    raise head.error
                tickets.append(self._ticket_of(head))
            batch = self.store.collect(tickets)
        except Exception:
            self._pass(heads)
            raise
        self._pass(heads)
        return batch

    def _ticket_of(self, head: _Ahead) -> Ticket:
        """Its ticket; a new one after an interrupt."""
        if head.ticket is None or head.ticket.used:
            self._request(head)
        assert head.ticket is not None
        return head.ticket

    def _pass(self, heads: Sequence[_Ahead]) -> None:
        for head in heads:
            self._ahead.popleft()
            if head.ticket is not None:
                head.ticket.cancel()
            if head.state is not None:
                self._state = head.state

    def _let_go(self) -> None:
        # Also in the finalizer of a generator that has this node: so without the store's lock.
        ahead, self._ahead = self._ahead, deque()
        for head in ahead:
            if head.ticket is not None:
                head.ticket.abandon()


def find_upstream(node: Any, name: str) -> Any:
    """The attribute of that name of `node`, or of the nearest `source` behind it, or None."""
    while node is not None:
        found = getattr(node, name, None)
        if found is not None:
            return found
        node = getattr(node, "source", None)
    return None
