"""What `torch.utils.data.default_collate` makes of features, on the device."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import default_collate

from gpucache_pipes.files import Tree, own


def collate_tree(
    tree: Tree,
    columns: Sequence[Any],
    values: Sequence[Sequence[Any]],
    device: torch.device,
    *,
    as_list: bool = True,
) -> Any:
    """A batch of the shape of `tree`, with `columns` in place of leaves.

    Containers become what default_collate makes of them: a tuple becomes a list, others keep their
    type. Plain values are collated by default_collate; strings come as a list in a dict and as a
    tuple in a sequence.

    Args:
        tree: of the features.
        columns: for each leaf its batch.
        values: for each plain value those of all features.
        device: where numbers go, as tensors [B].
        as_list: whether a plain value that is the whole feature comes as a list.
    """
    if isinstance(tree, int):
        if tree >= 0:
            return columns[tree]
        column = [own(value) for value in values[~tree]]
        samples: Any = column if as_list else tuple(column)
        return to_device(default_collate(samples), device)
    kind, keys, _, children = tree
    parts = [
        collate_tree(child, columns, values, device, as_list=keys is not None) for child in children
    ]
    if keys is not None:
        return kind(zip(keys, parts, strict=True))
    return parts if kind in (list, tuple) else kind(*parts)


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
