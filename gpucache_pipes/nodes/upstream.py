"""The nodes upstream of a node: how sources become nodes, and how nodes are found."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, PinMemory, Prefetcher


def as_node(source: BaseNode[Any] | Iterable[Any]) -> BaseNode[Any]:
    """`source` itself if it is a node, else a node that iterates over it once per epoch.

    Raises:
        TypeError: for a path, since iterating over a str yields characters, and for an object
            that is not iterable.
    """
    if isinstance(source, BaseNode):
        return source
    if isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(f"{source!r} is a path; PathLister({source!r}) lists files")
    if not isinstance(source, Iterable):
        raise TypeError(f"a source is a node or an iterable, not {type(source).__name__}")
    return _OnePass(source) if isinstance(source, Iterator) else IterableWrapper(source)


def is_table(source: Any) -> bool:
    """Whether this is a DataFrame of pandas, or what is like one."""
    return hasattr(source, "columns") and hasattr(source, "iloc")


def is_list(source: Any) -> bool:
    """Whether a source holds paths that can be listed at once: a list, or what is like one.

    Arrays of numpy, Series of pandas and columns of data sets are, and dicts of columns; nodes and
    DataPipes are not.

    Raises:
        TypeError: for a table, and for bytes.
    """
    if is_table(source):
        raise TypeError(
            "the source is a table: give its column of paths, as in PathLister(df['path'], "
            "labels=df), or a dict of several: {'video': df['video'], 'audio': df['audio']}"
        )
    if isinstance(source, bytes):
        raise TypeError(f"paths are str, not {source!r:.80}: os.fsdecode(path) makes it one")
    if isinstance(source, (str, os.PathLike, Sequence, Mapping)):
        return True
    has_items = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return has_items and not isinstance(source, (BaseNode, Dataset))


def as_path(item: Any) -> str:
    """What a stream has yielded, as a path. Raises TypeError if it is none."""
    if not isinstance(item, (str, os.PathLike)):
        raise TypeError(f"the source of a PathLister must yield paths, not {item!r:.200}")
    return os.fspath(item)


class _OnePass(IterableWrapper[Any]):
    """A node over an iterator. A second epoch is an error; it would be silently empty."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        super().__init__(iterator)
        self._read = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if self._read:
            raise RuntimeError(
                "the source is an iterator, which can be read only once; give a list, or another "
                "iterable that can be iterated again for each epoch"
            )
        super().reset(initial_state)

    def next(self) -> Any:
        self._read = True
        return super().next()


def shown(node: Any) -> str:
    """A node in the repr of another one: its own repr, or its class, where it has none."""
    text = repr(node)
    return type(node).__name__.lstrip("_") if " object at 0x" in text else text


def upstream_nodes(node: Any, beyond: Callable[[Any], bool] = lambda node: True) -> Iterator[Any]:
    """`node` and all nodes upstream of it, nearest first, each once even where they form a cycle.

    By the attributes that nodes of torchdata have: `source`, and `source_nodes`, a dict, in nodes
    that mix several sources; and `iterable` of an IterableWrapper, such as a loader.

    Args:
        node: where to begin; any object.
        beyond: whether to look upstream of this node.
    """
    nodes, seen = [node], {id(node)}
    for found in nodes:  # which grows meanwhile
        yield found
        if not beyond(found):
            continue
        wraps = isinstance(found, IterableWrapper)
        source = getattr(found, "iterable" if wraps else "source", None)
        sources = [] if source is None else [source]
        for source in [*sources, *getattr(found, "source_nodes", {}).values()]:
            if id(source) not in seen:
                seen.add(id(source))
                nodes.append(source)


def single_upstream(node: Any) -> Iterator[Any]:
    """The nodes of `upstream_nodes` whose elements reach `node` in their own order.

    It ends at a node that mixes several sources: the order in which that node draws from them is
    not known, and so the order of one source says nothing about the order of its elements.
    """
    return upstream_nodes(node, beyond=lambda found: not hasattr(found, "source_nodes"))


def length_of(node: Any) -> int:
    """How many elements a node yields in an epoch.

    Raises TypeError where that is not known: behind a stream, or a node that may yield more or
    fewer elements than it gets.
    """
    for found in single_upstream(node):
        if hasattr(found, "__len__"):
            return len(found)
        if not isinstance(found, _ONE_TO_ONE):
            break
    raise TypeError(
        f"how many elements {shown(node)} yields is not known in advance; a node of yours that "
        "knows it has __len__, and its source in the attribute `source`"
    )


_ONE_TO_ONE = (IterableWrapper, ParallelMapper, PinMemory, Prefetcher)
"""Nodes that yield one element for each of their source, and have no length themselves."""


def find_upstream(node: Any, name: str) -> Any:
    """The attribute `name` of the nearest node of `single_upstream(node)` that has it, or None."""
    found = (getattr(source, name, None) for source in single_upstream(node))
    return next((value for value in found if value is not None), None)
