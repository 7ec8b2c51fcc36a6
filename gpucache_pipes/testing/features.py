"""Hypothesis strategies for features, and an exact comparison of two features."""

from collections import OrderedDict, namedtuple
from typing import Any

import torch
from hypothesis import strategies as st

from gpucache_pipes.testing.simulated_tensor import SimulatedTensor

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
    torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

Pair = namedtuple("Pair", ["first", "second"])


def tensors(max_side: int = 5) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of the usual dtypes, among them 0-dim, empty, transposed, sliced and expanded ones.

    Args:
        max_side: largest size of a dimension, before an expanded one is added.
    """

    @st.composite
    def draw(draw: st.DrawFn) -> torch.Tensor:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, max_side), max_size=3))
        count = 1
        for side in shape:
            count *= side
        numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        raw = torch.randint(0, 100, (count,), generator=numbers, device="cpu")
        tensor = raw.to(dtype).reshape(shape)
        form = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
        if form == "transposed" and len(shape) > 1:
            return tensor.transpose(0, -1)
        if form == "sliced" and shape:
            return tensor[::2]
        return tensor.unsqueeze(0).expand(2, *shape) if form == "expanded" else tensor

    return draw()


def values() -> st.SearchStrategy[Any]:
    """Plain values that `torch.load` accepts with weights_only=True."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**40), 2**40),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.binary(min_size=1, max_size=5),
    )


def features(
    leaf: st.SearchStrategy[Any] | None = None, named_tuples: bool = False, max_leaves: int = 5
) -> st.SearchStrategy[Any]:
    """Features: pytrees of tensors and plain values, with empty and nested containers.

    Args:
        leaf: strategy for tensors and plain values; None means `tensors() | values()`.
        named_tuples: also draw NamedTuples, which `torch.load` refuses with weights_only=True.
        max_leaves: as in `hypothesis.strategies.recursive`.
    """
    keys = st.one_of(st.text(max_size=3), st.integers(0, 3))

    def extend(child: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        mapping = st.dictionaries(keys, child, max_size=3)
        kinds = [
            mapping,
            mapping.map(OrderedDict),
            st.lists(child, max_size=3),
            st.lists(child, max_size=3).map(tuple),
        ]
        if named_tuples:
            kinds.append(st.builds(Pair, child, child))
        return st.one_of(kinds)

    leaves = st.one_of(tensors(), values()) if leaf is None else leaf
    return st.recursive(leaves, extend, max_leaves=max_leaves)


def assert_same(a: Any, b: Any) -> None:
    """Raise AssertionError unless `a` and `b` have equal types, keys in order, and bits.

    Tensors are compared by dtype, shape and bytes, so a NaN equals itself. Strides and the device
    of simulated tensors are ignored.

    >>> assert_same({"x": torch.tensor([0.0])}, {"x": torch.tensor([0.0])})
    >>> assert_same([torch.tensor(0.0)], [torch.tensor(-0.0)])
    Traceback (most recent call last):
        ...
    AssertionError: 0.0 != -0.0
    """
    a, b = (item.cpu() if isinstance(item, SimulatedTensor) else item for item in (a, b))
    assert type(a) is type(b), f"{type(a)} is not {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype}{a.shape} {b.dtype}{b.shape}"
        assert torch.equal(_bits(a), _bits(b)), f"{a} != {b}"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{list(a)} != {list(b)}"
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        # By repr, since a NaN does not equal itself.
        assert a == b or repr(a) == repr(b), f"{a!r} != {b!r}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach().cpu().contiguous()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
