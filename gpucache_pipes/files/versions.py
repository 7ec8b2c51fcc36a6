"""Whether a file is still the one that was read, from what `stat` says of it."""

import os
import struct
import time

RACY_NS = 2_000_000_000
"""Clocks of file systems are coarse: a file that was written this lately may change again and keep
its modification time."""

_VERSION = struct.Struct("=QQQq")


def version_of(status: os.stat_result) -> bytes:
    """Device, inode, size and modification time: at least one changes when the file does."""
    return _VERSION.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def is_racy(status: os.stat_result) -> bool:
    """Whether the file was written so lately that its version may not change when it does."""
    now = time.time_ns()
    return is_racy_between(status.st_mtime_ns, now, now)


def is_racy_between(mtime_ns: int, begun_ns: int, ended_ns: int) -> bool:
    """The same for a file that was looked at between two moments."""
    return begun_ns - RACY_NS <= mtime_ns <= ended_ns + RACY_NS
