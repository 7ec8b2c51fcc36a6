"""Joins leaves whose first dimension may differ: padded, jagged, or as lists.

Two ways lead to the same bits. On the host each sequence is copied by one memmove, several times
as fast as by an index. On devices one gather by an index of elements joins all sequences, so that
the number of operations does not depend on the number of features.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gpucache_pipes.batches.ragged_options import Padded, RaggedOptions, cut_at
from gpucache_pipes.batches.transfer import upload
from gpucache_pipes.device.host_copies import Numbers, clear, move
from gpucache_pipes.device.results import empty
from gpucache_pipes.files import ALIGNMENT, Leaf

_UNITS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
"""Dtypes by which bytes are moved, the widest first."""


def join_ragged(
    mode: str,
    block: torch.Tensor,
    starts: Numbers,
    leaves: Sequence[Leaf],
    options: RaggedOptions,
    fractions: Numbers | None = None,
) -> Any:
    """Join one leaf of all features.

    Args:
        mode: "pad", "jagged" or "list".
        block: uint8, holds the leaf of each feature.
        starts: where it begins in the block, in bytes: a multiple of the bytes of a row.
        leaves: of each feature; they differ in their first dimension only.
        options: padding_value, pad_to_multiple and max_length.
        fractions: where each feature is cut that is longer than that, see RaggedOptions.

    Returns:
        A Padded, or a torch.nested tensor, in new memory; or for "list" views of the block.

    Raises:
        RuntimeError: for a padding_value that the dtype does not have.
    """
    if options.max_length is not None:
        most = options.max_length
        if fractions is not None:
            begins = [
                cut_at(leaf.shape[0], most, fraction)
                for leaf, fraction in zip(leaves, fractions.tolist(), strict=True)
            ]
            starts = starts + _row_bytes(leaves[0]) * np.array(begins)
        leaves = [_cut(leaf, most) for leaf in leaves]
    if mode == "list":
        return [
            block[start : start + leaf.nbytes].view(leaf.dtype).view(leaf.shape)
            for start, leaf in zip(starts.tolist(), leaves, strict=True)
        ]
    lengths = np.array([leaf.shape[0] for leaf in leaves])
    join_all = _pad if mode == "pad" else _make_jagged
    return join_all(block, starts, lengths, leaves[0], options)


def _cut(leaf: Leaf, length: int) -> Leaf:
    """The first `length` rows of a leaf."""
    if leaf.shape[0] <= length:
        return leaf
    shape = (length, *leaf.shape[1:])
    return leaf._replace(shape=shape, nbytes=length * _row_bytes(leaf))


def stack_scattered(block: torch.Tensor, starts: Numbers, leaf: Leaf) -> torch.Tensor:
    """[B, *shape] of a leaf that begins at `starts` (bytes) in `block` (uint8), in new memory."""
    if is_on_host(block) and leaf.nbytes >= _LONG:
        out = empty((len(starts), *leaf.shape), leaf.dtype)
        sizes = np.full(len(starts), leaf.nbytes)
        targets = out.data_ptr() + leaf.nbytes * np.arange(len(starts))
        move(targets, block.data_ptr() + starts, sizes)
        return out
    units, size, count = _units_of(block, leaf.nbytes)
    if is_on_host(block):
        table = units.numpy()[(starts // size)[:, None] + np.arange(count)]
        return torch.from_numpy(table).view(leaf.dtype).view(len(starts), *leaf.shape)
    [base] = _upload([starts // size], block.device)
    index = torch.arange(count, device=block.device) + base.unsqueeze(1)
    return units[index].view(leaf.dtype).view(len(starts), *leaf.shape)


_LONG = 256
"""Bytes of a leaf that are copied faster by memmove than by an index."""


def _units_of(block: torch.Tensor, nbytes: int) -> tuple[torch.Tensor, int, int]:
    """`block` in the widest elements that divide `nbytes`, their size, and their number in it."""
    unit = next(dtype for dtype in _UNITS if nbytes % dtype.itemsize == 0)
    whole = len(block) // unit.itemsize * unit.itemsize
    return block[:whole].view(unit), unit.itemsize, nbytes // unit.itemsize


def _row_bytes(leaf: Leaf) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.shape[1:])


def _pad(
    block: torch.Tensor,
    starts: Numbers,
    lengths: Numbers,
    leaf: Leaf,
    options: RaggedOptions,
) -> Padded:
    multiple = options.pad_to_multiple
    longest = -(-int(lengths.max()) // multiple) * multiple
    shape = (len(starts), longest, *leaf.shape[1:])
    if is_on_host(block):
        values = _pad_on_host(block, starts, lengths, leaf, shape, options.padding_value)
        in_sequence = np.arange(longest) < lengths[:, None]
        return Padded(values, torch.from_numpy(lengths), torch.from_numpy(in_sequence))
    units, size, each = _units_of(block, _row_bytes(leaf))
    count = longest * each
    table = _upload([starts // size, lengths], block.device)
    base, length = table[0].unsqueeze(1), table[1].unsqueeze(1)
    mask = torch.arange(longest, device=block.device) < length
    if count == 0 or not lengths.any():
        values = torch.empty(shape, dtype=leaf.dtype, device=block.device)
    else:
        index = torch.arange(count, device=block.device) + base
        # After its end, each sequence reads bytes that are not its own. They are filled below.
        index.clamp_(max=len(units) - 1)
        values = units[index].view(leaf.dtype).view(shape)
    fill(values, options.padding_value, ~mask)
    return Padded(values, table[1], mask)


def _pad_on_host(
    block: torch.Tensor,
    starts: Numbers,
    lengths: Numbers,
    leaf: Leaf,
    shape: tuple[int, ...],
    padding_value: float,
) -> torch.Tensor:
    room, sizes = shape[1] * _row_bytes(leaf), lengths * _row_bytes(leaf)
    zeros = _is_zero(padding_value)
    # Not where sequences are cut: there they begin at any row.
    if zeros and room and (sizes == room).all() and not (starts % ALIGNMENT).any():
        return stack_scattered(block, starts, leaf)
    values = empty(shape, leaf.dtype)
    targets = values.data_ptr() + room * np.arange(len(starts))
    if zeros:
        clear(targets + sizes, room - sizes)
    else:
        fill(values, padding_value)
    move(targets, block.data_ptr() + starts, sizes)
    return values


def fill(values: torch.Tensor, value: float, where: torch.Tensor | None = None) -> None:
    """Fill `values` [B, T, *rest] with `value`, only where `where` [B, T] is True if it is given.

    This writes the bits of the value as integers: many dtypes have no fill operation, and which
    ones have depends on the device. Raises RuntimeError for a value that the dtype does not have.
    """
    bits = _BITS.get(values.dtype.itemsize)
    if bits is not None:
        value = _bits_of(value, values.dtype, bits)
        values = values.view(bits)
    if where is not None:
        values.masked_fill_(where.view(*where.shape, *[1] * (values.dim() - 2)), value)
    elif is_on_host(values):
        values.numpy().fill(value)
    else:
        values.fill_(value)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits_of(value: float, dtype: torch.dtype, bits: torch.dtype) -> int:
    if _is_zero(value):
        return 0
    one = torch.empty(1, dtype=dtype, device="cpu")
    try:
        one.fill_(value)
    except RuntimeError as error:
        raise RuntimeError(f"padding_value={value!r} cannot be a {dtype}: {error}") from error
    return int(one.view(bits).item())


def _is_zero(value: float) -> bool:
    """Whether all bits of the value are 0 in every dtype."""
    return value == 0 and math.copysign(1, value) > 0


def is_on_host(block: torch.Tensor) -> bool:
    """Whether bytes may be copied by address. Tensors of a simulated device have no addresses."""
    return block.device.type == "cpu" and type(block) is torch.Tensor


def _make_jagged(
    block: torch.Tensor,
    starts: Numbers,
    lengths: Numbers,
    leaf: Leaf,
    options: RaggedOptions,
) -> torch.Tensor:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(offsets[-1]), *leaf.shape[1:])
    if is_on_host(block):
        values, size = empty(shape, leaf.dtype), _row_bytes(leaf)
        move(values.data_ptr() + offsets[:-1] * size, block.data_ptr() + starts, lengths * size)
        ends = torch.from_numpy(offsets)
    else:
        units, size, each = _units_of(block, _row_bytes(leaf))
        shift = starts // size - offsets[:-1] * each
        table = _upload([[*shift, 0], [*lengths * each, 0], offsets], block.device)
        index = torch.arange(shape[0] * each, device=block.device)
        index += torch.repeat_interleave(table[0], table[1], output_size=shape[0] * each)
        values = units[index].view(leaf.dtype).view(shape)
        ends = table[2]
    return jagged_tensor(values, ends, lengths.tolist())


def jagged_tensor(
    values: torch.Tensor, offsets: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """The torch.nested tensor of sequences of `lengths`, which lie end to end in `values`.

    Args:
        values: [sum of lengths, *rest].
        offsets: int64 [B + 1], where each sequence begins, and where the last one ends.
        lengths: of the sequences.
    """
    # A nested tensor keeps the least and the largest length as tensors without elements. Torch
    # makes them on the default device.
    with torch.device("cpu"):
        return torch.nested.nested_tensor_from_jagged(
            values, offsets=offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )


def _upload(rows: Sequence[Any], device: torch.device) -> torch.Tensor:
    """int64 [rows, columns] on the device."""
    return upload(torch.from_numpy(np.array(rows, np.int64)), device)
