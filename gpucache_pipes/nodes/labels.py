"""Labels: what belongs to each file of a PathLister, and comes with its features."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.batches import collate_on_host, upload
from gpucache_pipes.files import NumberedPath, Paths


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
        index = getattr(labels, "index", None)
        if hasattr(labels, "iloc") and index is not None:  # a Series or DataFrame of pandas
            if all(isinstance(name, (str, os.PathLike)) for name in index):
                at = _find(paths, root, {os.fspath(name): n for n, name in enumerate(index)})
                return cls(_frame(labels.iloc[at]), len(paths))
            _require_positions(by_position, "a table whose index does not hold names")
            return cls(_require_length(_frame(labels), labels, paths), len(paths))
        if isinstance(labels, Mapping):
            if by_position and _are_columns(labels, len(paths)):
                columns = {name: _column(column) for name, column in labels.items()}
                return cls(columns, len(paths))
            names = {os.fspath(name): n for n, name in enumerate(labels)}
            values = list(labels.values())
            return cls(_column([values[n] for n in _find(paths, root, names)]), len(paths))
        if isinstance(labels, (str, bytes)) or not hasattr(labels, "__len__"):
            raise TypeError(
                f"labels={labels!r:.80} is neither a sequence, an array, a table, a dict, nor a "
                "function of the path"
            )
        _require_positions(by_position, "a sequence")
        return cls(_require_length(_column(labels), labels, paths), len(paths))

    def __len__(self) -> int:
        return self._files

    def __getstate__(self) -> dict[str, Any]:
        return {"columns": self._columns, "files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def rows(self, positions: NDArray[np.intp], device: torch.device) -> Any:
        """The labels at these positions: tensors [B, ...] on the device, and lists.

        On the current stream. One copy to the device, and one operation for each column.
        """
        index = upload(torch.from_numpy(positions.astype(np.int64)), device)
        return _map(
            lambda column: (
                column.index_select(0, index)
                if isinstance(column, torch.Tensor)
                else [column[at] for at in positions.tolist()]
            ),
            self._columns_on(device),
        )

    def row(self, position: int, device: torch.device) -> Any:
        """The label at a position: a tensor on the device, or an object."""
        return _map(
            lambda column: (
                column[position].clone() if isinstance(column, torch.Tensor) else column[position]
            ),
            self._columns_on(device),
        )

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


def labels_of(paths: Sequence[Any], device: torch.device) -> Any:
    """The labels of a batch of paths, or of single ones, as `Labels.rows` makes them.

    None if these are not paths that a labelled PathLister has yielded.
    """
    if isinstance(paths, Paths):
        labels, positions = paths.files.labels, paths.positions
    elif paths and all(isinstance(path, NumberedPath) for path in paths):
        labels = paths[0].files.labels
        if any(path.files.labels is not labels for path in paths):
            return None
        positions = np.array([path.position for path in paths], np.intp)
    else:
        return None
    return None if labels is None else labels.rows(positions, device)


def label_of(path: Any, device: torch.device) -> Any:
    """The label of one path, as `Labels.row` makes it; None as in `labels_of`."""
    labels = path.files.labels if isinstance(path, NumberedPath) else None
    return None if labels is None else labels.row(path.position, device)


def _map(function: Callable[[Any], Any], columns: Any) -> Any:
    """The same structure of what a function makes of each column."""
    if isinstance(columns, dict):
        return {name: _map(function, column) for name, column in columns.items()}
    if isinstance(columns, tuple):
        return [_map(function, column) for column in columns]
    return function(columns)


def _column(values: Any) -> Any:
    """A column of the values, in the order of files; several if the values are dicts or tuples.

    Numbers become tensors as default_collate makes them, anything else a list.
    """
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, np.ndarray) and values.dtype.kind in "OSU":
        values = values.tolist()
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    if isinstance(values, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(values).copy())
    values = list(values)
    first = values[0] if values else None
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or value.keys() != first.keys() for value in values):
            raise ValueError("labels that are dicts must all have the same keys")
        return {name: _column([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        if any(not isinstance(value, tuple) or len(value) != len(first) for value in values):
            raise ValueError("labels that are tuples must all have the same length")
        return tuple(_column(list(column)) for column in zip(*values, strict=True))
    try:
        if isinstance(first, list):  # rows of numbers, where they are of one length
            return torch.tensor(values, device="cpu")
        collated = collate_on_host(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    return collated if isinstance(collated, torch.Tensor) else values


def _frame(table: Any) -> Any:
    """The column of a Series, or those of a DataFrame by name."""
    if hasattr(table, "columns"):
        return {name: _column(table[name]) for name in table.columns}
    return _column(table)


def _are_columns(labels: Mapping[Any, Any], files: int) -> bool:
    return bool(labels) and all(
        hasattr(column, "__len__") and not isinstance(column, (str, bytes)) and len(column) == files
        for column in labels.values()
    )


def _require_positions(by_position: bool, what: str) -> None:
    if not by_position:
        raise ValueError(
            f"labels= is {what}, which goes by position; for the files of a directory or a pattern "
            "labels go by name, so that a file that is added shifts none: give a dict, a Series or "
            "DataFrame whose index holds names, or a function of the path. Or give the paths one "
            "by one, in a list"
        )


def _require_length(columns: Any, labels: Any, paths: Sequence[str]) -> Any:
    if len(labels) != len(paths):
        raise ValueError(f"{len(labels)} labels for {len(paths)} files")
    return columns


def _find(paths: Sequence[str], root: str, names: Mapping[str, int]) -> list[int]:
    """Where among the names that of each file is.

    A file may be named by its path as it is listed, by that below the directory, by its own name,
    or by that without its ending: all of them in one way.
    """
    ways: list[tuple[str, Callable[[str], str]]] = [
        ("path", str),
        ("path below the directory", lambda path: path.removeprefix(root)),
        ("name", os.path.basename),
        ("name without its ending", lambda path: os.path.splitext(os.path.basename(path))[0]),
        ("path below the directory without its ending",
         lambda path: os.path.splitext(path.removeprefix(root))[0]),
    ]  # fmt: skip
    best: tuple[int, str, str] | None = None
    for way, name_of in ways:
        found = [names.get(name_of(path), -1) for path in paths]
        missing = found.count(-1)
        if not missing:
            if len(set(found)) < len(found):
                twice = next(n for n, at in enumerate(found) if at in found[:n])
                raise ValueError(
                    f"{paths[twice]!r} and another file have one {way}, and so one label; name "
                    "them by their paths"
                )
            return found
        if best is None or missing < best[0]:
            first = paths[found.index(-1)]
            best = missing, first, name_of(first)
    assert best is not None
    missing, first, name = best
    raise ValueError(
        f"{missing} of {len(paths)} files have no label, the first one {first!r}: labels= has no "
        f"{name!r}"
    )
