"""SharedPosition: which of several pipelines over one lister or node it follows."""

from typing import Any
from weakref import WeakKeyDictionary, ref

_reset_by: "WeakKeyDictionary[Any, ref[Any]]" = WeakKeyDictionary()
"""By lister or node, the pipeline that has reset it last."""


class SharedPosition:
    """The position of a lister or node, which all pipelines over it have in common.

    Args:
        node: the lister or node; None for a source of which each pipeline has its own.
        pipeline: the one that asks.
    """

    def __init__(self, node: Any, pipeline: Any) -> None:
        self._node = node
        self._pipeline = ref(pipeline)

    def take(self) -> None:
        """The pipeline resets the node: it follows this one from now on."""
        if self._node is not None:
            _reset_by[self._node] = self._pipeline

    def require(self) -> None:
        """Raise RuntimeError if another pipeline has reset the node since."""
        if self._node is not None and _reset_by[self._node] is not self._pipeline:
            raise RuntimeError(
                f"another pipeline over the same {type(self._node).__name__} has begun, and its "
                "position is one for both: make a PathLister for each"
            )
