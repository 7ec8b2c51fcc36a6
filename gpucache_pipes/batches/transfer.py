"""Collating on the host, and moving tensors to a device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import default_collate


def to_device(item: Any, device: torch.device) -> Any:
    """`item` with every CPU tensor in its dicts, lists and tuples moved to `device`.

    The copies are asynchronous, from pinned memory, on the current stream.
    """
    if device.type == "cpu":
        return item
    return tree_map_only(torch.Tensor, partial(_move, device), item)


def first_device(item: Any) -> torch.device | None:
    """The device of the first tensor in `item`, if there is one."""
    leaves = tree_leaves(item)
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)


def _move(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return upload(tensor, device)
    return tensor.to(device, non_blocking=True)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor on the device; the tensor itself if the device is the CPU.

    The copy is asynchronous, from pinned memory, on the current stream: the host waits for nothing.
    """
    if device.type == "cpu":
        return tensor
    if device.type != "mps":
        # The pinned memory is freed before the copy has run. That is safe: its allocator does not
        # reuse a block before the copies from it have finished.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate_on_host(samples: Sequence[Any]) -> Any:
    """`default_collate(samples)`. Numbers become CPU tensors, also with another default device.

    On a device, torch.tensor(numbers) copies from memory that is not pinned, and the host waits.
    """
    with torch.device("cpu"):
        return default_collate(samples)  # type: ignore[arg-type]
