"""How a feature lies in bytes: its tree, and for each leaf dtype, shape and offset."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

ALIGNMENT = 16
"""Leaves start at multiples of this, so that rows can move in 16-byte words on any device."""


_LARGEST_EMPTY = 1 << 48
"""Bytes that an empty tensor would have if its sides of 0 were 1. torch counts these, too, and
fails beyond 2**63; and a batch has one side more."""

_DEEPEST = 200
"""Containers in containers. Some of what is done with a feature nests calls for each of them."""

_MOST_PARTS = 1_000_000
"""Of a feature. A few bytes can describe 2**n parts by naming one part twice, n times over."""


class Leaf(NamedTuple):
    """One tensor of a feature: `nbytes` bytes at `offset`, contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Branch(NamedTuple):
    """A container of the tree.

    A child is a Branch, or an int: n >= 0 is leaf n, n < 0 is plain value ~n. `marks` tells
    keys apart that compare equal (1, 1.0 and True), so that equal Branches are the same tree.
    """

    kind: type
    keys: tuple[Hashable, ...] | None
    marks: tuple[Any, ...]
    children: tuple["Tree", ...]


Tree = Branch | int
Place = tuple[Any, Any] | None
"""Where something stands in a feature: (the place of its container, its key there)."""


class Kind:
    """What layouts share that differ in the shapes of tensors only. Equal ones are one object.

    Attributes:
        tree: see Layout.
        dtypes: of the leaves.
    """

    __slots__ = ("__weakref__", "dtypes", "tree")

    def __init__(self, tree: Tree, dtypes: tuple[torch.dtype, ...]) -> None:
        self.tree = tree
        self.dtypes = dtypes


class Layout:
    """The shape of a feature, without its bytes. Equal layouts are one object (`Layout.of`).

    Attributes:
        tree: where leaves and plain values stand.
        kind: the tree and the dtypes.
        leaves: the tensors, in the order of the tree.
        nbytes: bytes of all leaves; this is what a budget counts.
        span: bytes from the first to the last leaf, alignment gaps included; what pages hold.
        plain: number of plain values.
        cost: about how many bytes it takes to remember it, without its plain values.
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
        """The one layout with this tree and, leaf by leaf, these dtypes and shapes.

        Raises ValueError for a shape that no tensor has.
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
            nbytes = extent = dtype.itemsize
            for size in shape:
                nbytes *= size
                extent *= size or 1
            largest = 1 << 63 if nbytes else _LARGEST_EMPTY
            if extent >= largest or min(shape, default=0) < 0:
                raise ValueError(f"a tensor of an impossible shape: {list(shape)}")
            leaves.append(Leaf(dtype, shape, offset, nbytes))
            end = offset + nbytes
        dtypes = tuple(dtype for dtype, _ in tensors)
        kind = _kinds.get((tree, dtypes))
        if kind is None:
            kind = _kinds.setdefault((tree, dtypes), Kind(tree, dtypes))
        layout.kind = kind
        layout.tree = kind.tree
        layout.leaves = tuple(leaves)
        layout.nbytes = sum(leaf.nbytes for leaf in leaves)
        layout.span = end
        layout.plain, branches = _count(tree)
        sides = sum(len(leaf.shape) for leaf in leaves)
        layout.cost = 800 + 400 * branches + 600 * len(leaves) + 50 * (sides + layout.plain)
        # setdefault decides between two threads that meet a layout at the same moment.
        return _known.setdefault(key, layout)


_known: "WeakValueDictionary[Any, Layout]" = WeakValueDictionary()
_kinds: "WeakValueDictionary[Any, Kind]" = WeakValueDictionary()


def _count(tree: Tree) -> tuple[int, int]:
    """How many plain values and how many containers there are."""
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
    feature: Any, leaf: type = torch.Tensor, most_parts: int = _MOST_PARTS
) -> tuple[Tree, list[Any], list[Any]]:
    """The tree of a feature, its leaves, and its plain values, each in the order of the tree.

    dict, OrderedDict, list, tuple and NamedTuple are containers, objects of the type `leaf` are
    leaves, and everything else is a plain value. Raises TypeError, naming the place, for a
    tensor that has no dense bytes (sparse, quantized, nested, meta), for a tensor subclass, and
    for other kinds of containers; and ValueError for a feature of more parts than `most_parts`,
    or than a million, or of more than 200 containers in one another.
    """
    visitor = _Visitor(leaf, min(most_parts, _MOST_PARTS))
    return visitor.visit(feature, None), visitor.tensors, visitor.values


