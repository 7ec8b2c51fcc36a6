"""Whether a file is still the one that was read."""

import os
import struct
import time

RACY_NS = 2_000_000_000
"""A file may change without its time changing, if it has just been written: clocks are coarse."""

_VERSION = struct.Struct("=QQQq")


def version_of(status: os.stat_result) -> bytes:
    """What changes when the file does: device, inode, size and modification time."""
    return _VERSION.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def is_racy(status: os.stat_result) -> bool:
    """Whether the file was written so lately that its version may not change if it changes."""
    return abs(time.time_ns() - status.st_mtime_ns) <= RACY_NS


def has_version(path: str, version: bytes | None) -> bool:
    """Whether the file at `path` is certainly still the one that had this version."""
    try:
        return version is not None and version_of(os.stat(path)) == version
    except (OSError, ValueError):  # ValueError: no name that the system could have
        return False


def file_version(path: str) -> bytes | None:
    """The version of the file at `path`; None where it has none that could be relied on."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return None if is_racy(status) else version_of(status)
