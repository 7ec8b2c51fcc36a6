"""Trees and plain values as JSON: what a segment can hold, and nothing that can run code."""

import base64
import json
import math
import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from gpucache_pipes.files.layout import Layout, Tree, flatten

_CONTAINERS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "list": list,
                               "tuple": tuple}  # fmt: skip
_NAMES = {kind: name for name, kind in _CONTAINERS.items()}
_EXACT = 1 << 53
"""Whole numbers below this are exact in every reader of JSON."""


# By name, so that a file cannot make an attribute of torch be looked up.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype)
    and not name.startswith(("q", "bits", "uint1", "int1"))
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class UnpackableError(ValueError):
    """A feature holds what a segment cannot."""


class LayoutKind(NamedTuple):
    """A layout without the sizes of its dimensions.

    Attributes:
        tree: see Layout.
        dtypes: of the leaves.
        ranks: their numbers of dimensions.
    """

    tree: Tree
    dtypes: tuple[torch.dtype, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout) -> "LayoutKind":
        """The kind of a layout."""
        leaves = layout.leaves
        return cls(layout.tree, layout.kind.dtypes, tuple(len(leaf.shape) for leaf in leaves))

    def layout(self, sizes: list[int]) -> Layout:
        """The layout whose dimensions, leaf after leaf, have these sizes. Raises ValueError."""
        if len(sizes) != sum(self.ranks):
            raise ValueError("the sizes are not those of the dimensions")
        tensors, at = [], 0
        for dtype, rank in zip(self.dtypes, self.ranks, strict=True):
            tensors.append((dtype, tuple(sizes[at : at + rank])))
            at += rank
        return Layout.of(self.tree, tensors)


def encode_kind(kind: LayoutKind) -> list[Any]:
    """What `decode_kind` takes, for JSON. Raises UnpackableError."""
    dtypes = [_DTYPE_NAMES.get(dtype) for dtype in kind.dtypes]
    if None in dtypes:
        raise UnpackableError(f"it holds a tensor of {kind.dtypes[dtypes.index(None)]}")
    return [_encode_tree(kind.tree), dtypes, list(kind.ranks)]


def decode_kind(encoded: Any) -> LayoutKind:
    """The inverse of `encode_kind`. Raises ValueError for what that has not made."""
    try:
        tree, names, ranks = encoded
        dtypes = tuple([_DTYPES[name] for name in names])
        # Flattening numbers leaves and values in the order in which the tree has them.
        decoded, leaves, _ = flatten(_decode_tree(tree), _Leaf)
        if not len(leaves) == len(dtypes) == len(ranks) or not all(
            type(rank) is int and 0 <= rank <= 64 for rank in ranks
        ):
            raise ValueError("the tree and its leaves do not agree")
        return LayoutKind(decoded, dtypes, tuple(ranks))
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"the layout cannot be read ({error!r:.100})") from error


class _Leaf:
    """Stands for a leaf in a tree that is decoded."""


def _encode_tree(tree: Tree) -> Any:
    if isinstance(tree, int):
        return 0 if tree >= 0 else 1
    name = _NAMES.get(tree.kind)
    if name is None:
        raise UnpackableError(
            f"it holds a {tree.kind.__qualname__}: packed features are made of dict, OrderedDict, "
            "list and tuple"
        )
    children = [_encode_tree(child) for child in tree.children]
    if tree.keys is None:
        return [name, children]
    return [name, children, [encode_value(key) for key in tree.keys]]


def _decode_tree(encoded: Any) -> Any:
    if type(encoded) is int:
        return _Leaf() if encoded == 0 else None
    kind = _CONTAINERS[encoded[0]]
    children = [_decode_tree(child) for child in encoded[1]]
    if kind in (list, tuple):
        return kind(children)
    made = kind(zip([decode_value(key) for key in encoded[2]], children, strict=True))
    if len(made) != len(children):
        raise ValueError("a key occurs twice")
    return made


def encode_value(value: Any) -> Any:
    """A plain value for JSON; `decode_value` gives one that is equal and of the same type.

    Raises:
        UnpackableError: it is neither None, a number, a str nor bytes, nor a container of these.
    """
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -_EXACT < value < _EXACT else {"int": hex(value)}
    if kind is float:
        # JSON has no infinities, and one NaN.
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is complex:
        return {"complex": [encode_value(value.real), encode_value(value.imag)]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is list:
        return [encode_value(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode_value(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode_value(key), encode_value(item)] for key, item in value.items()]}
    raise UnpackableError(
        f"it holds a {kind.__module__}.{kind.__qualname__}: packed features are made of tensors, "
        "numbers, str, bytes, None, and dict, list and tuple of these"
    )


def decode_value(encoded: Any) -> Any:
    """The inverse of `encode_value`. Raises ValueError, TypeError or KeyError for anything else."""
    kind = type(encoded)
    if kind is list:
        return [decode_value(item) for item in encoded]
    if kind is not dict:
        return encoded
    [(name, inner)] = encoded.items()
    if name == "int":
        return int(inner, 16)
    if name == "float":
        return struct.unpack(">d", bytes.fromhex(inner))[0]
    if name == "complex":
        real, imaginary = inner
        return complex(decode_value(real), decode_value(imaginary))
    if name == "bytes":
        return base64.b64decode(inner, validate=True)
    if name == "tuple":
        return tuple([decode_value(item) for item in inner])
    if name == "dict":
        return {decode_value(key): decode_value(item) for key, item in inner}
    raise ValueError(f"{name!r} is not a kind of value")


def encode_values(values: tuple[Any, ...]) -> bytes:
    """The plain values of a feature, b"" for none. Raises UnpackableError."""
    if not values:
        return b""
    try:
        return json.dumps([encode_value(value) for value in values]).encode()
    except (RecursionError, MemoryError) as error:
        raise UnpackableError(f"its plain values cannot be written ({error!r:.100})") from error


def decode_values(encoded: bytes) -> tuple[Any, ...]:
    """The inverse of `encode_values`. Raises ValueError."""
    if not encoded:
        return ()
    try:
        return tuple([decode_value(value) for value in json.loads(encoded)])
    except (TypeError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
        raise ValueError(f"plain values cannot be read ({error!r:.100})") from error
