"""What users say about object storage."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class RemoteOptions(NamedTuple):
    """How to list objects.

    Attributes:
        storage_options: of the client library.
        list_cache: a file that remembers the result, or None.
        progress: is told how many more objects were listed.
    """

    storage_options: Mapping[str, Any] | None = None
    list_cache: str | os.PathLike[str] | None = None
    progress: Callable[[int], Any] | None = None

    def __repr__(self) -> str:
        return f"RemoteOptions(list_cache={self.list_cache!r})"  # without credentials

    @classmethod
    def of(cls, storage_options: Any, list_cache: Any) -> "RemoteOptions":
        """What a user has given. Raises ValueError for anything else, without showing options."""
        require_options(storage_options)
        path = os.fspath(list_cache) if isinstance(list_cache, (str, os.PathLike)) else list_cache
        if path is not None and (not isinstance(path, str) or not path or os.path.isdir(path)):
            raise ValueError(f"list_cache={list_cache!r} must be the path of a file")
        return cls(storage_options, path)

    def of_part(self, number: int) -> "RemoteOptions":
        """Those for one of several listings, which have a file each."""
        if self.list_cache is None:
            return self
        return self._replace(list_cache=f"{os.fspath(self.list_cache)}.{number}")


def require_options(storage_options: Any) -> None:
    """Raise ValueError for anything but a dict with str for keys, without showing its values."""
    if storage_options is None:
        return
    if not isinstance(storage_options, Mapping) or not all(
        isinstance(name, str) for name in storage_options
    ):
        raise ValueError(
            "storage_options must be a dict of the client library's options, by name, not a "
            f"{type(storage_options).__name__}"
        )
