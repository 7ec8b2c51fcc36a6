"""Finds which label is whose: names of labels, and the files of a lister."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def numbered_names(names: Iterable[Any]) -> dict[str, int]:
    """The position of each name.

    Raises:
        TypeError: one is not a path or a name.
        ValueError: one is there twice.
    """
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        if not isinstance(name, (str, os.PathLike)):
            raise TypeError(
                f"labels= has the key {name!r:.80}, which is no name of a file: keys are paths, or "
                "names with or without their endings"
            )
        key = os.fspath(name)
        if key in found:
            raise ValueError(f"labels= has the name {key!r} twice")
        found[key] = position
    return found


def find(paths: Sequence[str], root: str, names: Mapping[str, int]) -> list[int]:
    """The position of the label of each file.

    A file may be named by its path as it is listed, by that below the directory, or by its own
    name, each with or without its ending; all of them in one way, the most specific one that fits.

    Args:
        paths: of the files; repeats are one file.
        root: the directory below which they are, with a separator at its end; "" if unknown.
        names: positions by name.

    Raises:
        ValueError: a file has no label, or two files would have one.
    """
    reason = ""
    fewest = len(paths) + 1
    for way, name_of in _ways(root):
        found = [names.get(name_of(path), -1) for path in paths]
        missing = found.count(-1)
        if missing:
            if missing < fewest:
                fewest, reason = missing, _missing(paths, found, name_of, names)
            continue
        shared = _shared(paths, found)
        if shared is None:
            return found
        if fewest:
            fewest = 0
            reason = (
                f"{shared[0]!r} and {shared[1]!r} have one {way}, and so one label: name them by "
                "their paths"
            )
    raise ValueError(reason)


def names_any(paths: Sequence[str], root: str, names: Mapping[Any, Any]) -> bool:
    """Whether any of these names is that of a file."""
    known = set(names)
    return any(name_of(path) in known for _, name_of in _ways(root) for path in paths)


def _ways(root: str) -> list[tuple[str, Callable[[str], str]]]:
    def below(path: str) -> str:
        return path.removeprefix(root)

    def without_ending(path: str) -> str:
        return os.path.splitext(path)[0]

    return [
        ("path", str),
        ("path below the directory", below),
        ("path without its ending", without_ending),
        ("path below the directory without its ending", lambda path: without_ending(below(path))),
        ("name", os.path.basename),
        ("name without its ending", lambda path: without_ending(os.path.basename(path))),
    ]


def _shared(paths: Sequence[str], found: Sequence[int]) -> tuple[str, str] | None:
    """Two files that have one label."""
    owner: dict[int, str] = {}
    for path, position in zip(paths, found, strict=True):
        if owner.setdefault(position, path) != path:
            return owner[position], path
    return None


def _missing(
    paths: Sequence[str],
    found: Sequence[int],
    name_of: Callable[[str], str],
    names: Mapping[str, int],
) -> str:
    first = paths[found.index(-1)]
    known = f", but names such as {next(iter(names))!r}" if names else " and is empty"
    return (
        f"{found.count(-1)} of {len(paths)} files have no label, the first one {first!r}: labels= "
        f"has no {name_of(first)!r}{known}. For a part of the files, list the paths of that part"
    )
