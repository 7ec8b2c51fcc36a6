"""A batch of features in device memory: FeatureBatch and its two kinds."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, TypeGuard, overload

import numpy as np
import torch

from gpucache_pipes.batches.numbers import collate_numbers
from gpucache_pipes.batches.ragged import is_on_host, join_ragged, stack_scattered
from gpucache_pipes.batches.ragged_options import RaggedOptions
from gpucache_pipes.batches.transfer import collate_on_host, to_device
from gpucache_pipes.batches.unlike import collate_unlike
from gpucache_pipes.device.host_copies import Numbers
from gpucache_pipes.files import (
    Branch,
    Layout,
    Leaf,
    PathLike,
    Paths,
    Tree,
    build,
    copy_value,
    leaf_names,
)

_NO_FAULT_OF_FEATURES: tuple[type[Exception], ...] = tuple(
    kind
    for kind in (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", None))
    if kind is not None
)
"""Errors of the machine. Programs catch them by their type, and no feature is to blame."""

_STACKED = RaggedOptions()


class FeatureBatch(Sequence[Any]):
    """A sequence of features whose bytes were gathered on the device.

    `batch[i]` is feature i as it was saved; its tensors are views of the gathered memory, which
    belongs to this batch alone. Writing to them changes this batch and nothing else. A batch holds
    nothing of the store that made it.

    Made by `GPUFeatureStore.get_batch` and `GPUPrefetcher`, as a `ColumnBatch` if all features have
    one layout and fit into a page each, else as a `PageBatch`.

    Attributes:
        device: where the tensors are.
    """

    def __init__(
        self,
        device: torch.device,
        paths: Sequence[PathLike],
        layouts: Sequence[Layout],
        values: Sequence[tuple[Any, ...]],
    ) -> None:
        self.device = device
        self._paths = paths
        # One layout for all features, or one for each; plain values only where there are any.
        self._layouts = layouts
        self._values = values

    @property
    def paths(self) -> list[str]:
        """The file of each feature: as it was requested, made absolute."""
        if isinstance(self._paths, Paths):
            return self._paths.absolute()
        return [str(path) for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        layout = self._layouts[number if len(self._layouts) > 1 else 0]
        values = self._values[number] if self._values else ()
        return build(
            layout.tree,
            lambda n: self._view(n, layout.leaves[n], number),
            lambda n: copy_value(values[n]),
        )

    def __iter__(self) -> Iterator[Any]:
        """The features in order. Dicts of tensors take fewer steps than by `batch[i]`."""
        tree = self._layouts[0].tree if self._layouts else 0
        if len({layout.kind for layout in self._layouts}) > 1 or not _is_dict_of_leaves(tree):
            return map(self.__getitem__, range(len(self)))
        view, numbers = self._view, range(len(self))
        leaves = zip(*(layout.leaves for layout in self._layouts), strict=True)
        columns = [
            map(view, repeat(at), of_all if len(of_all) > 1 else repeat(of_all[0]), numbers)
            for at, of_all in enumerate(leaves)
        ]
        return (dict(zip(tree.keys, row, strict=True)) for row in zip(*columns, strict=True))

    @abstractmethod
    def _view(self, at: int, leaf: Leaf, number: int) -> torch.Tensor:
        """Leaf `at` of feature `number`, as a view. `leaf` is where its layout has it."""

    @abstractmethod
    def _stack(self, at: int, leaves: Sequence[Leaf]) -> torch.Tensor:
        """[B, *shape] of leaf `at`, which has one shape in all features.

        `leaves` has that leaf of each layout: one if the features have one layout.
        """

    @abstractmethod
    def _bytes_of(self, at: int, leaves: Sequence[Leaf]) -> tuple[torch.Tensor, Numbers]:
        """Memory (uint8) that holds leaf `at` of every feature, and where each of them starts."""

    def __repr__(self) -> str:
        return f"FeatureBatch({len(self)} features on {self.device})"

    def collate(self, ragged: RaggedOptions | str | Mapping[str, str] | None = None) -> Any:
        """What `torch.utils.data.default_collate` makes of the features, on the device.

        Tensors are stacked to [B, *shape], contiguous; numbers become device tensors [B], by one
        copy to the device for all of them. For a ColumnBatch tensors take no device operation, else
        a few for each leaf. `ragged` says how to join leaves whose first dimension differs.

        Raises RuntimeError, naming leaf, shapes and files, where shapes differ in any other way;
        TypeError or RuntimeError where default_collate does; ValueError for an empty batch;
        torch.OutOfMemoryError, torch.AcceleratorError and MemoryError as they are.
        """
        if not self._paths:
            raise ValueError("an empty batch cannot be collated")
        options = _STACKED if ragged is None else RaggedOptions.of(ragged)
        try:
            return self._collate(options)
        except _NO_FAULT_OF_FEATURES:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and self.paths[0] in str(error):
                raise
            kind = TypeError if isinstance(error, TypeError) else RuntimeError
            raise kind(
                f"cannot collate the features of {self.paths[0]!r} and {len(self) - 1} more: "
                f"{type(error).__name__}: {error}; pass a collate_fn, or make them alike"
            ) from error

    def _collate(self, ragged: RaggedOptions) -> Any:
        layout = self._layouts[0]
        if any(other.kind is not layout.kind for other in self._layouts):
            self._require_keys()
            return to_device(collate_unlike(list(self), ragged), self.device)
        names = leaf_names(layout.tree)
        cuts = ragged.fractions(len(self))
        return self._collate_columns(
            [self._column(at, name, ragged, cuts) for at, name in enumerate(names)]
        )

    def _require_keys(self) -> None:
        """Raise RuntimeError if a feature lacks a key that the first one has."""
        first = self._layouts[0].tree
        if not isinstance(first, Branch) or first.keys is None:
            return
        for number, layout in enumerate(self._layouts):
            tree = layout.tree
            held = tree.keys if isinstance(tree, Branch) and tree.keys is not None else ()
            for key in first.keys:
                if key not in held:
                    raise RuntimeError(
                        f"cannot collate: the feature of {self.paths[number]!r} lacks the key "
                        f"{key!r}, which that of {self.paths[0]!r} has; keys= of the store keeps "
                        "what all have, and a collate_fn may do anything"
                    )

    def _collate_columns(self, columns: Sequence[Any]) -> Any:
        tree = self._layouts[0].tree
        if not self._layouts[0].plain:
            return _collate_tree(tree, columns, (), {}, self.device)
        values = list(zip(*self._values, strict=True))
        numbers = collate_numbers(values, self.device)
        return _collate_tree(tree, columns, values, numbers, self.device)

    def _column(self, at: int, name: str, ragged: RaggedOptions, cuts: Numbers | None) -> Any:
        """Leaf `at` of all features, stacked or joined."""
        leaves = [layout.leaves[at] for layout in self._layouts]
        first, shapes = leaves[0], [leaf.shape for leaf in leaves]
        differs = shapes.count(first.shape) < len(shapes)
        mode = ragged.mode_of(name, differs, len(first.shape)) if name else None
        if mode is None or (mode == "error" and not differs):
            return self._stack(at, leaves)
        rest = first.shape[1:]
        for number, shape in enumerate(shapes):
            if differs and not first.shape and shape == first.shape:  # show one that differs
                continue
            if not shape or shape[1:] != rest or (mode == "error" and shape != first.shape):
                raise RuntimeError(
                    f"cannot {'stack' if mode == 'error' else mode} {name}: shape "
                    f"{list(first.shape)} in {self.paths[0]!r}, {list(shape)} in "
                    f'{self.paths[number]!r}; ragged="pad", "jagged" or "list" joins '
                    "sequences of different lengths; for anything else pass a collate_fn"
                    + ragged.hint(leaf_names(self._layouts[0].tree))
                )
        leaves = leaves * (len(self) if len(leaves) == 1 else 1)
        return join_ragged(mode, *self._bytes_of(at, leaves), leaves, ragged, cuts)


class ColumnBatch(FeatureBatch):
    """Features of one layout, gathered leaf by leaf: feature i is row i of each column.

    Args:
        columns: for each leaf a contiguous tensor [B, *shape].
        paths, values: as in FeatureBatch; `values` is empty if the layout has no plain values.
    """

    def __init__(
        self,
        device: torch.device,
        paths: Sequence[PathLike],
        layout: Layout,
        values: Sequence[tuple[Any, ...]],
        columns: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(device, paths, (layout,), values)
        self._columns = columns

    def _view(self, at: int, leaf: Leaf, number: int) -> torch.Tensor:
        return self._columns[at][number]

    def _collate(self, ragged: RaggedOptions) -> Any:
        stacked = ragged.modes == "error"
        return self._collate_columns(self._columns) if stacked else super()._collate(ragged)

    def _stack(self, at: int, leaves: Sequence[Leaf]) -> torch.Tensor:
        return self._columns[at]

    def _bytes_of(self, at: int, leaves: Sequence[Leaf]) -> tuple[torch.Tensor, Numbers]:
        block = self._columns[at].reshape(-1).view(torch.uint8)
        return block, leaves[0].nbytes * np.arange(len(self))


class PageBatch(FeatureBatch):
    """Features of any layouts, gathered by whole pages: feature i is one stretch of a block.

    Args:
        layouts: one for all features, or one for each.
        paths, values: as in FeatureBatch.
        block: uint8; holds the bytes of all features.
        starts: where each feature begins in `block`: multiples of ALIGNMENT. With one layout all
            of them take equally many bytes of a contiguous block. What follows them is ignored.
    """

    def __init__(
        self,
        device: torch.device,
        paths: Sequence[PathLike],
        layouts: Sequence[Layout],
        values: Sequence[tuple[Any, ...]],
        block: torch.Tensor,
        starts: Numbers | Sequence[int],
    ) -> None:
        super().__init__(device, paths, layouts, values)
        self._block = block
        self._starts = np.asarray(starts, np.int64)
        # By dtype. One view for each leaf takes half the time of a slice, a dtype and a shape.
        self._typed: dict[torch.dtype, torch.Tensor] = {}

    def _view(self, at: int, leaf: Leaf, number: int) -> torch.Tensor:
        dtype, shape, offset, _ = leaf
        block = self._typed.get(dtype)
        if block is None:
            block = self._typed[dtype] = self._block.view(dtype)
        place = (self._starts.item(number) + offset) // dtype.itemsize
        return block.as_strided(shape, _strides(shape), block.storage_offset() + place)

    def _stack(self, at: int, leaves: Sequence[Leaf]) -> torch.Tensor:
        leaf = leaves[0]
        if not leaf.nbytes:
            return torch.empty(len(self), *leaf.shape, dtype=leaf.dtype, device=self.device)
        if len(leaves) > 1 or is_on_host(self._block):
            return stack_scattered(*self._bytes_of(at, leaves), leaf)
        rows = self._block.view(len(self), -1)[:, leaf.offset : leaf.offset + leaf.nbytes]
        # By the widest element that divides a leaf: copying is by element.
        wide = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8)
                    if leaf.nbytes % t.itemsize == 0)  # fmt: skip
        return rows.view(wide).contiguous().view(leaf.dtype).view(len(self), *leaf.shape)

    def _bytes_of(self, at: int, leaves: Sequence[Leaf]) -> tuple[torch.Tensor, Numbers]:
        offsets = np.array([leaf.offset for leaf in leaves])
        return self._block, self._starts[: len(self)] + offsets


def _is_dict_of_leaves(tree: Tree) -> TypeGuard[Any]:
    return (
        isinstance(tree, Branch)
        and tree.kind is dict
        and len(tree.children) > 0
        and tree.children == tuple(range(len(tree.children)))
    )


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(max(n, 1) for n in shape[at:]) for at in range(1, len(shape) + 1))


def _collate_tree(
    tree: Tree,
    columns: Sequence[Any],
    values: Sequence[Sequence[Any]],
    numbers: Mapping[int, torch.Tensor],
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
        numbers: by position, what some of `values` have been collated to.
        device: where other numbers go, as tensors [B].
        as_list: whether a plain value that is the whole feature comes as a list.
    """
    if isinstance(tree, int):
        if tree >= 0:
            return columns[tree]
        if ~tree in numbers:
            return numbers[~tree]
        column = [copy_value(value) for value in values[~tree]]
        samples: Any = column if as_list else tuple(column)
        return to_device(collate_on_host(samples), device)
    kind, keys, _, children = tree
    parts = [
        _collate_tree(child, columns, values, numbers, device, as_list=keys is not None)
        for child in children
    ]
    if keys is not None:
        return kind(zip(keys, parts, strict=True))
    return parts if kind in (list, tuple) else kind(*parts)
