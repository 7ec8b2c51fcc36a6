"""Read plans: how to make a feature from the bytes of a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from gpucache_pipes.files.layout import Layout, Leaf


class Extent(NamedTuple):
    """A contiguous range of a file that is also contiguous in the feature.

    Attributes:
        start: its first byte in the file.
        offset: its first byte in the feature.
        nbytes: its size in bytes.
    """

    start: int
    offset: int
    nbytes: int


class StridedExtent(NamedTuple):
    """A range of a file that holds a leaf which is not contiguous there, or of another dtype.

    Attributes:
        start: its first byte in the file.
        nbytes: its size in bytes, gaps between elements included.
        strides: the strides of the leaf within the range, in elements.
        dtype: the dtype of the elements in the file.
        leaf: the leaf, which becomes contiguous in the feature.
    """

    start: int
    nbytes: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    leaf: Leaf


class ReadPlan(NamedTuple):
    """How to make a feature from the bytes of a file. Files with equal headers share one.

    Attributes:
        layout: the layout of the feature.
        values: its plain values, in the order of the layout's tree.
        extents: the leaves that are in the file as in the feature. Empty leaves need no extent.
        strided_extents: the leaves that are not: see StridedExtent.
        cost: an estimate of the host bytes that the plan occupies.
    """

    layout: Layout
    values: tuple[Any, ...]
    extents: tuple[Extent, ...]
    strided_extents: tuple[StridedExtent, ...]
    cost: int = 1000


class Run(NamedTuple):
    """Bytes of a file.

    Attributes:
        start: the first one, as in the file that the form was made of.
        length: how many they are.
        after: how many growing parts lie before them.
    """

    start: int
    length: int
    after: int = 0


class Number(NamedTuple):
    """A number in a file that follows from how much its growing parts have grown.

    It is `base + growth * factor / divisor`, where `growth` is that of the parts `begin` to `end`
    together, in bytes.

    Attributes:
        start: its first byte, see Run.
        width: its bytes, 1 to 4, the least significant one first.
        after: see Run.
        base: what it is in the file that the form was made of.
        begin: the first growing part that counts.
        end: the first one after it that does not.
        factor: see above.
        divisor: see above.
    """

    start: int
    width: int
    after: int
    base: int
    begin: int
    end: int
    factor: int = 1
    divisor: int = 1


class FormParts(NamedTuple):
    """What a file must have in common with another to be read by its plan, or by one like it.

    Files of a form have equal sizes, but for their growing parts.

    Attributes:
        equal: what must be equal, in the order in which it is compared: what differs most often
            between the files of a data set comes first.
        digits: runs of ASCII digits, whatever they are.
        prefixes: runs of equal length that hold one ASCII text without "/" and zeros.
        growing: how many parts grow.
        numbers: what follows from that. The first ones are the sizes of all growing parts but the
            last one, each with the growth of its part alone; they lie after all growing parts.
    """

    equal: Sequence[Run]
    digits: Sequence[Run] = ()
    prefixes: Sequence[Run] = ()
    growing: int = 0
    numbers: Sequence[Number] = ()


class PlanFamily(Protocol):
    """The read plans of files that differ in a few numbers or plain values.

    Attributes:
        parts: what the files have in common, as in one of them.
        size: of that file in bytes.
        content: what its equal runs hold, end to end.
    """

    parts: FormParts
    size: int
    content: bytes

    def plan(self, data: memoryview) -> ReadPlan:
        """The plan of a file of this form. Raises as `PlanReader.plan`."""

    def values(self, plan: ReadPlan, data: memoryview) -> tuple[Any, ...]:
        """The plain values of the file, in the order of the layout's tree. Raises likewise."""
