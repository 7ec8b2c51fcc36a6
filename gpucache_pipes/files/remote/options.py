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
