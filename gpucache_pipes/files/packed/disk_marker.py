"""The file that marks a directory as a disk cache, and has its budget."""

import contextlib
import json
import os
import time
from pathlib import Path

MARKER = "gpucache-disk-cache.json"
_FORMAT = 1


def require_own(path: str, name: str, max_bytes: int | None) -> None:
    """Make a directory a disk cache unless it is one.

    Args:
        path: of the directory.
        name: of this process.
        max_bytes: the budget of a new one.

    Raises:
        ValueError: the directory holds other things, or belongs to another user.
        OSError: it cannot be made.
    """
    marker = os.path.join(path, MARKER)
    if not os.path.exists(marker):
        os.makedirs(path, mode=0o700, exist_ok=True)
        # Another process may be making it at this moment, or have been killed in the midst of it.
        others = [other for other in os.listdir(path) if not other.startswith(MARKER)]
        if others and not _appears(marker):
            raise ValueError(
                f"disk_cache={path!r} holds {min(others)!r}, which is not of a disk cache: give a "
                "directory of its own"
            )
    if os.geteuid() not in (0, os.stat(path).st_uid):
        raise ValueError(
            f"disk_cache={path!r} belongs to another user: give a directory of your own"
        )
    if not os.path.exists(marker):
        os.chmod(path, 0o700)
        write_marker(path, name, max_bytes)


def write_marker(path: str, name: str, max_bytes: int | None) -> None:
    """Write the marker, at once as a whole. Raises OSError."""
    temporary = os.path.join(path, f"{MARKER}.{name}")
    try:
        with Path(temporary).open("x", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "max_bytes": max_bytes}, file)
        os.rename(temporary, os.path.join(path, MARKER))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def stored_budget(path: str) -> int | None:
    """The budget in bytes of a directory; None if it has none. Raises ValueError, OSError."""
    try:
        with Path(path, MARKER).open(encoding="utf-8") as file:
            about = json.load(file)
        if about["format"] != _FORMAT:
            raise ValueError("it is of a later version of this package")
        stored = about["max_bytes"]
        return stored if type(stored) is int else None
    except (LookupError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"disk_cache={path!r}: {MARKER} cannot be read: {error}") from error


def _appears(path: str) -> bool:
    """Whether a file is there, at the latest after a second."""
    deadline = time.monotonic() + 1
    while not (found := os.path.exists(path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found
