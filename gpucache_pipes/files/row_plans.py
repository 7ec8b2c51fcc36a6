"""Read plans for one sample of a file that holds many: a row of tensors, or an item of a list."""

from collections.abc import Iterator
from typing import Any

from gpucache_pipes.files.layout import Branch, Layout, Leaf, Tree
from gpucache_pipes.files.part_names import leaf_names
from gpucache_pipes.files.plans import Extent, ReadPlan, StridedExtent
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.strided import is_contiguous

_Place = Extent | StridedExtent | None


class RowPlans:
    """The read plans of the samples of one file.

    A file that holds a list has its items for samples. Of any other, sample n has row n of each
    tensor, and item n of each list that has as many items as there are rows. What remains, such as
    numbers, strings and tensors without dimensions, belongs to each sample.

    Args:
        plan: of the whole file.
        selection: what is kept of each sample; None is all.

    Attributes:
        count: how many samples there are.

    Raises:
        ValueError: the first dimensions of the tensors differ, or there are none.
    """

    def __init__(self, plan: ReadPlan, selection: Selection | None) -> None:
        tree = plan.layout.tree
        self._items = isinstance(tree, Branch) and tree.kind is list
        self._selection = selection if self._items else None
        if selection is not None and not self._items:
            plan = selection.plan(plan)
            tree = plan.layout.tree
        self._plan = plan
        places: dict[int, Extent | StridedExtent] = {}
        for extent in plan.extents:
            places[extent.offset] = extent
        for strided in plan.strided_extents:
            places[strided.leaf.offset] = strided
        self._places: list[_Place] = [places.get(leaf.offset) if leaf.nbytes else None
                                      for leaf in plan.layout.leaves]  # fmt: skip
        if isinstance(tree, Branch) and self._items:
            self.count = len(tree.children)
        else:
            self.count = _count_rows(plan.layout)

    @property
    def cost(self) -> int:
        """An estimate of the host bytes that this occupies."""
        return self._plan.cost + 200 * len(self._places)

    def plan(self, number: int) -> ReadPlan:
        """The plan of a sample. Raises ValueError if the selection refuses it."""
        leaves: list[tuple[int, bool]] = []
        values: list[Any] = []
        tree = self._picked(self._plan.layout.tree, number, not self._items, leaves, values)
        old = self._plan.layout.leaves
        tensors = [(old[at].dtype, old[at].shape[by_row:]) for at, by_row in leaves]
        layout = Layout.of(tree, tensors)
        extents, others = [], []
        for (at, by_row), new in zip(leaves, layout.leaves, strict=True):
            place = _moved(self._places[at], old[at], new, number if by_row else None)
            if isinstance(place, Extent):
                extents.append(place)
            elif place is not None:
                others.append(place)
        plan = ReadPlan(layout, tuple(values), tuple(extents), tuple(others), layout.cost)
        return plan if self._selection is None else self._selection.plan(plan)

    def _picked(
        self, tree: Tree, number: int, by_row: bool, leaves: list[Any], values: list[Any]
    ) -> Tree:
        """The tree of a sample; its leaves, each with whether it is a row, and its values."""
        if isinstance(tree, int):
            if tree < 0:
                values.append(self._plan.values[~tree])
                return ~(len(values) - 1)
            leaves.append((tree, by_row and len(self._plan.layout.leaves[tree].shape) > 0))
            return len(leaves) - 1
        whole = not by_row and tree is self._plan.layout.tree
        if whole or (by_row and tree.kind is list and len(tree.children) == self.count):
            return self._picked(tree.children[number], number, False, leaves, values)
        children = [self._picked(c, number, by_row, leaves, values) for c in tree.children]
        return tree._replace(children=tuple(children))


def _moved(place: _Place, old: Leaf, new: Leaf, row: int | None) -> _Place:
    """Where a leaf of a sample is in the file: all of a leaf of the file, or a row of it."""
    if place is None or not new.nbytes:
        return None
    if isinstance(place, Extent):
        start = place.start if row is None else place.start + row * new.nbytes
        return Extent(start, new.offset, new.nbytes)
    if row is None:
        return place._replace(leaf=new)
    strides, shape = place.strides[1:], new.shape
    start = place.start + row * place.strides[0] * place.dtype.itemsize
    if place.dtype == new.dtype and is_contiguous(shape, strides):
        return Extent(start, new.offset, new.nbytes)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return StridedExtent(start, (last + 1) * place.dtype.itemsize, strides, place.dtype, new)


def _count_rows(layout: Layout) -> int:
    names = leaf_names(layout.tree)
    rows = {names[at]: layout.leaves[at].shape[0] for at in _rows(layout)}
    if not rows:
        raise ValueError("it holds no tensor that has rows, and no list of samples")
    counts = set(rows.values())
    if len(counts) > 1:
        first, other = (next(name for name in rows if rows[name] == n) for n in list(counts)[:2])
        raise ValueError(
            f"its tensors differ in their numbers of rows: {first} has {rows[first]}, {other} has "
            f"{rows[other]}; keys= keeps those that agree"
        )
    return counts.pop()


def _rows(layout: Layout) -> Iterator[int]:
    """The leaves whose rows count: those that are in no list, or else all."""

    def outside(tree: Tree, lists: bool) -> Iterator[int]:
        if isinstance(tree, int):
            if tree >= 0 and layout.leaves[tree].shape:
                yield tree
        elif lists or tree.kind is not list:
            for child in tree.children:
                yield from outside(child, lists)

    found = list(outside(layout.tree, False))
    return iter(found or outside(layout.tree, True))
