"""SharedPosition: which of several pipelines over one lister or node it follows."""

from typing import Any
from weakref import ref

_reset_by: "dict[int, tuple[ref[Any], ref[Any]]]" = {}
"""By the identity of a lister or node: that, and the pipeline that has reset it last. No
WeakKeyDictionary: nodes need not be hashable, and may compare equal without being the same."""


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
            key = id(self._node)
            node = ref(self._node, lambda _: _reset_by.pop(key, None))
            _reset_by[key] = node, self._pipeline

    def require(self) -> None:
        """Raise RuntimeError if another pipeline has reset the node since."""
        if self._node is not None and _reset_by[id(self._node)][1] is not self._pipeline:
            raise RuntimeError(
                f"another pipeline over the same {type(self._node).__name__} has begun, and its "
                "position is one for both: make a PathLister for each"
            )
