"""Nodes over what users give, and calls of what users wrote."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchdata.nodes import BaseNode, IterableWrapper


def as_node(source: BaseNode[Any] | Iterable[Any]) -> BaseNode[Any]:
    """`source`, if it is a node, or a node that reads it through once in each epoch."""
    if isinstance(source, BaseNode):
        return source
    if isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(f"{source!r} is a path; PathLister({source!r}) lists files")
    if not isinstance(source, Iterable):
        raise TypeError(f"a source is a node or an iterable, not {type(source).__name__}")
    return _OnePass(source) if isinstance(source, Iterator) else IterableWrapper(source)


class _OnePass(IterableWrapper[Any]):
    """An iterator: there is one pass, and a second one would be an epoch that is empty."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        super().__init__(iterator)
        self._read = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if self._read:
            raise RuntimeError(
                "the source is an iterator, which can be read through only once; give a list, "
                "or an iterable that begins anew"
            )
        super().reset(initial_state)

    def next(self) -> Any:
        self._read = True
        return super().next()


def guarded(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """`function(*arguments)`; its StopIteration would end the epoch in silence."""
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError(f"{name} raised StopIteration, which would end the epoch") from error


def call(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """The same where the result is what a pipeline carries: None would end the epoch, too."""
    result = guarded(function, name, *arguments)
    if result is None:
        raise TypeError(f"{name} returned None, which a torchdata pipeline cannot carry")
    return result
