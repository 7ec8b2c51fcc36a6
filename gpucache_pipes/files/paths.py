"""Paths by number: a read-only sequence of str over a list of files."""

import os
import re
from collections.abc import Container, Iterator, Sequence
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
    """A path that knows where in its list it is. Pickles and copies as the str that it is.

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


class Paths(Sequence[str]):
    """Some of a list of files: what a PathLister yields as a batch.

    Equals, slices, adds and pickles like the list of str that it stands for, and cannot be changed.
    A store finds its files by their numbers, without a look at each str.

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
        return map(self.files.paths.__getitem__, self.positions.tolist())

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> "Paths": ...
    def __getitem__(self, at: int | slice) -> "str | Paths":
        if isinstance(at, slice):
            return Paths(self.files, self.positions[at])
        return self.files.paths[int(self.positions[at])]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (list, Paths)) else NotImplemented

    def __add__(self, other: Sequence[str]) -> list[str]:
        return [*self, *other]

    def __radd__(self, other: Sequence[str]) -> list[str]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))

    def without(self, left_out: Container[int]) -> "Paths":
        """All but those at these positions of this sequence."""
        kept = [at for at in range(len(self)) if at not in left_out]
        return Paths(self.files, self.positions[kept])

    def absolute(self) -> list[str]:
        """The paths, relative ones joined to the current directory in which they are meant."""
        cwd = self.files.cwd
        return [path if cwd is None or URL.match(path) else os.path.join(cwd, path)
                for path in self]  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)
