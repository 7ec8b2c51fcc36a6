"""One iteration over a loader of paths, and the loader's state as the consumer sees it."""

from collections.abc import Callable, Iterator
from typing import Any

from torchdata.nodes import BaseNode, IterableWrapper, Loader

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.failures import SERVED

_OURS = ("node", "finished")
"""Keys of a state over a node that do not come from GPUPrefetcher."""


class Progress:
    """The state of a wrapped loader after the last batch that the consumer got.

    A loader draws ahead of the consumer, so its own `state_dict()` is that of a later batch. The
    GPUPrefetcher of an iteration keeps the loader's state of each batch; this class knows which
    iteration is the latest, and what counts before, between and after iterations.

    Args:
        loader: the wrapped loader.
        tolerant: whether on_error may leave files out.

    Attributes:
        has_state: whether the loader has a state.
    """

    def __init__(self, loader: Any, tolerant: bool) -> None:
        self._loader = loader
        self._tolerant = tolerant
        self._is_node = isinstance(loader, BaseNode)
        # Whether all iterations share one position of the loader.
        self._one_at_a_time = isinstance(loader, (BaseNode, Loader))
        self.has_state = self._is_node or (
            hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        )
        self._latest: GPUPrefetcher | None = None
        # The state of the latest iteration, if it was dropped before its end.
        self._left: dict[str, Any] | None = None
        # For a node: the state in which the next iteration begins, and whether the latest one was
        # exhausted, so that the next one begins the next epoch. Other loaders keep this themselves.
        self._loaded: dict[str, Any] | None = None
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped loader; see the class."""
        if self._latest is not None:
            return self._state_of(self._latest)
        known = self._loaded or self._left
        if known is not None:
            return known
        state: dict[str, Any] = self._loader.state_dict()
        if not self._is_node:
            return state
        state = {"node": state, "finished": self._finished}
        # As a GPUPrefetcher has it in front of an epoch.
        return {**state, SERVED: False} if self._tolerant and not self._finished else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin there.

        Raises:
            ValueError: for a state that is not of a GPUCachedPathDataLoader over a node, if the
                loader is a node.
        """
        if not isinstance(state, dict):
            raise ValueError(f"a state is a dict, not {type(state).__name__}")
        self._latest = self._left = None
        if self._is_node:
            if "node" not in state:
                raise ValueError("this is not a state of a GPUCachedPathDataLoader over a node")
            self._loaded = state
        else:
            self._loader.load_state_dict(state)

    def begin(self, features: GPUPrefetcher, batches: GPUCollator) -> None:
        """Reset the nodes for a new iteration, from the loaded state if there is one."""
        self._latest = None  # its state is not to be used while the node is being reset
        if self._loaded is not None:
            loaded = {name: part for name, part in self._loaded.items() if name not in _OURS}
            batches.reset({"source": {"source": self._loaded["node"], **loaded}})
        if self._loaded is None or self._loaded["finished"]:
            batches.reset()
        self._latest, self._left, self._loaded, self._finished = features, None, None, False

    def end(self, features: GPUPrefetcher, exhausted: bool) -> None:
        """End an iteration. If it is exhausted, the state is from now on the loader's own.

        Runs in finalizers, too: takes no lock. An iteration that is not the latest is ignored.
        """
        if features is self._latest:
            self._left = None if exhausted else self._state_of(features)
            self._latest = None
            self._finished = exhausted

    def _state_of(self, features: GPUPrefetcher) -> dict[str, Any]:
        of_prefetcher = features.get_state()
        state: dict[str, Any] = of_prefetcher.pop("source")
        if self._is_node:
            return {"node": state, "finished": False, **of_prefetcher}
        return state[IterableWrapper.ITERABLE_KEY] if self.has_state else {}

    def require_latest(self, features: GPUPrefetcher) -> None:
        """Raise RuntimeError if the iterations share one position, and a later one has begun."""
        if self._one_at_a_time and features is not self._latest:
            raise RuntimeError(
                "a later iteration over this node has begun, or another state was loaded, and a "
                "node has one position only; make a second node for two iterations at once"
            )


class Iteration(Iterator[Any]):
    """One iteration. It begins at its first batch: until then, a state or epoch may be set.

    Args:
        batches, features: the nodes, made for this iteration.
        progress: of the loader.
        join: (gpu_batch, original_batch) -> what to yield.
    """

    def __init__(
        self,
        batches: GPUCollator,
        features: GPUPrefetcher,
        progress: Progress,
        join: Callable[[Any, Any], Any],
    ) -> None:
        self._batches = batches
        self._features = features
        self._progress = progress
        self._join = join
        self._begun = self._ended = False

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        if not self._begun:
            self._progress.begin(self._features, self._batches)
            self._begun = True
        self._progress.require_latest(self._features)
        try:
            gpu_batch, original = next(self._batches)
        except StopIteration:
            self._ended = True
            self._progress.end(self._features, exhausted=True)
            raise
        return self._join(gpu_batch, original)

    def __del__(self) -> None:
        # For iterations that are dropped before their end. Takes no lock.
        if self._begun and not self._ended:
            self._progress.end(self._features, exhausted=False)
            self._features.shutdown()
