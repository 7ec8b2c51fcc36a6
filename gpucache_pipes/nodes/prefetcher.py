"""GPUPrefetcher: paths in, features on the device out, requested a few elements ahead."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torchdata.nodes import BaseNode

from gpucache_pipes.batches import RaggedOptions
from gpucache_pipes.nodes.callbacks import call
from gpucache_pipes.nodes.consumer import ConsumerStream
from gpucache_pipes.nodes.failures import Failures
from gpucache_pipes.nodes.identity import PipelineIdentity
from gpucache_pipes.nodes.labels import NO_LABELS, Labelled, label_of, labels_of
from gpucache_pipes.nodes.lookahead import Lookahead
from gpucache_pipes.nodes.options import OnError, PrefetchOptions, require_store
from gpucache_pipes.nodes.pending_element import PendingElement
from gpucache_pipes.nodes.sharding import find_rank
from gpucache_pipes.nodes.shared_epoch import share
from gpucache_pipes.nodes.shared_position import SharedPosition
from gpucache_pipes.nodes.upstream import as_node, find_upstream, length_of, shown
from gpucache_pipes.store import GPUFeatureStore

_Key = tuple[PipelineIdentity, PipelineIdentity]
_latest: "WeakValueDictionary[_Key, GPUPrefetcher]" = WeakValueDictionary()
"""By store and source, the pipeline over them that was reset last.

