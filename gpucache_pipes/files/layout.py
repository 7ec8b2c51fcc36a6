"""The layout of a feature: its tree, and the dtype, shape and byte offset of each leaf."""

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

ALIGNMENT = 16
"""Leaves start at multiples of this many bytes, so that any device can copy 16-byte words."""

_MAX_EMPTY_BYTES = 1 << 48
"""The largest size in bytes of an empty tensor if each dimension of 0 is counted as 1. torch
counts it that way too, and fails beyond 2**63; a batch adds one more dimension."""

_MAX_DEPTH = 200
"""Containers nested in each other. Flattening, building and collating recurse into each level."""

_MAX_PARTS = 1_000_000
"""Containers, leaves and plain values of one feature. A few bytes of a file can describe 2**n
parts by naming one container twice, n times over."""


class Leaf(NamedTuple):
    """One tensor of a feature: `nbytes` contiguous bytes at `offset`, a multiple of `ALIGNMENT`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Branch(NamedTuple):
    """A container in the tree of a feature.

    Attributes:
        kind: the type of the container.
        keys: the keys of a dict; None for a sequence.
        marks: one mark for each key. Marks differ for keys that compare equal (1, 1.0 and True),
            so that equal Branches always describe the same tree.
        children: a Branch for a container; an int for anything else: n >= 0 is leaf n, and n < 0
            is plain value ~n.
    """

    kind: type
    keys: tuple[Hashable, ...] | None
    marks: tuple[Any, ...]
    children: tuple["Tree", ...]


Tree = Branch | int
Location = tuple[Any, Any] | None
"""The location of a part in a feature: (location of its container, key or index in it). None is
the feature itself."""


class Kind:
    """The part of a layout without the shapes of its tensors. Equal kinds are one object.

    Attributes:
        tree: see Layout.
        dtypes: the dtypes of the leaves, in the order of the tree.
    """

    __slots__ = ("__weakref__", "dtypes", "tree")

    def __init__(self, tree: Tree, dtypes: tuple[torch.dtype, ...]) -> None:
        self.tree = tree
        self.dtypes = dtypes


class Layout:
    """The structure of a feature without its bytes. `Layout.of` returns one object for equal ones.

    Attributes:
        tree: the containers, with the positions of leaves and plain values in them.
        kind: the tree and the dtypes.
        leaves: the tensors, in the order of the tree.
        nbytes: bytes of all leaves; a byte budget counts these.
        span: bytes from the first leaf to the end of the last one, alignment gaps included; pages
            hold these.
        plain: number of plain values.
        cost: an estimate of the host bytes that the layout occupies, without the plain values.
    """

    __slots__ = ("__weakref__", "cost", "kind", "leaves", "nbytes", "plain", "span", "tree")

    tree: Tree
    kind: Kind
    leaves: tuple[Leaf, ...]
    nbytes: int
    span: int
    plain: int
    cost: int

    @classmethod
    def of(cls, tree: Tree, tensors: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> "Layout":
        """Return the layout of a tree whose leaves, in its order, have these dtypes and shapes.

        May be called from any thread. The layout is shared: it must not be modified. Raises
        ValueError if no tensor can have one of the shapes.

        >>> layout = Layout.of(0, [(torch.float32, (2, 3))])
        >>> layout.nbytes, layout.leaves[0].offset
        (24, 0)
        >>> Layout.of(0, [(torch.float32, (2, 3))]) is layout
        True
        """
        key = (tree, tuple(tensors))
        known = _known.get(key)
        if known is not None:
            return known
        layout = cls()
        leaves = []
        end = 0
        for dtype, shape in tensors:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            nbytes = counted = dtype.itemsize
            for size in shape:
                nbytes *= size
                counted *= size or 1
            largest = 1 << 63 if nbytes else _MAX_EMPTY_BYTES
            if counted >= largest or min(shape, default=0) < 0:
                raise ValueError(f"a tensor has the impossible shape {list(shape)}")
            leaves.append(Leaf(dtype, shape, offset, nbytes))
            end = offset + nbytes
        dtypes = tuple(dtype for dtype, _ in tensors)
        layout.leaves = tuple(leaves)
        layout.nbytes = sum(leaf.nbytes for leaf in leaves)
        layout.span = end
        layout.plain, branches = _count(tree)
        dimensions = sum(len(leaf.shape) for leaf in leaves)
        layout.cost = 800 + 400 * branches + 600 * len(leaves) + 50 * (dimensions + layout.plain)
        with _interning:
            layout.kind = _kinds.setdefault((tree, dtypes), Kind(tree, dtypes))
            layout.tree = layout.kind.tree
            return _known.setdefault(key, layout)


_known: "WeakValueDictionary[Any, Layout]" = WeakValueDictionary()
_kinds: "WeakValueDictionary[Any, Kind]" = WeakValueDictionary()

# The lookup in `Layout.of` needs no lock, but `setdefault` does: unlike that of a dict it is not
# atomic under the GIL. It is Python code that looks the key up and then assigns. Without the lock,
# two reader threads can both find nothing and get two objects for equal layouts. The lock is
# reentrant, because a signal handler may load a feature while its thread holds the lock.
_interning = threading.RLock()


def _renew_lock() -> None:
    global _interning
    _interning = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that the child does not have may hold the lock
    os.register_at_fork(after_in_child=_renew_lock)


def _count(tree: Tree) -> tuple[int, int]:
    """Return the numbers of plain values and of containers."""
    if isinstance(tree, int):
        return int(tree < 0), 0
    plain, branches = 0, 1
    for child in tree.children:
        if isinstance(child, int):
            plain += child < 0
        else:
            more = _count(child)
            plain += more[0]
            branches += more[1]
    return plain, branches


def flatten(
    feature: Any, leaf: type = torch.Tensor, most_parts: int = _MAX_PARTS
) -> tuple[Tree, list[Any], list[Any]]:
    """Split a feature into its tree, its leaves and its plain values, in the order of the tree.

    dict, OrderedDict, list, tuple and NamedTuple are containers. Objects of the type `leaf` are
    leaves. Everything else is a plain value, and is copied unless it is immutable. A feature has
    at most `most_parts` containers, leaves and plain values, and never over a million.

    >>> tree, tensors, values = flatten({"x": torch.zeros(2), "label": 7})
    >>> tree
    Branch(kind=<class 'dict'>, keys=('x', 'label'), marks=(None, None), children=(0, -1))
    >>> tensors, values
    ([tensor([0., 0.])], [7])

    Raises:
        TypeError: a tensor has no dense bytes (sparse, quantized, nested, meta) or is of a
            subclass, or a container is of another type. The text names its location.
        ValueError: the feature has too many parts, or over 200 nested containers.
    """
    visitor = _Visitor(leaf, min(most_parts, _MAX_PARTS))
    return visitor.visit(feature, None), visitor.tensors, visitor.values


class _Visitor:
    """Collects the tree, the leaves and the plain values of one feature."""

    # A class instead of a recursive function inside `flatten`: such a function refers to itself
    # through its closure, so every call of `flatten` would leave a reference cycle behind. The
    # garbage collector would then take longer than reading the files.

    def __init__(self, leaf: type, most_parts: int) -> None:
        self.leaf = leaf
        self.most_parts = most_parts
        self.parts = 0
        self.depth = 0
        self.tensors: list[Any] = []
        self.values: list[Any] = []

    def visit(self, item: Any, location: Location) -> Tree:
        self.parts += 1
        if self.parts > self.most_parts:
            raise ValueError(
                f"a feature of more than {self.most_parts} parts (containers, tensors and plain "
                "values). The limit is a million, or the size of the pickle in bytes if that is "
                "less; store numbers in tensors, and do not repeat one container many times"
            )
        kind = type(item)
        if isinstance(item, self.leaf):
            if isinstance(item, torch.Tensor):
                _require_dense(item, location)
            self.tensors.append(item)
            return len(self.tensors) - 1
        if kind is dict or kind is OrderedDict:
            keys = tuple(item)
            marks = [None if type(key) is str else _mark(key) for key in keys]
            children = self.visit_all(item.items(), location)
            return Branch(kind, keys, tuple(marks), children)
        if kind is list or kind is tuple or (isinstance(item, tuple) and hasattr(kind, "_fields")):
            return Branch(kind, None, (), self.visit_all(enumerate(item), location))
        _require_plain(item, kind, location)
        self.values.append(copy_value(item))
        return ~(len(self.values) - 1)

    def visit_all(self, items: Iterable[tuple[Any, Any]], location: Location) -> tuple[Tree, ...]:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError(
                f"a feature of more than {_MAX_DEPTH} nested containers; flatten it with load_fn"
            )
        children = tuple([self.visit(item, (location, label)) for label, item in items])
        self.depth -= 1
        return children


_COMPARED_BY_VALUE = (bool, int, bytes, type(None))


def _mark(key: Hashable) -> Any:
    """Return a value that differs for keys that compare equal. Raises TypeError for a tensor."""
    if isinstance(key, torch.Tensor):
        raise TypeError("a key of a dict is a tensor; convert it with load_fn")
    return (type(key), key if type(key) in _COMPARED_BY_VALUE else repr(key))


def _require_plain(item: Any, kind: type, location: Location) -> None:
    """Raise TypeError if `item` is a container of another type, or an array of numpy."""
    holder = isinstance(item, (dict, list, tuple)) and kind is not torch.Size
    if holder or (kind in (set, frozenset) and any(isinstance(i, torch.Tensor) for i in item)):
        raise TypeError(
            f"{_describe(location)} is a {kind.__qualname__}; features are made of dict, "
            "OrderedDict, list, tuple and NamedTuple. Convert it with load_fn"
        )
    if hasattr(item, "__array_interface__") and getattr(item, "ndim", None):
        raise TypeError(
            f"{_describe(location)} is a {kind.__module__}.{kind.__qualname__}; the cache holds "
            "tensors. Convert it with load_fn (torch.from_numpy)"
        )


_IMMUTABLE = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size))


def copy_value(value: Any) -> Any:
    """Return a plain value that shares nothing mutable with `value`."""
    return value if type(value) in _IMMUTABLE else copy.deepcopy(value)


def _describe(location: Location) -> str:
    """Return the text of a location in an error, such as `feature['a'][0]`."""
    labels = []
    while location is not None:
        location, label = location
        labels.append(f"[{label!r}]")
    return "feature" + "".join(reversed(labels)) if labels else "the feature"


def _require_dense(tensor: torch.Tensor, location: Location) -> None:
    """Raise TypeError if the bytes of `tensor` cannot be copied as a dense array."""
    problem = None
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        problem = f"a {type(tensor).__qualname__}"
    elif tensor.layout is not torch.strided or tensor.is_nested:
        problem = f"a tensor of layout {tensor.layout}"
    elif tensor.is_quantized:
        problem = "a quantized tensor"
    elif tensor.is_meta:
        problem = "a meta tensor, which holds no data"
    if problem:
        raise TypeError(
            f"{_describe(location)} is {problem}; the cache holds plain dense tensors. "
            "Convert it with load_fn (to_dense(), dequantize(), as_subclass(torch.Tensor))"
        )


def build(tree: Tree, leaf: Callable[[int], Any], value: Callable[[int], Any]) -> Any:
    """Return the feature of a tree; `leaf(n)` and `value(n)` return its leaves and plain values.

    >>> tree, tensors, values = flatten({"x": torch.zeros(2), "labels": [7, "a"]})
    >>> build(tree, tensors.__getitem__, values.__getitem__)
    {'x': tensor([0., 0.]), 'labels': [7, 'a']}
    """
    if isinstance(tree, int):
        return leaf(tree) if tree >= 0 else value(~tree)
    kind, keys, _, children = tree
    parts = [build(child, leaf, value) for child in children]
    if keys is not None:
        return kind(zip(keys, parts, strict=True))
    if kind is list:
        return parts
    return tuple(parts) if kind is tuple else kind(*parts)
