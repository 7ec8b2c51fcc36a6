"""Labels: what belongs to each file of a PathLister, and comes with its features."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.batches import collate_on_host, upload
from gpucache_pipes.files import NumberedPath, Paths, Samples
from gpucache_pipes.nodes.label_names import find, names_any, numbered_names


class Labelled(NamedTuple):
    """Features and their labels.

    Attributes:
        features: a FeatureBatch, or one feature.
        labels: of each of them, as `Labels.rows` makes them; or of one.
    """

    features: Any
    labels: Any


class Labels:
    """The labels of a list of files, in columns.

    Args:
        columns: a tensor [N, ...] or a list of N objects; or a dict or a list of such columns.
        files: N.
    """

    def __init__(self, columns: Any, files: int) -> None:
        self._columns = columns
        self._files = files
        # By device: the same with tensors there. Never changed once it is there.
        self._on: dict[torch.device, Any] = {torch.device("cpu"): columns}

    @classmethod
    def of(cls, labels: Any, paths: Sequence[str], root: str, by_position: bool) -> "Labels":
        """The labels of `paths`.

        Args:
            labels: as in PathLister.
            paths: all files.
            root: the directory whose files they are, with a separator at its end; or "".
            by_position: whether the user has given the paths one by one, so that a sequence may
                say what belongs to each.

        Raises:
            ValueError: too many or too few; a sequence for files that were listed; a file whose
                name has no label, which is named.
            TypeError: labels of another kind.
        """
        if callable(labels):
            return cls(_column([labels(path) for path in paths]), len(paths))
        if hasattr(labels, "iloc"):  # a Series or a DataFrame of pandas
            index = list(labels.index)
            if index and all(isinstance(name, (str, os.PathLike)) for name in index):
                at = find(paths, root, numbered_names(index))
                return cls(_frame(labels.iloc[at]), len(paths))
            _require_positions(by_position, "a table whose index does not hold names")
            _require_no_names(index, paths)
            _require_length(labels, paths)
            return cls(_frame(labels), len(paths))
        if isinstance(labels, Mapping):
            if by_position and not names_any(paths, root, labels):
                columns = _columns(labels, len(paths))
                if columns is not None:
                    return cls(columns, len(paths))
            at = find(paths, root, numbered_names(labels))
            values = list(labels.values())
            return cls(_column([values[n] for n in at]), len(paths))
        if isinstance(labels, (str, bytes, Set)) or not hasattr(labels, "__len__"):
            raise TypeError(
                f"labels={labels!r:.80} is neither a sequence, an array, a table, a dict, nor a "
                "function of the path"
            )
        _require_positions(by_position, "a sequence")
        _require_length(labels, paths)
        return cls(_column(labels), len(paths))

    def __len__(self) -> int:
        return self._files

    def __reduce__(self) -> tuple[Any, ...]:
        return Labels, (self._columns, self._files)

    def rows(self, positions: NDArray[np.intp], device: torch.device) -> Any:
        """The labels at these positions: tensors [B, ...] on the device, and lists.

        On the current stream. One copy to the device, and one operation for each column.
        """
        positions = positions % self._files  # of a sample of several files, by any of them
        index = upload(torch.from_numpy(positions.astype(np.int64)), device)

        def of(column: Any) -> Any:
            if isinstance(column, torch.Tensor):
                return column.index_select(0, index)
            return [_own(column[at], device) for at in positions.tolist()]

        return _map(of, self._columns_on(device))

    def row(self, position: int, device: torch.device) -> Any:
        """The label at a position: a tensor on the device, or an object."""
        at = position % self._files
        return _map(lambda column: _own(column[at], device), self._columns_on(device))

    def _columns_on(self, device: torch.device) -> Any:
        columns = self._on.get(device)
        if columns is None:
            columns = _map(
                lambda column: (
                    upload(column, device) if isinstance(column, torch.Tensor) else column
                ),
                self._columns,
            )
            # Once: other streams use them from now on.
            torch.accelerator.synchronize(device)
            self._on[device] = columns
        return columns


NO_LABELS = object()
"""In place of labels, where there are none: a label may be None."""


def labels_of(paths: Sequence[Any], device: torch.device) -> Any:
    """The labels of a batch of paths or samples, or of single ones, as `Labels.rows` makes them.

    NO_LABELS for paths without labels. Raises TypeError if only some have labels, or if they are of
    several lists.
    """
    if isinstance(paths, Samples):
        paths = paths.column(0)
    if isinstance(paths, Paths):
        labels, positions = paths.files.labels, paths.positions
        return NO_LABELS if labels is None else labels.rows(positions, device)
    numbered = [path for path in paths if isinstance(path, NumberedPath)]
    if not numbered:
        return NO_LABELS
    labels = numbered[0].files.labels
    if len(numbered) < len(paths) or any(path.files.labels is not labels for path in numbered):
        raise TypeError(
            "a batch mixes the paths of several lists, and not all of them have the same labels: "
            "make one PathLister of all files, or batch each list by itself"
        )
    positions = np.array([path.position for path in numbered], np.intp)
    return labels.rows(positions, device)


def label_of(path: Any, device: torch.device) -> Any:
    """The label of one path, as `Labels.row` makes it; NO_LABELS as in `labels_of`."""
    if not isinstance(path, NumberedPath):
        return NO_LABELS
    return path.files.labels.row(path.position, device)


def _own(item: Any, device: torch.device) -> Any:
    """An object of a column for the consumer, who may write into it."""
    return upload(item.clone(), device) if isinstance(item, torch.Tensor) else copy.copy(item)


def _map(function: Callable[[Any], Any], columns: Any) -> Any:
    """The same structure of what a function makes of each column."""
    if isinstance(columns, dict):
        return {name: _map(function, column) for name, column in columns.items()}
    if isinstance(columns, tuple):
        parts = [_map(function, column) for column in columns]
        return type(columns)(*parts) if hasattr(columns, "_fields") else parts
    return function(columns)


def _column(values: Any) -> Any:
    """A column of the values, in the order of files; several if the values are dicts or tuples.

    Numbers become tensors as default_collate makes them, anything else a list.
    """
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", copy=True)
    if isinstance(values, np.ndarray):
        array = _tensor_of(values)
        if array is not None:
            return array
        values = values.tolist() if values.dtype.kind in "OSUu" else values
    values = list(values)
    first = values[0] if values else None
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or value.keys() != first.keys() for value in values):
            raise ValueError("labels that are dicts must all have the same keys")
        return {name: _column([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        if any(not isinstance(value, tuple) or len(value) != len(first) for value in values):
            raise ValueError("labels that are tuples must all have the same length")
        parts = [_column(list(column)) for column in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    lacking = [at for at, value in enumerate(values) if value is None]
    if lacking and any(isinstance(value, (int, float)) for value in values):
        raise ValueError(
            f"{len(lacking)} of {len(values)} labels are None among numbers, the first at position "
            f"{lacking[0]}: give each file a number, or leave these files out"
        )
    try:
        if isinstance(first, list):  # rows of numbers, where they are of one length
            return torch.tensor(values, device="cpu")
        collated = collate_on_host(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    return collated if isinstance(collated, torch.Tensor) else values


def _tensor_of(values: NDArray[Any]) -> torch.Tensor | None:
    """A copy of an array of numbers as a tensor that can be gathered; None if there is none."""
    dtype = values.dtype.newbyteorder("=")
    if dtype.kind == "u" and dtype.itemsize > 1:  # torch gathers none of these
        dtype = np.dtype(np.int64)
        if values.size and values.max() > np.iinfo(dtype).max:
            return None
    try:
        return torch.from_numpy(np.array(values, dtype, order="C"))
    except (TypeError, ValueError):
        return None


def _frame(table: Any) -> Any:
    """The column of a Series, or those of a DataFrame by name."""
    if hasattr(table, "columns"):
        return {name: _column(table[name]) for name in table.columns}
    return _column(table)


def _columns(labels: Mapping[Any, Any], files: int) -> dict[Any, Any] | None:
    """The columns of a dict; None if it holds no columns. Raises ValueError for other lengths."""
    for name, column in labels.items():
        if isinstance(column, (str, bytes, Mapping, Set)) or not hasattr(column, "__len__"):
            return None
        if len(column) != files:
            raise ValueError(
                f"the column {name!r} of labels= has {len(column)} entries for {files} files"
            )
    return {name: _column(column) for name, column in labels.items()} or None


def _require_positions(by_position: bool, what: str) -> None:
    if not by_position:
        raise ValueError(
            f"labels= is {what}, which goes by position; for the files of a directory or a pattern "
            "labels go by name, so that a file that is added shifts none: give a dict, a Series or "
            "DataFrame whose index holds names, or a function of the path. Or give the paths one "
            "by one, in a list"
        )


def _require_length(labels: Any, paths: Sequence[str]) -> None:
    if len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} files")


def _require_no_names(index: list[Any], paths: Sequence[str]) -> None:
    """Raise ValueError if the numbers of an index are the names of the files, in another order."""
    if index != list(range(len(index))) and len(index) == len(paths):
        names = {str(name): n for n, name in enumerate(index)}
        stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
        in_order = [names.get(stem) for stem in stems] == list(range(len(stems)))
        if names.keys() == set(stems) and not in_order:
            raise ValueError(
                "the index of labels= holds numbers by which the files are named, in another "
                "order: labels.set_index(labels.index.astype(str)) goes by name, "
                "labels.reset_index(drop=True) by position"
            )
