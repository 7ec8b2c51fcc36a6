"""One pass over a loader of paths, and where the loader stands as the consumer sees it."""

from collections.abc import Callable, Iterator
from typing import Any

from torchdata.nodes import BaseNode, IterableWrapper, Loader

from gpucache_pipes.nodes import GPUCollator, GPUPrefetcher
from gpucache_pipes.nodes.failures import SERVED

_OURS = ("node", "finished")
"""What a state over a node has beside that of a GPUPrefetcher."""


class Progress:
    """Where the wrapped loader stands: batches that are on their way do not count.

    Attributes:
        has_state: whether the loader has a state at all.

    Args:
        tolerant: whether files may be left out.
    """

    def __init__(self, loader: Any, tolerant: bool) -> None:
        self._loader = loader
        self._tolerant = tolerant
        self._is_node = isinstance(loader, BaseNode)
        # Whether it has one place only, for all who iterate.
        self._one_at_a_time = isinstance(loader, (BaseNode, Loader))
        self.has_state = self._is_node or (
            hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        )
        self._latest: GPUPrefetcher | None = None
        # Of the latest iteration, if it was broken off.
        self._left: dict[str, Any] | None = None
        # For a node: what the next iteration begins with; and whether the latest one came to its
        # end, so that the next epoch is the one to go on with. Other loaders know this themselves.
        self._loaded: dict[str, Any] | None = None
        self._finished = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped loader behind the last batch that was consumed."""
        if self._latest is not None:
            return self._state_of(self._latest)
        known = self._loaded or self._left
        if known is not None:
            return known
        state: dict[str, Any] = self._loader.state_dict()
        if not self._is_node:
            return state
        state = {"node": state, "finished": self._finished}
        # Of an epoch that has not begun: see GPUPrefetcher.
        return {**state, SERVED: False} if self._tolerant and not self._finished else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin there."""
        self._latest = self._left = None
        if self._is_node:
            if "node" not in state:
                raise ValueError("this is no state of a GPUCachedPathDataLoader over a node")
            self._loaded = state
        else:
            self._loader.load_state_dict(state)

    def begin(self, features: GPUPrefetcher, batches: GPUCollator) -> None:
        """Reset the nodes for a new pass, from a state if one was loaded."""
        self._latest = None  # while it is being reset, the node has no state to speak of
        if self._loaded is not None:
            loaded = {name: part for name, part in self._loaded.items() if name not in _OURS}
            batches.reset({"source": {"source": self._loaded["node"], **loaded}})
        if self._loaded is None or self._loaded["finished"]:
            batches.reset()
        self._latest, self._left, self._loaded, self._finished = features, None, None, False

    def end(self, features: GPUPrefetcher, exhausted: bool) -> None:
        """The pass is over. If it was exhausted, the state is what the loader says itself."""
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
        """Raise RuntimeError if somebody else has begun to iterate over the same node."""
        if self._one_at_a_time and features is not self._latest:
            raise RuntimeError(
                "the node is iterated anew, or has got another state, and a node has one place "
                "only; make a second one for two iterations at once"
            )


class Iteration(Iterator[Any]):
    """One pass. Begins at the first batch, since a state or an epoch may be set until then."""

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
        # For those who go away early. Takes no lock.
        if self._begun and not self._ended:
            self._progress.end(self._features, exhausted=False)
            self._features.shutdown()
