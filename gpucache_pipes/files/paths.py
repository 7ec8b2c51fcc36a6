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
        parts: where a sample is several files, the names of its parts, see `Samples`; the paths
            are then part after part. Else empty.
        labels: what belongs to each sample, by its position; None if nothing does.
    """

    __slots__ = ("__weakref__", "cwd", "labels", "parts", "paths")

    def __init__(
        self, paths: list[str], cwd: str | None = None, parts: tuple[Any, ...] = ()
    ) -> None:
        self.paths = paths
        self.cwd = cwd
        self.parts = parts
        self.labels: Any = None

    @property
    def samples(self) -> int:
        """How many there are: files, unless a sample is several of them."""
        return len(self.paths) // max(1, len(self.parts))

    @classmethod
    def here(cls, paths: list[str], parts: tuple[Any, ...] = ()) -> "PathList":
        """Paths that are meant in the current directory."""
        # Strings that begin with a slash, or with one scheme, are neighbours in their order.
        first, last = (min(paths), max(paths)) if paths else ("/", "/")
        url = URL.match(first)
        absolute = last.startswith(url[0]) if url else os.path.isabs(first) and os.path.isabs(last)
        return cls(paths, None if absolute else os.getcwd(), parts)


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
    return chosen(paths, [at for at in range(len(paths)) if at not in left_out])


def chosen(paths: Sequence[Any], at: Sequence[int]) -> Sequence[Any]:
    """Those of a sequence of paths that are at these positions of it."""
    if isinstance(paths, Paths):
        return Paths(paths.files, paths.positions[at])
    return [paths[n] for n in at]
