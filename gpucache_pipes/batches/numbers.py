"""Collates the numbers of features: those of a whole batch go to the device in one copy."""

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from gpucache_pipes.batches.transfer import upload

_KINDS = {int: ("q", torch.int64), float: ("d", torch.float64), bool: ("b", torch.bool)}
"""For each type of number how `array` stores it, and the dtype that default_collate gives it."""


def collate_numbers(
    columns: Sequence[Sequence[Any]], device: torch.device
) -> dict[int, torch.Tensor]:
    """What `default_collate` makes of plain values that are numbers, on the device.

    All columns together take one copy to the device, and no copy if that is the CPU. The tensors do
    not overlap, and may be written in place.

    Args:
        columns: for each plain value of the features those of all features.
        device: where the tensors go.

    Returns:
        By the position of its column a contiguous tensor [B]: int64, float64 or bool. Columns of
        values that are not all int, all float or all bool are left out, and so are those with an
        int beyond 64 bits.
    """
    packed: dict[int, tuple[array[Any], torch.dtype]] = {}
    for at, column in enumerate(columns):
        kinds = set(map(type, column))
        kind = _KINDS.get(kinds.pop()) if len(kinds) == 1 else None
        if kind is not None:
            code, dtype = kind
            try:
                packed[at] = array(code, column), dtype
            except OverflowError:  # default_collate decides about it
                continue
    if not packed:
        return {}
    if _is_host(device):
        # clone: a tensor over the memory of an array could not be resized.
        return {
            at: torch.frombuffer(held, dtype=dtype).clone() for at, (held, dtype) in packed.items()
        }
    return _upload_columns(packed, device)


def _upload_columns(
    packed: dict[int, tuple["array[Any]", torch.dtype]], device: torch.device
) -> dict[int, torch.Tensor]:
    """The columns as rows of one int64 table [columns, B], which holds their bits."""
    count = len(next(iter(packed.values()))[0])
    held = bytearray()
    for values, _ in packed.values():
        held += memoryview(values).cast("B")
        held += bytes((8 - values.itemsize) * count)
    table = upload(torch.frombuffer(held, dtype=torch.int64).view(-1, count), device)
    # `data`: views of one tensor share the counter by which autograd notices that what it has saved
    # was written to. Writing to one column must not count as writing to the others.
    return {
        at: table[row].view(dtype)[:count].data
        for row, (at, (_, dtype)) in enumerate(packed.items())
    }


def _is_host(device: torch.device) -> bool:
    return device.type == "cpu"
