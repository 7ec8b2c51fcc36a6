"""Opens the disk cache of a store, from the arguments that its user gives."""

import logging
import os
import shutil
from typing import NamedTuple

from gpucache_pipes.files import PathLike, Source
from gpucache_pipes.files.packed import CHECKS, DiskCache, DiskDirectory
from gpucache_pipes.units import parse_bytes

_log = logging.getLogger("gpucache_pipes")


class DiskOptions(NamedTuple):
    """Arguments of GPUFeatureStore; `path` is its `disk_cache`."""

    path: PathLike | None = None
    max_bytes: int | str | None = None
    check: str = "stat"
    key: str | None = None


def open_disk_cache(source: Source, options: DiskOptions, revalidate: bool) -> DiskCache | None:
    """A disk cache over a source; None if none is wanted, or if it cannot be made.

    The latter is logged: a run goes on without it.

    Raises:
        ValueError: an argument is out of range, or the directory is no disk cache.
    """
    path, max_bytes, check, key = options
    if path is None:
        for name, value, usual in (
            ("bytes", max_bytes, None), ("check", check, "stat"), ("key", key, None)
        ):  # fmt: skip
            if value != usual:
                raise ValueError(f"disk_cache_{name}={value!r} needs disk_cache=, a directory")
        return None
    where = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not where or "\0" in where or "://" in where or os.path.isfile(where):
        raise ValueError(f"disk_cache={path!r} must be the path of a directory on a local disk")
    if check not in CHECKS:
        raise ValueError(f"disk_cache_check={check!r} must be one of {', '.join(CHECKS)}")
    fingerprint = getattr(source, "fingerprint", None)
    if key is not None and (not isinstance(key, str) or not key):
        raise ValueError(f"disk_cache_key={key!r} must be a string that is not empty")
    if key is None and fingerprint is None:
        raise ValueError(
            "disk_cache with a load_fn or a source of your own needs disk_cache_key=, a string "
            "that you change whenever that makes other features of the same files: else the old "
            "ones would come from the disk"
        )
    budget = None
    if max_bytes is not None:
        budget = parse_bytes("disk_cache_bytes", max_bytes, lambda: _disk_bytes(where))
    try:
        directory = DiskDirectory(where, budget)
    except OSError as error:
        _log.warning("no disk cache at %r (%s): all is read from files", where, error)
        return None
    prefix = f"{key or ''}|{fingerprint or ''}"
    return DiskCache(source, directory, check, prefix, always=revalidate)


def _disk_bytes(path: str) -> int | None:
    """The size of the disk that a directory is on, or will be."""
    where = os.path.abspath(path)
    while not os.path.isdir(where) and where != os.path.dirname(where):
        where = os.path.dirname(where)
    try:
        return shutil.disk_usage(where).total
    except OSError:
        return None
