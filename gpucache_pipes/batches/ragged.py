"""Joins leaves whose first dimension may differ: padded, jagged, or as lists.

Two ways lead to the same bits. On the host each sequence is copied by one memmove, several times
as fast as by an index. On devices one gather by an index of elements joins all sequences, so that
the number of operations does not depend on the number of features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gpucache_pipes.batches.transfer import upload
from gpucache_pipes.device.host_copies import Numbers, clear, move
from gpucache_pipes.device.results import empty
from gpucache_pipes.files import Leaf
from gpucache_pipes.units import positive_int

MODES = ("error", "pad", "jagged", "list")
"""How a leaf of all features is joined; see GPUCollator."""

_UNITS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
"""Dtypes by which bytes are moved, the widest first."""


class Padded(NamedTuple):
    """Sequences of different lengths as one tensor.

    Attributes:
        values: [B, T, *rest]. T is the largest length, rounded up to pad_to_multiple. After its
            end, each sequence is filled with the padding value.
        lengths: int64 [B].
        mask: bool [B, T], True where `values` holds an element of a sequence, False where it
            holds padding.
    """

    values: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class RaggedOptions:
    """How to join leaves whose first dimension may differ from feature to feature.

    The type of a collated batch follows from these options alone, never from the shapes in this
    batch or in earlier ones: a run that is interrupted and resumed gives the same types as one
    that is not.

    Args:
        modes: one of MODES for all leaves, or a dict of them by the names of leaves. One mode
            other than "error" joins every leaf of at least one dimension that way, in every
            batch, even where all lengths are equal; tensors without dimensions are stacked. With
            a dict, leaves that it does not name are stacked, or are an error where shapes differ.
        padding_value: fills what lies after the end of a padded sequence.
        pad_to_multiple: the length of a padded batch is rounded up to a multiple of this.

    Raises:
        ValueError: an unknown mode, or pad_to_multiple < 1.

    >>> RaggedOptions("pad").mode_of("['frames']", differs=False)
    'pad'
    >>> RaggedOptions("pad").mode_of("['label']", differs=False, dimensions=0)
    >>> RaggedOptions({"frames": "jagged"}).mode_of("['frames']", differs=False)
    'jagged'
    >>> RaggedOptions({"frames": "jagged"}).mode_of("['mask']", differs=True)
    'error'
    """

    modes: str | Mapping[str, str] = "error"
    padding_value: float = 0.0
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        positive_int("pad_to_multiple", self.pad_to_multiple)
        for mode in self._all_modes():
            if mode not in MODES:
                raise ValueError(f"ragged={mode!r} is not known; there are: {', '.join(MODES)}")

    def _all_modes(self) -> list[str]:
        return [self.modes] if isinstance(self.modes, str) else list(self.modes.values())

    @property
    def copies(self) -> bool:
        """Whether no result is a view of the memory that it was made from."""
        return "list" not in self._all_modes()

    def mode_of(self, name: str, differs: bool, dimensions: int = 1) -> str | None:
        """How to join one leaf of all features of a batch; None to stack it.

        Args:
            name: the leaf's, as `leaf_names` gives it: "['frames']".
            differs: whether its shape is not the same in all features.
            dimensions: of the leaf in the first feature. Only 0 makes a difference.
        """
        if not isinstance(self.modes, str):
            # A leaf of a plain dict may be named by its key.
            key = name[2:-2] if name.startswith("['") and name.count("[") == 1 else name
            mode = self.modes.get(name) or self.modes.get(key)
            return mode if mode is not None else "error" if differs else None
        if self.modes == "error" or not dimensions:
            return self.modes if differs else None
        return self.modes


def join_ragged(
    mode: str,
    block: torch.Tensor,
    starts: Numbers,
    leaves: Sequence[Leaf],
    options: RaggedOptions,
) -> Any:
    """Join one leaf of all features.

    Args:
        mode: "pad", "jagged" or "list".
        block: uint8, holds the leaf of each feature.
        starts: where it begins in the block, in bytes: a multiple of the bytes of a row.
        leaves: of each feature; they differ in their first dimension only.
        options: padding_value and pad_to_multiple.

    Returns:
        A Padded, or a torch.nested tensor, in new memory; or for "list" views of the block.

    Raises:
        RuntimeError: for a padding_value that the dtype does not have.
    """
    if mode == "list":
        return [
            block[start : start + leaf.nbytes].view(leaf.dtype).view(leaf.shape)
            for start, leaf in zip(starts.tolist(), leaves, strict=True)
        ]
    lengths = np.array([leaf.shape[0] for leaf in leaves])
    join_all = _pad if mode == "pad" else _make_jagged
    return join_all(block, starts, lengths, leaves[0], options)


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
    if zeros and room and (sizes == room).all():
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
