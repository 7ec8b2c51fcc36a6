"""Samples of several files: for each sample a file of every part, such as video and audio."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from gpucache_pipes.files.paths import PathList, Paths, chosen

Parts = tuple[Any, ...]
"""Names of parts: the keys of samples that are dicts, 0, 1, ... for samples that are tuples."""


class Samples(Sequence[Any]):
    """Some samples of several files: what a PathLister over columns of paths yields as a batch.

    Equals, slices and pickles like the list of dicts or tuples of paths that it stands for.

        >>> Samples(("video", "audio"), ["v1.pt", "v2.pt", "a1.pt", "a2.pt"])[1]
        {'video': 'v2.pt', 'audio': 'a2.pt'}

    Args:
        parts: their names.
        paths: the files of all samples, part after part.
    """

    __slots__ = ("parts", "paths")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, parts: Parts, paths: Sequence[Any]) -> None:
        self.parts = parts
        self.paths = paths

    @classmethod
    def of(cls, given: Any) -> "Samples":
        """The samples that a dict of columns, or a sequence of dicts or tuples, stands for.

        Raises:
            ValueError: columns, or rows, that do not fit together.
        """
        columns = given if isinstance(given, Mapping) else columns_of(given)
        require_one_length(columns)
        return cls(tuple(columns), [path for column in columns.values() for path in column])

    @classmethod
    def pick(cls, files: PathList, positions: Any) -> "Samples":
        """The samples at these positions of a list of files."""
        return cls(files.parts, Paths(files, files_of(positions, files)))

    def column(self, part: int) -> Sequence[Any]:
        """The files of a part, by its position among the parts."""
        count = len(self)
        return self.paths[part * count : (part + 1) * count]

    def without(self, left_out: set[int]) -> "Samples":
        """All samples but those to which the files at these positions of `paths` belong."""
        count = len(self)
        lost = {at % count for at in left_out}
        return self._chosen([at for at in range(count) if at not in lost])

    def _chosen(self, rows: Sequence[int]) -> "Samples":
        count = len(self)
        at = [row + part * count for part in range(len(self.parts)) for row in rows]
        return Samples(self.parts, chosen(self.paths, at))

    def __len__(self) -> int:
        return len(self.paths) // len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        rows = zip(*(self.column(at) for at in range(len(self.parts))), strict=True)
        return (joined(self.parts, row) for row in rows)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> "Samples": ...
    def __getitem__(self, at: int | slice) -> Any:
        count = len(self)
        if isinstance(at, slice):
            return self._chosen(range(count)[at])
        rows = range(range(count)[at], len(self.paths), count)
        return joined(self.parts, [self.paths[row] for row in rows])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, Samples)) else NotImplemented

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def as_samples(given: Any) -> Samples | None:
    """The samples that a dict of columns of paths, or a list of dicts or tuples, stands for.

    None for anything else. Raises ValueError as `Samples.of`.
    """
    if isinstance(given, Samples):
        return given
    if type(given) is Paths:  # at once, since every batch passes here
        return None
    if isinstance(given, Mapping):
        return Samples.of(given) if given and all(map(_is_column, given.values())) else None
    if isinstance(given, list) and given and isinstance(given[0], (Mapping, tuple)):
        alike = all(isinstance(row, type(given[0])) for row in given)
        return Samples.of(given) if alike and given[0] else None
    return None


def _is_column(column: Any) -> bool:
    if isinstance(column, (str, bytes, Mapping)):
        return False
    return isinstance(column, Sequence) or getattr(column, "ndim", 0) == 1


def with_their_samples(positions: set[int], files: int, parts: Parts) -> set[int]:
    """These positions, with those of the other files of their samples.

    Args:
        positions: in a list of files, part after part.
        files: how many the list has.
        parts: of the samples; empty if each file is one.

    >>> sorted(with_their_samples({1}, 6, ("video", "audio")))
    [1, 4]
    """
    if not parts:
        return positions
    count = files // len(parts)
    return {at % count + part * count for at in positions for part in range(len(parts))}


def joined(parts: Parts, items: Sequence[Any]) -> Any:
    """An item of each part as what a sample is: a dict, or a tuple.

    >>> joined(("video", "audio"), [1, 2]), joined((0, 1), [1, 2])
    ({'video': 1, 'audio': 2}, (1, 2))
    """
    if parts == tuple(range(len(parts))):
        return tuple(items)
    return dict(zip(parts, items, strict=True))


def files_of(positions: Any, files: PathList) -> Any:
    """The positions of the files of the samples at `positions`, part after part.

    Of positions [batches, 1, samples] as [batches, parts, samples].
    """
    if not files.parts:
        return positions
    found = files.samples * np.arange(len(files.parts))[:, None] + positions
    return found if found.ndim > 2 else found.reshape(-1)


def require_one_length(columns: Mapping[Any, Sequence[Any]]) -> None:
    """Raise ValueError, with the numbers of files, if parts have different ones."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} of {name!r}" for name, count in lengths.items())
        raise ValueError(f"each sample has a file of every part, but there are {counts}")


def columns_of(rows: Sequence[Any]) -> dict[Any, list[Any]]:
    """The columns of rows that are all dicts, or all tuples, lists or arrays.

    Raises:
        ValueError: a row that lacks what the first one has, or has more; it is shown.
    """
    rows = list(rows)
    first = rows[0]
    columns: dict[Any, list[Any]] = {key: [] for key in _keys(first)}
    for row in rows:
        if type(row) is not type(first) or _keys(row) != columns.keys():
            raise ValueError(f"the sample {row!r:.200} does not have the files of {first!r:.200}")
        for key, column in columns.items():
            column.append(row[key])
    return columns


def _keys(row: Any) -> Any:
    """The keys of a dict, or the positions in a sequence."""
    return row.keys() if isinstance(row, Mapping) else dict.fromkeys(range(len(row))).keys()
