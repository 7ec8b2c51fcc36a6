"""Files whose features lie in them as plain stretches of bytes: a plan, and what it reads."""

import io
import os
import stat
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout, Leaf
from gpucache_pipes.files.source import OpenFeature, spread
from gpucache_pipes.files.versions import is_racy, version_of

SMALL = 64 << 10
"""Files up to this size are read whole, by one system call."""

_WINDOW = 4096
_MOST_FILES = 1 << 20
"""Files whose plan is remembered, at about 170 bytes each."""

_MOST_BYTES = 1 << 30
"""What the plans of files may take, each counted in full although most are shared."""

DEAREST = 1 << 17
"""Plans that cost more, such as those that hold long texts, are not remembered."""

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class Extent(NamedTuple):
    """`nbytes` bytes at `start` of the file are those at `offset` of the feature."""

    start: int
    offset: int
    nbytes: int


class View(NamedTuple):
    """A leaf that is not contiguous in the file: `nbytes` bytes from `start` on hold it."""

    start: int
    nbytes: int
    strides: tuple[int, ...]
    leaf: Leaf


class Plan(NamedTuple):
    """How to make a feature of the bytes of a file that has a certain form and pickle."""

    layout: Layout
    values: tuple[Any, ...]
    moves: tuple[Extent, ...]
    views: tuple[View, ...]
    # About how many bytes it takes to remember it.
    cost: int = 1000


class Bytes:
    """A file of which all is in memory."""

    def __init__(self, data: bytes) -> None:
        self.whole: bytes | None = data
        self.size = len(data)

    def read(self, start: int, count: int) -> bytes:
        """Exactly these bytes, or Unsupported."""
        assert self.whole is not None
        if start < 0 or start + count > self.size:
            raise Unsupported("a record that is not in the file")
        return self.whole[start : start + count]

    def unpack(self, layout: struct.Struct, start: int) -> tuple[Any, ...]:
        """What is there, or Unsupported."""
        if self.whole is None or start + layout.size > self.size:
            return layout.unpack(self.read(start, layout.size))
        return layout.unpack_from(self.whole, start)


class Windows(Bytes):
    """A large file: its first and last 4 KiB are kept, which is where small records lie."""

    def __init__(self, fd: int, size: int) -> None:
        self.whole = None
        self.size = size
        self._fd = fd
        last = max(0, size - _WINDOW)
        self._kept = [(0, os.pread(fd, _WINDOW, 0)), (last, os.pread(fd, _WINDOW, last))]

    def read(self, start: int, count: int) -> bytes:
        """See Bytes."""
        if start < 0 or start + count > self.size:
            raise Unsupported("a record that is not in the file")
        for at, window in self._kept:
            if at <= start and start + count <= at + len(window):
                return window[start - at : start - at + count]
        data = os.pread(self._fd, count, start)
        if len(data) != count:
            raise Unsupported("the file changes while it is read")
        return data


class PlanReader:
    """Opens files of one format; subclasses say how to plan one. For any number of threads."""

    def __init__(self) -> None:
        # By the version of the file. No tuples: millions of
        # objects that the garbage collector must walk would cost more than the reading.
        self._plans: dict[bytes, Plan] = {}
        self._cost = 0

    def plan(self, file: Bytes) -> Plan:
        """How to read this file. Raises Unsupported."""
        raise NotImplementedError

    def _remember(self, version: bytes, plan: Plan) -> None:
        self._cost += plan.cost
        if len(self._plans) >= _MOST_FILES or self._cost > _MOST_BYTES:
            self._plans.clear()
            self._cost = plan.cost
        self._plans[version] = plan

    def open(self, path: str) -> OpenFeature:
        """The feature in the file. Raises Unsupported, OSError."""
        feature = PlannedFeature(path)
        try:
            status = os.fstat(feature.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path!r} is not a regular file")
            size = status.st_size
            version = version_of(status)
            plan = self._plans.get(version)
            if plan is not None:
                feature.follow(plan, b"")
                return feature
            data = b""
            if size <= SMALL:
                data = os.read(feature.fd, size + 1)
                if len(data) != size:
                    raise Unsupported("the file changes while it is read")
                plan = self.plan(Bytes(data))
            else:
                plan = self.plan(Windows(feature.fd, size))
            if plan.cost <= DEAREST and not is_racy(status):
                self._remember(version, plan)
            feature.follow(plan, data)
        except BaseException:
            feature.close()
            raise
        return feature


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: a FIFO must not hold up a reader thread.
    return os.open(path, _FLAGS)


class PlannedFeature:
    """An OpenFeature that owns its descriptor, from the moment on that there is one.

    Nothing else closes it: the number of a descriptor that is closed twice may by then be that of
    another thread's file. A FileIO opens it, which closes it by itself where an interrupt has come
    before `close`; a `__del__` of our own would swallow what a signal handler raises in it.

    Attributes:
        fd: the descriptor.
    """

    layout: Layout
    values: tuple[Any, ...]

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = io.FileIO(path, opener=_open)
        except IsADirectoryError:
            raise IsADirectoryError(f"{path!r} is a directory") from None
        self.fd = self._file.fileno()

    def follow(self, plan: Plan, data: bytes) -> None:
        """Read by `plan`; `data` is all of the file, if it was read to find the plan."""
        self.layout = plan.layout
        self.values = plan.values
        self._plan = plan
        self._data = memoryview(data)

    @property
    def bytes_read(self) -> int:
        """See OpenFeature."""
        if self._data:
            return len(self._data)
        moved = sum(move.nbytes for move in self._plan.moves)
        return moved + sum(view.nbytes for view in self._plan.views)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        data, single = self._data, buffers[0] if len(buffers) == 1 else None
        for start, offset, nbytes in self._plan.moves:
            if data and single is not None:
                single[offset : offset + nbytes] = data[start : start + nbytes]
                continue
            parts = [single[offset : offset + nbytes]] if single else _cut(buffers, offset, nbytes)
            if data:
                for part in parts:
                    part[:] = data[start : start + len(part)]
                    start += len(part)
            else:
                self._read(parts, start)
        for start, nbytes, strides, leaf in self._plan.views:
            held = bytearray(nbytes)
            self._read([memoryview(held)], start)
            view = torch.frombuffer(held, dtype=leaf.dtype).as_strided(leaf.shape, strides)
            spread(view.contiguous().view(-1).view(torch.uint8), leaf.offset, buffers)

    def _read(self, parts: list[memoryview], start: int) -> None:
        while parts:
            count = os.preadv(self.fd, parts[:_MOST_PARTS], start)
            if not count:
                raise OSError(f"{self._path!r} ends early: it has changed while it was read")
            start += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = parts[0][count:]

    def close(self) -> None:
        """See OpenFeature."""
        self._file.close()


_MOST_PARTS = 512
"""Buffers for one system call; the system's own limit is 1024 or more."""


def _cut(buffers: Sequence[memoryview], offset: int, nbytes: int) -> list[memoryview]:
    """`nbytes` bytes at `offset` of the buffers taken as one."""
    parts = []
    for buffer in buffers:
        if offset < len(buffer):
            part = buffer[offset : offset + nbytes]
            parts.append(part)
            nbytes -= len(part)
            if not nbytes:
                break
        offset = max(0, offset - len(buffer))
    return parts
