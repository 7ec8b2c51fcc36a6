"""Which files the source of a PathLister means, where a sample may be several of them."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from gpucache_pipes.files.listing import directory_prefix, find_files
from gpucache_pipes.files.remote.options import RemoteOptions
from gpucache_pipes.files.remote.urls import is_url
from gpucache_pipes.files.samples import Parts, columns_of, require_one_length

_PATHS = (str, os.PathLike)


class Listing(NamedTuple):
    """The files of a source.

    Attributes:
        paths: all of them, part after part.
        parts: see `PathList`; empty if each sample is a file.
        root: the directory below which the files are, or those of the first part, with a separator
            at its end; "" if unknown.
        given: whether the user has given the paths one by one.
        lists: what `find_files` has returned, which may know the sizes of files while it is held.
    """

    paths: list[str]
    parts: Parts
    root: str
    given: bool
    lists: tuple[list[str], ...] = ()


def list_samples(
    source: Any, pattern: str, recursive: bool, remote: RemoteOptions | None = None
) -> Listing:
    """List the files of a directory or a glob, or take the paths of a sequence, as `find_files`.

    Each sample has several files if the source is a dict of such sources, or a sequence of dicts,
    tuples or lists of paths. Files of directories and globs belong together if they have one
    name below these, whatever its ending.

    Raises:
        FileNotFoundError, TypeError, OSError, ImportError: as `find_files`.
        ValueError: as that, or parts that do not fit together; names a file that lacks a partner.
    """
    if isinstance(source, Mapping):
        return _of_columns(source, pattern, recursive, remote)
    if isinstance(source, _PATHS):
        paths = find_files(source, pattern, recursive, remote)
        return Listing(paths, (), directory_prefix(source), False)
    if getattr(source, "ndim", 1) == 0:  # an array that is one str
        return list_samples(source.item(), pattern, recursive, remote)
    first = next(iter(source), None)
    if not isinstance(first, _PATHS) and _is_row(first):
        columns = columns_of(source)
        _require_paths(columns, first)
        return _of_columns(columns, pattern, recursive, remote)
    return Listing(find_files(source, pattern, recursive), (), "", True)


def _is_row(item: Any) -> bool:
    return isinstance(item, (tuple, list, Mapping)) or getattr(item, "ndim", 0) == 1


def _require_paths(columns: Mapping[Any, Sequence[Any]], first: Any) -> None:
    """Raise TypeError if the rows of a source hold more than paths."""
    if not columns:
        raise FileNotFoundError("the samples have no files")
    what = "labels={...}" if isinstance(first, Mapping) else "labels=[...]"
    likely = {name: any(map(_looks_like_path, column)) for name, column in columns.items()}
    for name, column in columns.items():
        wrong = next((item for item in column if not isinstance(item, _PATHS)), None)
        if wrong is not None:
            raise TypeError(
                f"a path is a str or an os.PathLike of one, not {wrong!r:.80}, which is {name!r} "
                f"of a sample: give the paths alone, and what belongs to them as {what}"
            )
        if not likely[name] and any(likely.values()):  # else they are names for a load_fn
            raise TypeError(
                f"{column[0]!r:.80}, which is {name!r} of a sample, does not look like a path: "
                f"give the paths alone, and what belongs to them as {what}"
            )


def _looks_like_path(item: Any) -> bool:
    """Whether it is meant as the path of a file, and not as the name of a class."""
    return isinstance(item, os.PathLike) or (isinstance(item, str) and ("." in item or "/" in item))


def _of_columns(
    source: Mapping[Any, Any], pattern: str, recursive: bool, remote: RemoteOptions | None
) -> Listing:
    parts = tuple(source)
    for name, column in source.items():
        is_name = isinstance(column, str) and not _looks_like_path(column)
        if (is_name and not os.path.exists(column)) or (
            not isinstance(column, _PATHS)
            and (isinstance(column, (bytes, Mapping)) or not hasattr(column, "__len__"))
        ):
            raise TypeError(
                f"the source is a dict, which has for each part of a sample a directory, a glob or "
                f"a column of paths, but {name!r} is {column!r:.80}. For one file a sample give "
                "the keys as the paths, list(...), and the dict as labels="
            )
    if not parts:
        raise FileNotFoundError("the source is an empty dict")
    named = [name for name, column in source.items() if isinstance(column, _PATHS)]
    if named and len(named) < len(parts):
        other = next(name for name in parts if name not in named)
        raise ValueError(
            f"{named[0]!r} is listed, and {other!r} is a column of paths: give columns for all "
            "parts, or a directory or a glob for each"
        )
    remote = remote or RemoteOptions()
    columns = [
        find_files(source[name], pattern, recursive, remote.of_part(number))
        for number, name in enumerate(parts)
    ]
    if not named:
        require_one_length(dict(zip(parts, columns, strict=True)))
        return Listing(list(chain.from_iterable(columns)), parts, "", True)
    roots = [_root(source[name]) for name in parts]
    paths = _by_name(parts, columns, roots)
    return Listing(paths, parts, roots[0], False, tuple(columns))


def _root(where: Any) -> str:
    """The directory below which a directory or a glob names files, with a separator at its end."""
    if root := directory_prefix(where):
        return root
    path = os.fspath(where)
    if os.path.isfile(path):
        return str(path[: path.rfind(os.sep) + 1])
    fixed = []
    for part in path.split(os.sep)[:-1]:
        literal = _ESCAPED.sub(r"\1", part)
        if glob.escape(literal) != part and glob.has_magic(part):
            break
        fixed.append(literal)
    return "".join(f"{part}{os.sep}" for part in fixed)


_ESCAPED = re.compile(r"\[([*?[])\]")
"""What `glob.escape` makes of a character that has a meaning in globs."""


def _name(path: str, root: str) -> str:
    """The name of a file below the root, without its ending, by which parts are matched."""
    if is_url(path):
        return os.path.splitext(path.removeprefix(root))[0]
    below = os.path.normpath(path)
    if root:
        below = below.removeprefix(os.path.join(os.path.normpath(root), ""))
    return os.path.splitext(below)[0]


def _by_name(parts: Parts, columns: Sequence[list[str]], roots: Sequence[str]) -> list[str]:
    """The files of all parts, in the order of those of the first part."""
    tables: list[dict[str, str]] = []
    for name, column, root in zip(parts, columns, roots, strict=True):
        table: dict[str, str] = {}
        for path in column:
            stem = _name(path, root)
            if stem in table:
                raise ValueError(
                    f"{table[stem]!r} and {path!r} of {name!r} have one name, by which files of "
                    "parts are matched: give a narrower glob, or columns of paths"
                )
            table[stem] = path
        tables.append(table)
    for name, table in zip(parts, tables, strict=True):
        for other, others in zip(parts, tables, strict=True):
            lacking = [path for stem, path in table.items() if stem not in others]
            if lacking:
                raise ValueError(
                    f"{len(lacking)} of {len(table)} files of {name!r} have no file of that name "
                    f"in {other!r}, the first one {lacking[0]!r}; to leave them out, give columns "
                    "of paths"
                )
    return [table[stem] for table in tables for stem in tables[0]]
