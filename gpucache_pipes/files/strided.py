"""Copies leaves that are not contiguous in the file, or have another dtype there.

By `Tensor.copy_`. When it converts, it rounds to the nearest value, and to the even one of two that
are equally near.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.files.layout import ALIGNMENT
from gpucache_pipes.files.plans import StridedExtent
from gpucache_pipes.files.source import spread

_ALONE = 1 << 15
"""Elements up to which torch copies without its threads, which would wait in a spin."""


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides follow each other."""
    return 0 in shape or all(
        size == 1 or stride == expected
        for size, stride, expected in zip(shape, strides, contiguous_strides(shape), strict=True)
    )


def _moved_as(extent: StridedExtent) -> torch.dtype:
    """The dtype of the elements; uint8 for bool that stays bool.

    A file may hold bytes other than 0 and 1, which torch keeps in some copies and not in others.
    """
    same = extent.dtype == extent.leaf.dtype == torch.bool
    return torch.uint8 if same else extent.dtype


def copy_one(data: bytearray, extent: StridedExtent, buffers: Sequence[memoryview]) -> None:
    """Copy a leaf, the bytes of whose range are `data`, to its place in the feature."""
    leaf = extent.leaf
    dtype = _moved_as(extent)
    found = torch.frombuffer(data, dtype=dtype).as_strided(leaf.shape, extent.strides)
    dense = (found if dtype != extent.dtype else found.to(leaf.dtype)).contiguous()
    spread(dense.view(-1).view(torch.uint8), leaf.offset, buffers)


def copy_many(
    source: torch.Tensor,
    starts: npt.NDArray[np.int64],
    extent: StridedExtent,
    target: torch.Tensor,
    places: npt.NDArray[np.int64],
) -> None:
    """Copy a leaf of many files of one form, by few operations.

    Args:
        source: uint8 [n], which holds the files.
        starts: where each file begins in it.
        extent: of the leaf, in each of the files.
        target: uint8 [m].
        places: where each feature begins in it. Pages begin at multiples of 16.
    """
    leaf, dtype = extent.leaf, _moved_as(extent)
    aligned = not (starts % ALIGNMENT).any() and not (places % ALIGNMENT).any()
    if extent.start % dtype.itemsize or not aligned:  # no tensor of the dtype can begin there
        for start, place in zip((starts + extent.start).tolist(), places.tolist(), strict=True):
            data = bytearray(source[start : start + extent.nbytes].numpy().data)
            copy_one(data, extent, [target[place:].numpy().data])
        return
    before = source[: len(source) // ALIGNMENT * ALIGNMENT].view(dtype)
    after = target[: len(target) // ALIGNMENT * ALIGNMENT].view(
        leaf.dtype if dtype == extent.dtype else dtype
    )
    froms = (starts + extent.start) // dtype.itemsize
    tos = (places + leaf.offset) // leaf.dtype.itemsize
    dense = contiguous_strides(leaf.shape)
    elements = max(1, leaf.nbytes // leaf.dtype.itemsize)
    for begin, end in _runs(froms, tos, max(1, _ALONE // elements)):
        step = 1 if end - begin > 1 else 0
        shape = (end - begin, *leaf.shape)
        from_step = int(froms[begin + step] - froms[begin])
        to_step = int(tos[begin + step] - tos[begin])
        one = before.as_strided(shape, (from_step, *extent.strides), int(froms[begin]))
        other = after.as_strided(shape, (to_step, *dense), int(tos[begin]))
        if elements <= _ALONE:
            other.copy_(one)
            continue
        most = max(1, _ALONE * leaf.shape[0] // elements)
        for at in range(0, leaf.shape[0], most):
            other[0, at : at + most].copy_(one[0, at : at + most])


def _runs(
    froms: npt.NDArray[np.int64], tos: npt.NDArray[np.int64], most: int
) -> Iterator[tuple[int, int]]:
    """Stretches of at most so many positions, within each of which both grow by equal steps."""
    from_steps, to_steps = np.diff(froms), np.diff(tos)
    uneven = (from_steps <= 0) | (to_steps <= 0)
    uneven[1:] |= (np.diff(from_steps) != 0) | (np.diff(to_steps) != 0)
    cuts = [0, *(np.flatnonzero(uneven) + 1).tolist(), len(froms)]
    for begin, end in pairwise(cuts):
        for at in range(begin, end, most):
            yield at, min(at + most, end)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