class _Visitor:
    # No function that calls itself from within another: each call would leave a cycle behind, and
    # the garbage collector would take longer than the reading.

    def __init__(self, leaf: type, most_parts: int) -> None:
        self.leaf = leaf
        self.most_parts = most_parts
        self.parts = 0
        self.depth = 0
        self.tensors: list[Any] = []
        self.values: list[Any] = []

    def visit(self, item: Any, place: Place) -> Tree:
        self.parts += 1
        if self.parts > self.most_parts:
            raise ValueError(
                f"a feature of more than {self.most_parts} parts: too many, or more than its file "
                "has bytes; make it tensors, and name no container more than once"
            )
        kind = type(item)
        if isinstance(item, self.leaf):
            if isinstance(item, torch.Tensor):
                _require_dense(item, place)
            self.tensors.append(item)
            return len(self.tensors) - 1
        if kind is dict or kind is OrderedDict:
            keys = tuple(item)
            marks = [None if type(key) is str else _mark(key) for key in keys]
            children = self.visit_all(item.items(), place)
            return Branch(kind, keys, tuple(marks), children)
        if kind is list or kind is tuple or (isinstance(item, tuple) and hasattr(kind, "_fields")):
            return Branch(kind, None, (), self.visit_all(enumerate(item), place))
        _require_plain(item, kind, place)
        self.values.append(own(item))
        return ~(len(self.values) - 1)

    def visit_all(self, items: Iterable[tuple[Any, Any]], place: Place) -> tuple[Tree, ...]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(f"a feature of more than {_DEEPEST} containers in one another")
        children = tuple([self.visit(item, (place, label)) for label, item in items])
        self.depth -= 1
        return children


_BY_VALUE = (bool, int, bytes, type(None))


def _mark(key: Hashable) -> Any:
    """What tells a key from others that are equal to it. Raises TypeError for a tensor."""
    if isinstance(key, torch.Tensor):
        raise TypeError("a key that is a tensor; convert it with load_fn")
    return (type(key), key if type(key) in _BY_VALUE else repr(key))


def _require_plain(item: Any, kind: type, place: Place) -> None:
    holder = isinstance(item, (dict, list, tuple)) and kind is not torch.Size
    if holder or (kind in (set, frozenset) and any(isinstance(i, torch.Tensor) for i in item)):
        raise TypeError(
            f"{_at(place)} is a {kind.__qualname__}; features are made of dict, OrderedDict, "
            "list, tuple and NamedTuple. Convert it with load_fn"
        )
    if hasattr(item, "__array_interface__") and getattr(item, "ndim", None):
        raise TypeError(
            f"{_at(place)} is a {kind.__module__}.{kind.__qualname__}; a cache holds tensors: "
            "convert it with load_fn (torch.from_numpy)"
        )


_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size))


def own(value: Any) -> Any:
    """A plain value that shares nothing with `value` that anybody could change."""
    return value if type(value) in _ATOMS else copy.deepcopy(value)


def _at(place: Place) -> str:
    """What to call a place in messages. Not made before it is needed: keys may be long."""
    labels = []
    while place is not None:
        place, label = place
        labels.append(f"[{label!r}]")
    return "feature" + "".join(reversed(labels)) if labels else "the feature"


def _require_dense(tensor: torch.Tensor, place: Place) -> None:
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
            f"{_at(place)} is {problem}; a cache holds plain dense tensors. "
            "Convert it with load_fn (to_dense(), dequantize(), as_subclass(torch.Tensor))"
        )


def build(tree: Tree, leaf: Callable[[int], Any], value: Callable[[int], Any]) -> Any:
    """The feature that `tree` describes, with `leaf(n)` and `value(n)` in its places."""
    if isinstance(tree, int):
        return leaf(tree) if tree >= 0 else value(~tree)
    kind, keys, _, children = tree
    parts = [build(child, leaf, value) for child in children]
    if keys is not None:
        return kind(zip(keys, parts, strict=True))
    if kind is list:
        return parts
    return tuple(parts) if kind is tuple else kind(*parts)


def leaf_names(tree: Tree) -> list[str]:
    """What to call each leaf in messages, in order: `['feature']`, `['a'][0]`."""
    names: list[str] = []

    def visit(node: Tree, place: str) -> None:
        if isinstance(node, int):
            if node >= 0:
                names.append(place or "the feature")
        else:
            labels = node.keys if node.keys is not None else range(len(node.children))
            for label, child in zip(labels, node.children, strict=True):
                visit(child, f"{place}[{label!r}]")

    visit(tree, "")
    return names
