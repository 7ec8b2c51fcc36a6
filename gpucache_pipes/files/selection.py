"""Which parts of features are kept, and as which dtypes: `keys=` and `dtype=` of a store."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpucache_pipes.files.layout import Branch, Layout, Tree, build, flatten
from gpucache_pipes.files.plans import ReadPlan, StridedExtent
from gpucache_pipes.files.strided import contiguous_strides

Key = Hashable | tuple[Hashable, ...]
"""A key of a dict feature, or the keys that lead to a part of it, from the outside in."""

_MAX_KNOWN = 1 << 14


@dataclass(frozen=True)
class Selection:
    """Applies `keys` and `dtype` to features, or to the plans by which they are read.

    Attributes:
        keys: the parts that are kept; None is all.
        floating: the dtype of all floating leaves; None leaves them.
        named: the dtypes of the leaves in these parts.
    """

    keys: tuple[tuple[Hashable, ...], ...] | None = None
    floating: torch.dtype | None = None
    named: tuple[tuple[tuple[Hashable, ...], torch.dtype], ...] = ()
    # Plans by the identity of those that they were made of, which are kept with them. Shared by
    # threads: single operations on a dict are atomic.
    _known: dict[int, tuple[ReadPlan, ReadPlan]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        keys: Key | Iterable[Key] | None,
        dtype: torch.dtype | Mapping[Key, torch.dtype] | None,
    ) -> "Selection | None":
        """The selection of arguments as GPUFeatureStore has them; None if it changes nothing.

        Raises:
            ValueError: they are of another kind, or no tensor can have such a dtype.
        """
        if keys is None and dtype is None:
            return None
        floating = None
        named: tuple[tuple[tuple[Hashable, ...], torch.dtype], ...] = ()
        if isinstance(dtype, Mapping):
            named = tuple((_path(key), _require_dtype(one)) for key, one in dtype.items())
        elif dtype is not None:
            floating = _require_dtype(dtype)
            if not floating.is_floating_point:
                raise ValueError(
                    f"dtype={dtype}: a single dtype converts floating tensors to another floating "
                    "dtype; name the leaves of others, as in {'label': torch.int32}"
                )
        return cls(None if keys is None else _paths(keys), floating, named)

    @property
    def text(self) -> str:
        """Texts differ for selections that do."""
        return repr((self.keys, self.floating, self.named))

    def plan(self, plan: ReadPlan) -> ReadPlan:
        """The plan that reads what is kept of a feature.

        Raises:
            ValueError: the feature has no such part, or it cannot be converted.
        """
        known = self._known.get(id(plan))
        if known is not None and known[0] is plan:
            return known[1]
        selected = self._make_plan(plan)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[id(plan)] = (plan, selected)
        return selected

    def _make_plan(self, plan: ReadPlan) -> ReadPlan:
        tree = plan.layout.tree
        old = plan.layout.leaves
        kept_leaves, kept_values = [], []

        def leaf(number: int) -> int:
            kept_leaves.append(number)
            return len(kept_leaves) - 1

        def value(number: int) -> int:
            kept_values.append(number)
            return ~(len(kept_values) - 1)

        dtypes = self._dtypes(tree, [one.dtype for one in old])
        tree = _renumbered(self._pruned(tree), leaf, value)
        layout = Layout.of(tree, [(dtypes[n], old[n].shape) for n in kept_leaves])
        new = {old[n].offset: (old[n], layout.leaves[at]) for at, n in enumerate(kept_leaves)
               if old[n].nbytes}  # fmt: skip
        extents, others = [], []
        for extent in plan.extents:
            if extent.offset in new:
                before, after = new[extent.offset]
                if before.dtype == after.dtype:
                    extents.append(extent._replace(offset=after.offset))
                else:
                    strides = contiguous_strides(before.shape)
                    others.append(
                        StridedExtent(extent.start, extent.nbytes, strides, before.dtype, after)
                    )
        others += [
            strided._replace(leaf=new[strided.leaf.offset][1])
            for strided in plan.strided_extents
            if strided.leaf.offset in new
        ]
        values = tuple(plan.values[number] for number in kept_values)
        return ReadPlan(layout, values, tuple(extents), tuple(others), plan.cost + layout.cost)

    def feature(self, feature: Any) -> Any:
        """What is kept of a feature in host memory. Raises as `plan` does."""
        tree, tensors, values = flatten(feature)
        dtypes = self._dtypes(tree, [tensor.dtype for tensor in tensors])
        return build(
            self._pruned(tree),
            lambda number: tensors[number].to(dtypes[number]),
            values.__getitem__,
        )

    def _pruned(self, tree: Tree) -> Tree:
        """The tree without what is not kept. Its leaves and values keep their numbers."""
        if self.keys is None:
            return tree
        for path in self.keys:
            _part(tree, path, "keys")
        return _kept(tree, self.keys)

    def _dtypes(self, tree: Tree, dtypes: list[torch.dtype]) -> list[torch.dtype]:
        """The dtype that each leaf gets."""
        if self.floating is not None:
            return [self.floating if dtype.is_floating_point else dtype for dtype in dtypes]
        new = list(dtypes)
        for path, dtype in self.named:
            for number in _leaves(_part(tree, path, "dtype")):
                if dtypes[number].is_complex and not dtype.is_complex:
                    raise ValueError(
                        f"{_name(path)} is {dtypes[number]}, which cannot be converted to {dtype}"
                    )
                new[number] = dtype
        return new


def _require_dtype(dtype: object) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if isinstance(dtype, torch.dtype):
        try:
            torch.zeros(1, device="cpu").to(dtype)
        except (RuntimeError, NotImplementedError, TypeError):
            pass
        else:
            return dtype
    raise ValueError(
        f"dtype={dtype!r} must be a dtype that tensors can be converted to, such as torch.bfloat16"
    )


def _path(key: Key) -> tuple[Hashable, ...]:
    path = key if type(key) is tuple else (key,)
    if not path or isinstance(key, (list, dict, set, torch.Tensor)):
        raise ValueError(f"{key!r} is neither a key nor a non-empty tuple of keys")
    return path


def _paths(keys: Any) -> tuple[tuple[Hashable, ...], ...]:
    if isinstance(keys, tuple):
        raise ValueError(
            f"keys={keys!r} could mean several keys or one in another: write {list(keys)!r} "
            f"for several, [{keys!r}] for one"
        )
    if isinstance(keys, (str, bytes, int)):
        return (_path(keys),)
    try:
        paths = tuple(_path(key) for key in keys)
    except TypeError:
        raise ValueError(f"keys={keys!r} must be a key or a list of keys") from None
    if not paths:
        raise ValueError("keys=[] keeps nothing; omit it to keep all")
    return paths


def _name(path: tuple[Hashable, ...]) -> str:
    return "feature" + "".join(f"[{key!r}]" for key in path)


def _part(tree: Tree, path: tuple[Hashable, ...], argument: str) -> Tree:
    """The part of a tree that a path leads to. Raises ValueError if there is none."""
    for depth, key in enumerate(path):
        where = _name(path[:depth]) if depth else "the feature"
        if not isinstance(tree, Branch) or tree.keys is None:
            kind = tree.kind.__name__ if isinstance(tree, Branch) else "single value"
            raise ValueError(
                f"{argument}= names {_name(path)}, but {where} is a {kind}, not a dict"
            )
        if key not in tree.keys:
            raise ValueError(
                f"{argument}= names {_name(path)}, but the keys of {where} are "
                f"{list(tree.keys)!r:.300}"
            )
        tree = tree.children[tree.keys.index(key)]
    return tree


def _kept(tree: Tree, paths: Iterable[tuple[Hashable, ...]]) -> Tree:
    """The tree with what these paths lead to, all of which it has."""
    if isinstance(tree, int) or () in paths:
        return tree
    assert tree.keys is not None
    rests: dict[Hashable, list[tuple[Hashable, ...]]] = {}
    for path in paths:
        rests.setdefault(path[0], []).append(path[1:])
    parts = zip(tree.keys, tree.marks, tree.children, strict=True)
    kept = [(key, mark, _kept(part, rests[key])) for key, mark, part in parts if key in rests]
    keys, marks, children = zip(*kept, strict=True)
    return Branch(tree.kind, keys, marks, children)


def _renumbered(tree: Tree, leaf: Any, value: Any) -> Tree:
    if isinstance(tree, int):
        number: int = leaf(tree) if tree >= 0 else value(~tree)
        return number
    return tree._replace(
        children=tuple([_renumbered(child, leaf, value) for child in tree.children])
    )


def _leaves(tree: Tree) -> list[int]:
    """The numbers of the leaves of a tree."""
    if isinstance(tree, int):
        return [tree] if tree >= 0 else []
    return [number for child in tree.children for number in _leaves(child)]
