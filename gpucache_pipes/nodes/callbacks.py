"""Calls of the user's functions: path_fn, join_fn, collate_fn, on_error and the like."""

from collections.abc import Callable
from typing import Any


def guarded(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """`function(*arguments)`, with its StopIteration turned into a RuntimeError.

    A StopIteration that leaves a node's `next()` ends the epoch without a word.

    Args:
        function: the user's.
        name: of the parameter that took the function, for the message.
        arguments: of the function.

    Raises:
        RuntimeError: if the function raises StopIteration. Other exceptions pass through.

    >>> guarded(int, "path_fn", "7")
    7
    >>> guarded(next, "path_fn", iter([]))
    Traceback (most recent call last):
    RuntimeError: path_fn raised StopIteration, which would end the epoch
    """
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError(f"{name} raised StopIteration, which would end the epoch") from error


def call(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """`guarded`, for a function whose result is an element of the pipeline.

    Raises:
        RuntimeError: as `guarded`.
        TypeError: if the function returns None: nodes of torchdata take None for the end.
    """
    result = guarded(function, name, *arguments)
    if result is None:
        raise TypeError(f"{name} returned None, which a torchdata pipeline cannot carry")
    return result
