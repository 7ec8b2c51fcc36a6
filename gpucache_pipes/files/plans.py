"""Read plans: how to make a feature from the bytes of a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class FormParts(NamedTuple):
    """What a file must have in common with another, of the same size, to be read by its plan.

    Attributes:
        equal: runs (start, count) that must be equal, those first that differ most often.
        digits: runs of ASCII digits, whatever they are.
        prefixes: runs of equal length that hold one ASCII text without "/" and zeros.
    """

    equal: Sequence[tuple[int, int]]
    digits: Sequence[tuple[int, int]] = ()
    prefixes: Sequence[tuple[int, int]] = ()
