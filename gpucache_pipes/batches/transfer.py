"""Moving tensors of nested containers to a device."""

from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only


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
    if tensor.device.type == "cpu" and device.type != "mps":
        # From pinned memory, so that the host need not wait for the device.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