Finalizers read it in any thread, while other threads reset pipelines. This relies on single
operations of a dict being safe under the GIL, also where keys have an `__eq__` in Python."""


class GPUPrefetcher(BaseNode[Any]):
    """Yields the features in the files that `source` names, and reads `depth` elements ahead.

        paths = PathLister("features/", batch_size=256, shuffle=True)
        for batch in GPUCollator(GPUPrefetcher(paths, store)):
            ...

    Elements of the source become, in the same order:

    - a path: the feature in that file;
    - a sequence of paths: a FeatureBatch, a sequence of features gathered at once;
    - samples of several files, as a PathLister over columns yields them, or a dict of columns of
      paths, or a list of dicts of paths: a SampleBatch, a sequence of dicts or tuples of features;
    - any other element, with `path_fn`: `join_fn(features, element)`, where `features` is one of
      the above for `path_fn(element)`. Without `join_fn` the tuple (features, element).

    **What happens when.** Nothing is read before the first `next()`. Each `next()` draws elements
    from the source until `depth` of them are requested after the one that it returns, waits for
    the files of that one, and gathers its features into new memory, which is the consumer's to
    keep and to write into. Reader threads of the store read the other files meanwhile. The source,
    `path_fn`, `join_fn` and `on_error` are called in the thread that calls `next()`.

    **Streams.** `next()` issues the gather on one stream of the device, and returns without waiting
    for it. What the consumer issues on this stream afterwards finds the features complete; work on
    another stream has to wait for this one, as for any tensor of torch. Which stream it is:

    - If the thread that calls `next()` has also reset the node, the stream that is current there.
    - If it is another thread, such as that of a torchdata Prefetcher downstream, the stream that
      was current in the resetting thread at the reset. The resetting thread is taken for the one
      that trains. The calling thread's own stream would be the wrong one: threads of torchdata
      set none, and the training thread does not wait for theirs.

    What the function of a ParallelMapper downstream issues runs on the current streams of its
    threads, which are not ordered after the gather unless they are the same stream.

    **Failed files.** With `on_error="raise"`, the error of a file is raised by the `next()` whose
    element needs it, and not earlier; the following `next()` goes on with the following element.
    With "skip" or a function:

    - A feature that cannot be loaded is left out of its FeatureBatch, or replaced by what the
      function returns. A single feature that is left out is not yielded.
    - An element of `path_fn` that is more than its paths is left out as a whole, since only the
      user knows which parts of it belong to a path. A replacement keeps it whole.
    - An element of which nothing is left is not yielded. Where torch.distributed has several
      ranks, each must have as many batches as the others, or these wait in a collective operation
      for ever. There the next element of the epoch of which something is left is yielded in its
      place, and a second time in its turn; at the end of an epoch, the last one before it is
      yielded once more. If there is neither, the error of the file is raised.
    - An epoch of which nothing can be loaded is an error.
    - A lack of host or device memory is always raised, as a MemoryError, and a failure of the
      store's policy, as a PolicyError.

    **States.** `state_dict()` holds the source's state after the last element that the consumer
    has got, not after the last one drawn: a run that resumes after k elements gets elements
    k + 1, k + 2, ... whatever its depth, and pending requests are made again. A signal handler may
    call it within `next()`: the state covers the element that is being gathered, or not. Keys:

    - "source": the state of the source.
    - "served": only with `on_error`, and only until the epoch has yielded an element: False.
    - "last_good": only with `on_error` and several ranks: the last element, as the source yields
      it and without features, that may have to be yielded once more.

    **Threads.** One thread at a time may call `next()` and `reset()`. `shutdown()` may be called
    from any thread and takes no lock.

    Args:
        source: a node, or an iterable that is iterated once per epoch.
        store: holds the features; several pipelines may share it. Pipelines over the same source
            object and store are one to the store's policy, so a new pipeline may be made for each
            epoch.
        depth: elements that are requested ahead of the consumer, at least 1. Their features take
            device memory meanwhile, also those that the cache does not admit. None is 2, and more
            where the storage has latency: see `GPUFeatureStore.requests_ahead`.
        path_fn: element -> path or sequence of paths. It is called again for an element whose
            request was interrupted.
        join_fn: (features, element) -> what to yield; must not return None.
        on_error: "raise"; "skip", which logs one line per file; or a function (path, error) ->
            the feature to take instead, a pytree as a file holds one, or None to leave it out.
        max_failures: with on_error, how many different files may fail, in all epochs of this node
            together, before a RuntimeError is raised.

    Attributes:
        source, store, depth, path_fn, join_fn: as given; the source as a node.
        failures: what became of files that failed.

    Raises:
        ValueError, TypeError: for arguments that are wrong or contradict each other.
        FeatureLoadError: in `next()`, for a file that cannot be loaded.
        RuntimeError: in `next()`, if another pipeline has reset the lister or node that both are
            over; with on_error, if more than max_failures files or all files of an epoch fail.
        TypeError: in `next()`, for an element that is no path and no sequence of paths.
    """

    def __init__(
        self,
        source: BaseNode[Any] | Iterable[Any],
        store: GPUFeatureStore,
        *,
        depth: int | None = None,
        path_fn: Callable[[Any], Any] | None = None,
        join_fn: Callable[[Any, Any], Any] | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
    ) -> None:
        super().__init__()
        options = PrefetchOptions(depth, path_fn, join_fn, on_error, max_failures)
        require_store(store)
        self.source = as_node(source)
        self.store = store
        self.depth = options.depth
        self.path_fn = path_fn
        self.join_fn = join_fn
        self.failures = Failures(on_error, max_failures)
        # Names this pipeline to the policy; the same for all pipelines over one source.
        self._owner = PipelineIdentity(source)
        self._key = (PipelineIdentity(store), self._owner)
        # Returns the paths that will be drawn, where a lister upstream knows them.
        self._upcoming = find_upstream(self.source, "upcoming")
        # The states of our listers are new dicts, which change no more.
        self._ahead = Lookahead(
            self.source, store, self._owner, options.depth, path_fn, self._upcoming is None
        )
        self._stream = ConsumerStream(store)
        self._labelled = False
        lister = getattr(self._upcoming, "__self__", None)
        shared = source if lister is None and isinstance(source, BaseNode) else lister
        self._position = SharedPosition(shared, self)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin the next epoch, or go on where a state was taken. Reads no files.

        The calling thread is from now on the one whose stream results are gathered on.
        """
        super().reset(initial_state)
        self._stream = ConsumerStream(self.store)
        self._ahead.reset(None if initial_state is None else initial_state["source"])
        _latest[self._key] = self
        self._position.take()
        ranks, _ = find_rank() if self.failures.tolerant else (1, 0)
        self.failures.begin_epoch(ranks, initial_state, find_upstream(self.source, "numbered"))
        self._labelled = bool(find_upstream(self.source, "labelled"))
        self.store.begin_epoch(self._owner)
        shared = self._ahead.shared = share(self.store, self.source, self._owner, self.depth)
        if self._upcoming is not None and shared is None:
            # A path_fn may turn paths into others, which the policy notices.
            self.store.announce(self._owner, self._upcoming)

    def next(self) -> Any:
        """The next element; see the class."""
        with self._stream():
            return self._in_step(partial(self._make, None))

    def next_collated(self, ragged: RaggedOptions) -> Any:
        """`next(self).collate(ragged)`, with a copy less on the host.

        Raises:
            TypeError: for a single path, which is consumed. Not to be called with a path_fn.
        """
        with self._stream():
            return self._in_step(partial(self._make, ragged))

    def _in_step(self, make: Callable[[], Any]) -> Any:
        shared = self._ahead.shared
        return make() if shared is None else shared.step(self._ahead, make)

    def _make(self, ragged: RaggedOptions | None) -> Any:
        if not self._ready(1):
            raise StopIteration
        head = self._ahead.elements[0]
        if ragged is not None and head.single and head.error is None:
            self._ahead.take_out([head])
            raise TypeError(
                "a GPUCollator collates sequences of features, not single ones; with "
                "batch_size it makes batches of these itself"
            )
        batch, [labels] = self._gather([head], ragged)
        if ragged is None:
            return self._join(batch[0] if head.single else batch, head, labels)
        return batch if labels is NO_LABELS else (batch, labels)

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` elements, gathered at once on the current stream.

        Returns:
            A FeatureBatch, with labels a Labelled one, or with path_fn a list of what `next` would
            return; shorter at the end of the epoch, [] after it.

        Raises:
            TypeError: if one of them is a sequence of paths. None is consumed.
            Exception: the error of the first that has one, such as a FeatureLoadError. All of
                them are consumed.
        """
        heads = [self._ahead.elements[at] for at in range(self._ready(count))]
        for pending in heads:
            if pending.error is None:
                self._ahead.batch_of(pending)
            if pending.error is None and not pending.single:
                raise TypeError(
                    "batch_size is for a source of single paths, but the source yields "
                    f"{type(pending.value).__name__}: omit batch_size"
                )
        if not heads:
            return []
        if self.path_fn is None:
            batch, [labels] = self._gather(heads, as_one=True)
            return batch if labels is NO_LABELS else Labelled(batch, labels)
        features, each = self._gather(heads)
        return [self._join(*joined) for joined in zip(features, heads, each, strict=True)]

    def __len__(self) -> int:
        """Elements of an epoch: those of the source. Raises TypeError if that has no length."""
        return length_of(self.source)

    def __bool__(self) -> bool:
        """True, also for a source without a length."""
        return True

    def __repr__(self) -> str:
        depth = "" if self.depth is None else f", depth={self.depth}"
        return f"GPUPrefetcher({shown(self.source)}, {self.store!r}{depth})"

    def get_state(self) -> dict[str, Any]:
        """The state after the last element that was consumed; see the class."""
        return {"source": self._ahead.state, **self.failures.get_state()}

    def shutdown(self) -> None:
        """Give up pending requests, and what was announced to the policy. Takes no lock.

        The node can be reset and used again.
        """
        self._ahead.release()
        self._retract()

    def __del__(self) -> None:
        # Requests end when they are collected; but the announcement stays in the policy.
        # Without a key, __init__ has failed; without a table, the interpreter ends.
        if hasattr(self, "_key") and _latest is not None:
            self._retract()
            if self._ahead.shared is not None:
                self._ahead.shared.release()

    def _retract(self) -> None:
        """Take back what this pipeline has announced, but not what a later one over its source has.

        Runs in finalizers: no lock, and none in the store, which retracts later. Looking up and
        retracting are two steps. If another thread resets a pipeline over the same source between
        them, the announcement of that one is lost, until its next epoch: it is a hint to the
        policy, and no result depends on it.
        """
        if _latest.get(self._key) in (None, self):
            self.store.retract(self._owner)

    def _ready(self, count: int) -> int:
        """Have `count` elements that can be yielded at the head of the queue, or all that are left.

        With on_error this waits for their files, since those of which nothing is left do not count.
        Returns how many there are.
        """
        ahead, failures = self._ahead, self.failures
        self._position.require()
        ahead.draw(count)
        if not failures.tolerant:
            return min(count, len(ahead.elements))
        ready = 0
        while ready < min(count, len(ahead.elements)):
            pending = ahead.elements[ready]
            if failures.resolve(pending, ahead):
                ready += 1
            # Not where on_error has called shutdown(), which empties the queue.
            elif ready < len(ahead.elements) and ahead.elements[ready] is pending:
                ahead.leave_out(ready)
                ahead.draw(count)
        failures.require_served(ready)
        return ready

    def _gather(
        self,
        heads: Sequence[PendingElement],
        ragged: RaggedOptions | None = None,
        as_one: bool = False,
    ) -> tuple[Any, list[Any]]:
        """The features of elements, collated with `ragged`, and the labels of each or NO_LABELS.

        `as_one`: single features and their labels as one batch. Raises as `Lookahead.collect`, and
        TypeError where labels were lost; the elements are then consumed.
        """
        try:
            paths = [head.kept() for head in heads if not head.error]
            if as_one:
                found = [labels_of([path for [path] in paths], self.store.device)]
            elif heads[0].single:
                found = [label_of(path, self.store.device) for [path] in paths]
            else:
                found = [labels_of(of_one, self.store.device) for of_one in paths]
            told = self._labelled and self.path_fn is None
            if told and any(labels is NO_LABELS for labels in found):
                raise TypeError(
                    "the PathLister has labels, but a node behind it yields paths that do not know "
                    "theirs, as str(path) and worker processes make them: pass the paths on as "
                    "they are"
                )
        except Exception:
            self._ahead.take_out(heads)
            raise
        return self._ahead.collect(heads, ragged), found

    def _join(self, features: Any, pending: PendingElement, labels: Any) -> Any:
        if labels is not NO_LABELS:
            features = Labelled(features, labels)
        if self.path_fn is not None:
            if self.join_fn is None:
                return features, pending.value
            return call(self.join_fn, "join_fn", features, pending.value)
        if features is None:
            raise TypeError(
                f"{pending.paths[0]!r} holds None, which a torchdata pipeline cannot carry"
            )
        return features
