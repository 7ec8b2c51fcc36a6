"""Paths by number: a read-only sequence of str over a list of files."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class PathList:
    """All files of a pipeline, in a list that does not change.

    Attributes:
        paths: the paths.
        cwd: the current directory in which relative ones among them are meant; None if all are
            absolute.
        labels: what belongs to each path, by its position; None if nothing does.
    """

    __slots__ = ("__weakref__", "cwd", "labels", "paths")

    def __init__(self, paths: list[str], cwd: str | None = None) -> None:
        self.paths = paths
        self.cwd = cwd
        self.labels: Any = None

    @classmethod
    def here(cls, paths: list[str]) -> "PathList":
        """Paths that are meant in the current directory."""
        # Strings that begin with a slash are neighbours in the order of strings.
        absolute = not paths or (os.path.isabs(min(paths)) and os.path.isabs(max(paths)))
        return cls(paths, None if absolute else os.getcwd())


class NumberedPath(str):
    """A path of a list that has labels, which knows where in it it is. Pickles as a str.

    Attributes:
        files: the list.
        position: of the path in it.
    """

    files: PathList
    position: int

    @classmethod
    def of(cls, files: PathList, position: int) -> "NumberedPath":
        """The path at this position."""
        path = cls(files.paths[position])
        path.files, path.position = files, position
        return path

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)

    def __copy__(self) -> "NumberedPath":
        return self  # immutable, as every str


class Paths(Sequence[str]):
    """Some of a list of files: what a PathLister yields as a batch.

    Equals, slices, adds and pickles like the list of str that it stands for, and cannot be changed.
    A store finds its files by their numbers, without a look at each str. Where the list has
    labels, its items are `NumberedPath`.

        >>> Paths(PathList(["a.pt", "b.pt", "c.pt"]), np.array([2, 0]))
        ['c.pt', 'a.pt']

    Args:
        files: the list.
        positions: those in it.
    """

    __slots__ = ("files", "positions")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, files: PathList, positions: NDArray[np.intp]) -> None:
        self.files = files
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[str]:
        if self.files.labels is None:
            return map(self.files.paths.__getitem__, self.positions.tolist())
        return map(partial(NumberedPath.of, self.files), self.positions.tolist())

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "Paths": ...
    def __getitem__(self, at: int | slice) -> "str | Paths":
        if isinstance(at, slice):
            return Paths(self.files, self.positions[at])
        position = int(self.positions[at])
        if self.files.labels is None:
            return self.files.paths[position]
        return NumberedPath.of(self.files, position)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, Paths)) else NotImplemented

    def __add__(self, other: Sequence[str]) -> list[str]:
        return [*self, *other]

    def __radd__(self, other: Sequence[str]) -> list[str]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))

    def absolute(self) -> list[str]:
        """The paths, relative ones joined to the current directory in which they are meant."""
        cwd = self.files.cwd
        paths = map(self.files.paths.__getitem__, self.positions.tolist())
        return [path if cwd is None or URL.match(path) else os.path.join(cwd, path)
                for path in paths]  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def paths_without(paths: Sequence[Any], left_out: Collection[int]) -> Sequence[Any]:
    """All of a sequence of paths but those at these positions of it."""
    if not left_out:
        return paths
    kept = [at for at in range(len(paths)) if at not in left_out]
    if isinstance(paths, Paths):
        return Paths(paths.files, paths.positions[kept])
    return [paths[at] for at in kept]


_POSITIONS = "label_positions"


def as_plain_data(element: Any) -> Any:
    """Paths for a state: a list, or with labels also their positions. Anything else as it is."""
    if isinstance(element, NumberedPath):
        return {_POSITIONS: element.position, "paths": str(element)}
    if isinstance(element, Paths):
        paths = [str(path) for path in element]
        if element.files.labels is None:
            return paths
        return {_POSITIONS: element.positions.tolist(), "paths": paths}
    return element


def from_plain_data(data: Any, files: PathList | None, given: Sequence[str]) -> Any:
    """What `as_plain_data` was given, if these are still the files; else the paths alone.

    Args:
        data: from a state.
        files: the list of files, with labels; None if there is none.
        given: its paths as they were first.
    """
    if not isinstance(data, dict) or data.keys() != {_POSITIONS, "paths"}:
        return data
    positions, paths = data[_POSITIONS], data["paths"]
    single = isinstance(positions, int)
    pairs = [(positions, paths)] if single else list(zip(positions, paths, strict=True))
    if (
        files is None
        or files.labels is None
        or any(at >= len(given) or path not in (given[at], files.paths[at]) for at, path in pairs)
    ):
        return paths
    if single:
        return NumberedPath.of(files, positions)
    return Paths(files, np.array(positions, np.intp))
