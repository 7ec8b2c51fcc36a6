"""A batch of features on the device, and what becomes of it."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, overload

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import default_collate

from gpucache_pipes.batches.ragged import RaggedOptions, join_ragged, stack_scattered
from gpucache_pipes.batches.unlike import collate_unlike
from gpucache_pipes.cache import LAYOUT_SHIFT, Cache, Entry
from gpucache_pipes.device import Backend
from gpucache_pipes.files import (
    ALIGNMENT,
    Layout,
    Leaf,
    LoadedFeature,
    Tree,
    build,
    leaf_names,
    own,
)

_NONE: Mapping[int, LoadedFeature] = {}


class FeatureBatch(Sequence[Any]):
    """A sequence of features whose bytes already lie on the device, freshly gathered.

    `batch[i]` is feature i as it was saved, its tensors views into the gathered memory. Nothing
    of the cache is shared: writing into a batch changes this batch and nothing else.

    Made by `GPUFeatureStore.get_batch` and `GPUPrefetcher`. Attributes:
        device: where the tensors are.
    """

    def __init__(
        self,
        device: torch.device,
        entries: Mapping[int, Entry],
        numbers: Sequence[int],
        layouts: Sequence[Layout],
        values: Sequence[tuple[Any, ...]],
    ) -> None:
        self.device = device
        # The store's table of files, and which of them these are.
        self._entries = entries
        self._numbers = numbers
        # One layout for all features, or one for each; values only where there are any.
        self._layouts = layouts
        self._values = values
        # Either a tensor [B, *shape] for each leaf, or the pages of all features in a row
        # (uint8) and where each feature starts.
        self._columns: list[torch.Tensor] | None = None
        self._block: torch.Tensor | None = None
        self._starts: Sequence[int] = ()

    @property
    def paths(self) -> list[str]:
        """The file of each feature, absolute."""
        return [self._entries[number].path for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

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
        if self._columns is not None:
            columns = self._columns
            return build(layout.tree, lambda n: columns[n][number], lambda n: own(values[n]))
        assert self._block is not None
        row = self._block[self._starts[number] : self._starts[number + 1]]
        leaves = layout.leaves
        return build(layout.tree, lambda n: _leaf(row, leaves[n]), lambda n: own(values[n]))

    def __repr__(self) -> str:
        return f"FeatureBatch({len(self)} features on {self.device})"

    def collate(self, ragged: RaggedOptions | None = None) -> Any:
        """What `torch.utils.data.default_collate` makes of the features, on the device.

        Tensors are stacked to [B, *shape] and contiguous, numbers become device tensors [B].
        Where all features have one layout this takes no device operation for tensors if a page
        holds a feature, and else a few for each leaf. Raises RuntimeError, naming leaf, shapes
        and files, where shapes differ; but `ragged` says what to do where only the first dimension
        does.
        """
        if not self._numbers:
            raise ValueError("an empty batch cannot be collated")
        try:
            return self._collate(ragged or RaggedOptions())
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
        columns: Sequence[Any]
        if self._columns is not None and ragged.modes == "error":
            columns = self._columns
        else:
            if any(other.kind is not layout.kind for other in self._layouts):
                return to_device(collate_unlike(list(self), ragged), self.device)
            names = leaf_names(layout.tree)
            columns = [self._column(at, name, ragged) for at, name in enumerate(names)]
        values = list(zip(*self._values, strict=True))
        return self._collate_tree(layout.tree, columns, values, as_list=True)

    def _column(self, number: int, name: str, ragged: RaggedOptions) -> Any:
        """Leaf `number` of all features."""
        leaves = [layout.leaves[number] for layout in self._layouts]
        first = leaves[0]
        differs = any(leaf.shape != first.shape for leaf in leaves)
        mode = ragged.mode_of(name, differs, len(first.shape)) if name else None
        if mode is None or (mode == "error" and not differs):
            return self._stack(number, leaves)
        for at, leaf in enumerate(leaves):
            rows_differ = leaf.shape[1:] != first.shape[1:] or not leaf.shape
            if rows_differ or (mode == "error" and leaf.shape != first.shape):
                raise RuntimeError(
                    f"cannot {'stack' if mode == 'error' else mode} {name}: shape "
                    f"{list(first.shape)} in {self.paths[0]!r}, {list(leaf.shape)} in "
                    f'{self.paths[at]!r}; GPUCollator(ragged="pad"), "jagged" or "list" joins '
                    "sequences of different lengths, a collate_fn whatever it likes"
                )
        leaves = leaves * (len(self) if len(leaves) == 1 else 1)
        return join_ragged(mode, *self._bytes_of(number, leaves), leaves, ragged)

    def _bytes_of(self, number: int, leaves: Sequence[Leaf]) -> tuple[torch.Tensor, list[int]]:
        """Memory that has this leaf of every feature, and where."""
        if self._columns is None:
            assert self._block is not None
            starts = zip(self._starts, leaves, strict=False)
            return self._block, [start + leaf.offset for start, leaf in starts]
        nbytes = leaves[0].nbytes
        block = self._columns[number].reshape(-1).view(torch.uint8)
        return block, [nbytes * at for at in range(len(self))]

    def _collate_tree(
        self, tree: Tree, columns: Sequence[torch.Tensor], values: Sequence[Any], as_list: bool
    ) -> Any:
        """As default_collate has it: a tuple becomes a list, other containers keep their type,
        and strings come as a list in a dict, as a tuple in a sequence.
        """
        if isinstance(tree, int):
            if tree >= 0:
                return columns[tree]
            column = [own(value) for value in values[~tree]]
            samples: Any = column if as_list else tuple(column)
            return to_device(default_collate(samples), self.device)
        kind, keys, _, children = tree
        parts = [self._collate_tree(c, columns, values, keys is not None) for c in children]
        if keys is not None:
            return kind(zip(keys, parts, strict=True))
        return parts if kind in (list, tuple) else kind(*parts)

    def _stack(self, number: int, leaves: Sequence[Leaf]) -> torch.Tensor:
        """One leaf of all features, which has one shape."""
        if self._columns is not None:
            return self._columns[number]
        assert self._block is not None
        leaf = leaves[0]
        if not leaf.nbytes:
            return torch.empty(len(self), *leaf.shape, dtype=leaf.dtype, device=self.device)
        if len(leaves) > 1:
            return stack_scattered(*self._bytes_of(number, leaves), leaf)
        # All have the same number of pages.
        rows = self._block.view(len(self), -1)[:, leaf.offset : leaf.offset + leaf.nbytes]
        # By the widest element that divides a leaf: copying is by element.
        wide = next(t for t in (torch.int64, torch.int32, torch.int16, torch.uint8)
                    if leaf.nbytes % t.itemsize == 0)  # fmt: skip
        return rows.view(wide).contiguous().view(leaf.dtype).view(len(self), *leaf.shape)


def gather_batch(
    cache: Cache,
    backend: Backend,
    numbers: Sequence[int],
    rows: Sequence[int] | None,
    substitutes: Mapping[int, LoadedFeature] = _NONE,
) -> FeatureBatch:
    """Gather READY entries, which stay so meanwhile, on the current stream of this thread.

    `rows` are theirs, as `Cache.rows` has them, if all have one. `substitutes` are taken at their
    positions in place of entries that could not be loaded.
    """
    if substitutes:
        return _gather_with(substitutes, cache, backend, numbers)
    entries, device = cache.entries, backend.device
    if rows and _are_alike(cache, rows):
        # All alike and in one page each: a column of the pages is a leaf of the batch.
        number_of_layout = rows[0] >> LAYOUT_SHIFT
        layout: Layout = cache.layouts[number_of_layout]
        base = number_of_layout << LAYOUT_SHIFT
        pages = [row - base for row in rows] if base else rows
        values = [entries[number].values for number in numbers] if layout.plain else []
        batch = FeatureBatch(device, entries, numbers, [layout], values)
        batch._columns = _gather_columns(pages, layout, backend)
        return batch
    found = [entries[number] for number in numbers]
    layouts: list[Layout] = [entry.layout for entry in found]
    if layouts.count(layouts[0]) == len(layouts) if layouts else False:
        layouts = layouts[:1]
    batch = FeatureBatch(device, entries, numbers, layouts, [entry.values for entry in found])
    placements = [entry.pages for entry in found]
    batch._starts = _starts_of(placements, backend.page_bytes)
    if batch._starts[-1]:
        batch._block = backend.join(placements)
    else:
        batch._block = torch.empty(0, dtype=torch.uint8, device=device)
    return batch


def _are_alike(cache: Cache, rows: Sequence[int]) -> bool:
    """Whether all have one layout."""
    return len(cache.layouts) == 1 or min(rows) >> LAYOUT_SHIFT == max(rows) >> LAYOUT_SHIFT


def collate_batch(
    cache: Cache,
    backend: Backend,
    numbers: Sequence[int],
    rows: Sequence[int] | None,
    substitutes: Mapping[int, LoadedFeature],
    ragged: RaggedOptions,
) -> Any:
    """The same as `gather_batch(...).collate(ragged)`.

    On the host features of different lengths are copied to their places in the batch out of the
    pages themselves, which spares half of the copying.
    """
    memory = backend.memory()
    alike = rows and _are_alike(cache, rows)
    if memory is None or alike or substitutes or not ragged.copies:
        return gather_batch(cache, backend, numbers, rows, substitutes).collate(ragged)
    found = [cache.entries[number] for number in numbers]
    layouts: list[Layout] = [entry.layout for entry in found]
    runs = [entry.pages for entry in found if isinstance(entry.pages, range)]
    kinds = {layout.kind for layout in layouts}
    if len(runs) < len(found) or len(kinds) != 1 or layouts.count(layouts[0]) == len(layouts):
        return gather_batch(cache, backend, numbers, rows).collate(ragged)
    values = [entry.values for entry in found]
    batch = FeatureBatch(backend.device, cache.entries, numbers, layouts, values)
    batch._block = memory
    batch._starts = [run.start * backend.page_bytes for run in runs]
    return batch.collate(ragged)


def _starts_of(placements: Sequence[Sequence[int]], page_bytes: int) -> list[int]:
    """Where the pages of each feature begin if they lie end to end, and where the last ends."""
    return [page_bytes * pages for pages in accumulate(map(len, placements), initial=0)]


def _gather_with(
    substitutes: Mapping[int, LoadedFeature],
    cache: Cache,
    backend: Backend,
    numbers: Sequence[int],
) -> FeatureBatch:
    """The same where some features come from the host: piece by piece, as it is seldom."""
    entries, device = cache.entries, backend.device
    layouts: list[Layout] = []
    values: list[tuple[Any, ...]] = []
    pieces: list[torch.Tensor] = []
    for position, number in enumerate(numbers):
        found = substitutes.get(position)
        source: Any = entries[number] if found is None else found
        layouts.append(source.layout)
        values.append(source.values)
        if found is not None:
            # Features must begin at multiples of their alignment.
            try:
                held = bytearray(-(-found.layout.span // ALIGNMENT) * ALIGNMENT)
            except (MemoryError, OverflowError) as error:
                path, size = entries[number].path, found.layout.span
                raise MemoryError(f"what is taken for {path!r} has {size} bytes") from error
            if held:
                found.read_into([memoryview(held)])
                pieces.append(to_device(torch.frombuffer(held, dtype=torch.uint8), device))
                continue
        elif source.pages:
            pieces.append(backend.join([source.pages]))
            continue
        pieces.append(torch.empty(0, dtype=torch.uint8, device=device))
    batch = FeatureBatch(device, entries, numbers, layouts, values)
    batch._starts = list(accumulate((len(piece) for piece in pieces), initial=0))
    batch._block = torch.cat(pieces)
    return batch


def _gather_columns(pages: Sequence[int], layout: Layout, backend: Backend) -> list[torch.Tensor]:
    """One contiguous tensor [len(pages), *shape] for each leaf, by one gather each."""
    full = [(leaf.offset, leaf.nbytes) for leaf in layout.leaves if leaf.nbytes]
    gathered = iter(backend.gather(pages, full))
    count = len(pages)
    columns = []
    for dtype, shape, _, nbytes in layout.leaves:
        if not nbytes:
            columns.append(torch.empty(count, *shape, dtype=dtype, device=backend.device))
            continue
        column = next(gathered).view(dtype)
        columns.append(column if len(shape) == 1 else column.view(count, *shape))
    return columns


def _leaf(row: torch.Tensor, leaf: Leaf) -> torch.Tensor:
    data = row[leaf.offset : leaf.offset + leaf.nbytes]
    return data.view(leaf.dtype).view(leaf.shape)


def to_device(item: Any, device: torch.device) -> Any:
    """`item` with every CPU tensor in its dicts, lists and tuples on `device`."""
    return (
        item if device.type == "cpu" else tree_map_only(torch.Tensor, partial(_move, device), item)
    )


def first_device(item: Any) -> torch.device | None:
    """Where the first tensor in `item` is, if there is one."""
    leaves = tree_leaves(item)
    return next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), None)


def _move(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu" and device.type != "mps":
        # From pinned memory, so that the host need not wait for the device.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
