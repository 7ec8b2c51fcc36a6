"""The read plans of `.pt` files that differ in sizes and plain values only."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gpucache_pipes.files.layout import Layout, Tree
from gpucache_pipes.files.plans import Extent, FormParts, ReadPlan, StridedExtent

_MOST_PLANS = 1024
_FLOAT = struct.Struct(">d")


class Token(NamedTuple):
    """A number or a string in a pickle.

    Attributes:
        code: the name of its opcode.
        start: the first byte of its value, in the pickle.
        width: bytes of its value.
        value: what it is.
    """

    code: str
    start: int
    width: int
    value: Any


def decode(code: str, data: memoryview) -> Any:
    """The value of a token that has these bytes. Raises ValueError."""
    if code == "BINUNICODE":
        return str(data, "utf-8", "surrogatepass")
    if code == "BINFLOAT":
        return _FLOAT.unpack(data)[0]
    return int.from_bytes(data, "little", signed=code in ("BININT", "LONG1"))


class GrowingLeaf(NamedTuple):
    """A leaf, as it is in the first file of its family.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        part: the growing part that it is; None if it always has this shape.
        dimension: the dimension that grows.
        row: bytes by which it grows if this dimension grows by one.
        start: the first byte in the file, and
        after: the growing parts before it.
        strided: how to read it if it is not contiguous in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    part: int | None
    dimension: int
    row: int
    start: int
    after: int
    strided: StridedExtent | None


class PtFamily:
    """A PlanFamily, see there. For any number of threads.

    Args:
        parts: what the files have in common.
        size: bytes of the first file.
        content: what its equal runs hold.
        tree: see Layout.
        leaves: in the order of the tree.
        values: the plain values of the first file.
        fields: those that differ: which value it is, and its token, whose start is that in the
            file.
        select: makes the plan that is followed of one that reads all leaves.
    """

    def __init__(
        self,
        parts: FormParts,
        size: int,
        content: bytes,
        tree: Tree,
        leaves: Sequence[GrowingLeaf],
        values: tuple[Any, ...],
        fields: dict[int, Token],
        select: Callable[[ReadPlan], ReadPlan],
    ) -> None:
        self.parts = parts
        self.size = size
        self.content = content
        self._tree = tree
        self._leaves = leaves
        self._values = values
        self._fields = fields
        self._select = select
        # By the growth of each part. Threads share it: single operations are atomic, and a plan
        # that is lost is made again.
        self._plans: dict[tuple[int, ...], ReadPlan] = {}

    def plan(self, data: memoryview) -> ReadPlan:
        """See PlanFamily. The values of the plan are the numbers of the values."""
        growth = self._growth(data)
        plan = self._plans.get(growth)
        if plan is None:
            plan = self._select(self._make_plan(growth))
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[growth] = plan
        return plan

    def whole_plan(self, data: memoryview) -> ReadPlan:
        """The plan without `select`."""
        return self._make_plan(self._growth(data))

    def values(self, plan: ReadPlan, data: memoryview) -> tuple[Any, ...]:
        """See PlanFamily."""
        fields, values = self._fields, self._values
        if not fields:
            return tuple([values[number] for number in plan.values])
        found = []
        for number in plan.values:
            field = fields.get(number)
            if field is None:
                found.append(values[number])
            else:
                code, start, width, _ = field
                found.append(decode(code, data[start : start + width]))
        return tuple(found)

    def _growth(self, data: memoryview) -> tuple[int, ...]:
        """By how many bytes each part of this file has grown."""
        if not self.parts.growing:
            return ()
        left = everything = len(data) - self.size
        growth = []
        for number in self.parts.numbers[: self.parts.growing - 1]:
            start = number.start + everything
            size = int.from_bytes(data[start : start + number.width], "little")
            growth.append(size - number.base)
            left -= growth[-1]
        return (*growth, left)

    def _make_plan(self, growth: tuple[int, ...]) -> ReadPlan:
        tensors = []
        for leaf in self._leaves:
            shape = leaf.shape
            if leaf.part is not None:
                grown = shape[leaf.dimension] + growth[leaf.part] // leaf.row
                shape = (*shape[: leaf.dimension], grown, *shape[leaf.dimension + 1 :])
            tensors.append((leaf.dtype, shape))
        layout = Layout.of(self._tree, tensors)
        extents, strided = [], []
        for leaf, placed in zip(self._leaves, layout.leaves, strict=True):
            start = leaf.start + sum(growth[: leaf.after])
            if leaf.strided is not None:
                strided.append(leaf.strided._replace(start=start, leaf=placed))
            elif placed.nbytes:
                extents.append(Extent(start, placed.offset, placed.nbytes))
        numbers = tuple(range(len(self._values)))
        return ReadPlan(layout, numbers, tuple(extents), tuple(strided), layout.cost)
