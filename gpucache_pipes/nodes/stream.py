"""Paths from a source whose order is not known in advance."""

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torchdata.nodes import BaseNode, IterableWrapper


class PathStream:
    """Reads a node or an iterable of paths through, once in each epoch."""

    def __init__(self, source: Iterable[Any]) -> None:
        if not isinstance(source, Iterable):
            raise TypeError(
                "a source is a directory, a glob, or yields paths; "
                f"{type(source).__name__} is none of these"
            )
        self._node = source if isinstance(source, BaseNode) else IterableWrapper(source)
        # What is its own iterator can be read through once: another epoch would be empty.
        self._one_pass = not isinstance(source, BaseNode) and iter(source) is source
        self._used = False

    def start(self, state: dict[str, Any] | None) -> None:
        """Begin a new pass, or go on where `state` was taken."""
        if self._one_pass and self._used:
            raise RuntimeError(
                "the source of this PathLister is an iterator, which can be read through only "
                "once; give a list, or an iterable that begins anew"
            )
        self._node.reset(state)

    def take(self, count: int) -> list[str]:
        """The next paths, fewer at the end."""
        self._used = True
        return [_path(item) for item in islice(self._node, count)]

    def state(self) -> dict[str, Any]:
        """For `start`."""
        state: dict[str, Any] = self._node.state_dict()
        return state


def _path(item: Any) -> str:
    if not isinstance(item, (str, os.PathLike)):
        raise TypeError(f"the source of a PathLister must yield paths, not {item!r:.200}")
    return os.fspath(item)
