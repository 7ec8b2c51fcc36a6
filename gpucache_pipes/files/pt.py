"""`.pt` files at the speed of their bytes, and never their code.

A file that torch.save wrote is a zip file of stored records: `data.pkl` says what the feature
is, `data/<n>` are the bytes of its storages. Here the directory is parsed, the pickle is read by
an interpreter that knows tensors and nothing else, and the bytes go straight to their place.

Most of it happens once for a data set: what a directory and a pickle mean is remembered as a
plan, and another file that has the same two (but for names and checksums) costs one read and a
comparison. For the next time that a file is read, its plan is remembered as well, as long as
inode, size and modification time stay the same.

Files that are anything else are Unsupported here, and torch.load decides.
"""

import os
import stat
import struct
import sys
from collections.abc import Sequence

import torch

from gpucache_pipes.files import zip_directory as zips
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.form import Form, Plan
from gpucache_pipes.files.source import OpenFeature, spread

SMALL = 64 << 10
"""Files up to this size are read whole, by one system call."""

_MOST_FORMS = 1024
_FORMS_OF_A_KIND = 7
_MOST_FILES = 1 << 20
"""Files whose plan is remembered, at about 170 bytes each."""

_SIGNATURE = struct.Struct("=QQQq")
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class PtReader:
    """Opens `.pt` files; remembers directories, plans and paths. For any number of threads."""

    def __init__(self) -> None:
        self._forms: dict[zips.Tail, list[Form]] = {}
        # By device, inode, size and modification time of the file. No tuples: millions of
        # objects that the garbage collector must walk would cost more than the reading.
        self._plans: dict[bytes, Plan] = {}

    def open(self, path: str) -> OpenFeature:
        """The feature in the file. Raises Unsupported, OSError."""
        # O_NONBLOCK: a FIFO must not hold up a reader thread.
        fd = os.open(path, _FLAGS)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(f"{path!r} is a directory")
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path!r} is not a regular file")
            size = status.st_size
            signature = _SIGNATURE.pack(status.st_dev, status.st_ino, size, status.st_mtime_ns)
            plan = self._plans.get(signature)
            if plan is not None:
                return PtFeature(path, fd, plan, b"")
            data = b""
            if size <= SMALL:
                data = os.read(fd, size + 1)
                if len(data) != size:
                    raise Unsupported("the file changes while it is read")
                plan = self._plan(zips.Bytes(data))
            else:
                plan = self._plan(zips.Windows(fd, size))
            if len(self._plans) >= _MOST_FILES:
                self._plans.clear()
            self._plans[signature] = plan
            return PtFeature(path, fd, plan, data)
        except BaseException:
            os.close(fd)
            raise

    def _plan(self, file: zips.Bytes) -> Plan:
        if sys.byteorder != "little":
            raise Unsupported("a big-endian machine")
        tail = zips.find_directory(file)
        raw = file.read(tail.offset, tail.size)
        forms = self._forms.get(tail, ())
        for form in forms:
            plan = form.plan(file, raw)
            if plan is not None:
                return plan
        form = Form(file, zips.Directory(raw, tail.entries))
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        self._forms[tail] = [form, *forms[:_FORMS_OF_A_KIND]]
        return form.first_plan


class PtFeature:
    """An OpenFeature of which the plan is known; see there."""

    def __init__(self, path: str, fd: int, plan: Plan, data: bytes) -> None:
        self.layout = plan.layout
        self.values = plan.values
        self._path = path
        self._fd = fd
        self._plan = plan
        # All of the file, if it is small and was read to find the plan.
        self._data = memoryview(data)
        views = sum(view.nbytes for view in plan.views)
        self.bytes_read = len(data) or sum(move.nbytes for move in plan.moves) + views

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
            count = os.preadv(self._fd, parts[:_MOST_PARTS], start)
            if not count:
                raise OSError(f"{self._path!r} ends early: it has changed while it was read")
            start += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = parts[0][count:]

    def close(self) -> None:
        """See OpenFeature."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()


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
