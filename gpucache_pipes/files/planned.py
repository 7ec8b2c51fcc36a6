"""Formats that store tensors as plain byte ranges: the features that are read by their plans."""

import io
import os
import stat
import struct
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.layout import Layout
from gpucache_pipes.files.plans import FormParts, PlanFamily, ReadPlan
from gpucache_pipes.files.strided import copy_one
from gpucache_pipes.files.versions import is_racy, version_of

MAX_WHOLE_BYTES = 64 << 10
"""Files up to this size are read whole, by one system call."""

_WINDOW_BYTES = 4096
_MAX_PLANS = 1 << 20
"""Files whose read plan is remembered, at about 170 bytes each."""

_MAX_COST = 1 << 30
"""Bytes for the read plans of files. Each file counts in full, although most plans are shared."""

MAX_PLAN_COST = 1 << 17
"""Read plans that cost more are not remembered; plans that hold long strings do, for example."""

_MAX_BUFFERS_PER_CALL = 512
"""Buffers for one system call; the system's own limit is 1024 or more."""

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


Plan = ReadPlan
"""The former name."""


class Bytes:
    """The bytes of a file, all of which are in memory.

    Attributes:
        whole: the bytes; None in the subclass that does not hold all of them.
        size: the size of the file in bytes.
    """

    def __init__(self, data: bytes) -> None:
        self.whole: bytes | None = data
        self.size = len(data)

    def read(self, start: int, count: int) -> bytes:
        """Return exactly `count` bytes from `start` on. Raises Unsupported if the file ends."""
        assert self.whole is not None
        if start < 0 or start + count > self.size:
            raise Unsupported("the file names bytes beyond its end")
        return self.whole[start : start + count]

    def expect(self, ranges: "Sequence[tuple[int, int]]") -> None:
        """Several of these ranges, (start, count), will be read: they may be fetched at once."""

    def unpack(self, layout: struct.Struct, start: int) -> tuple[Any, ...]:
        """Return the fields of the struct at `start`. Raises Unsupported if the file ends."""
        if self.whole is None or start + layout.size > self.size:
            return layout.unpack(self.read(start, layout.size))
        return layout.unpack_from(self.whole, start)


class Windows(Bytes):
    """The bytes of a large file, which are read when they are needed.

    The first and the last 4 KiB are kept in memory: small records and headers lie there.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.whole = None
        self.size = size
        self._fd = fd
        last = max(0, size - _WINDOW_BYTES)
        self._windows = [
            (0, os.pread(fd, _WINDOW_BYTES, 0)),
            (last, os.pread(fd, _WINDOW_BYTES, last)),
        ]

    def read(self, start: int, count: int) -> bytes:
        """See Bytes. Also raises Unsupported if the file shrinks meanwhile."""
        if start < 0 or start + count > self.size:
            raise Unsupported("the file names bytes beyond its end")
        for at, window in self._windows:
            if at <= start and start + count <= at + len(window):
                return window[start - at : start - at + count]
        data = os.pread(self._fd, count, start)
        if len(data) != count:
            raise Unsupported("the file changes while it is read")
        return data


class Parsed(NamedTuple):
    """What is to be known of a file.

    Attributes:
        plan: its read plan.
        form: returns its form: what another file must have in common with it to be read by its
            plan. None if that cannot be said.
        family: returns a name and the family that the file is of, if that is known. A family takes
            the place of the one that had its name before.
    """

    plan: ReadPlan
    form: Callable[[], FormParts | None]
    family: Callable[[], tuple[Hashable, PlanFamily] | None]


if TYPE_CHECKING:
    from gpucache_pipes.files.selection import Selection


class PlanReader:
    """Opens files of one format. A subclass implements `plan`; this class remembers the results.

    Any number of threads may open files by one reader.
    """

    # `_plans` is shared by all reader threads without a lock. That relies on `get`, item
    # assignment and `clear` of a dict being atomic under the GIL; the keys are bytes, so no Python
    # code runs in between. What is not atomic is `remember` as a whole and `_cost += ...`: two
    # threads can lose one addition, or clear the dict twice. The bound is then approximate, and
    # a plan that is lost is made again.

    selection: "Selection | None" = None
    """What is kept of each feature; None is all."""

    def __init__(self) -> None:
        # Keyed by the version of the file. Versions are bytes, not tuples: the garbage collector
        # would have to visit millions of tuples, which would take longer than reading the files.
        self._plans: dict[bytes, ReadPlan] = {}
        self._cost = 0

    def plan(self, file: Bytes) -> ReadPlan:
        """Return the read plan of a file.

        The reader thread calls this with no lock held. Plans may be shared between files, and are
        kept for a file until its version changes.

        Raises:
            Unsupported: the file is not, or not certainly, of the format that this reader knows.
        """
        raise NotImplementedError

    def form(self, file: Bytes, plan: ReadPlan) -> FormParts | None:
        """See Parsed. Where there is none, files are parsed one by one."""
        return None

    def family(self, file: Bytes, plan: ReadPlan) -> tuple[Hashable, PlanFamily] | None:
        """See Parsed."""
        return None

    def parse(self, file: Bytes) -> Parsed:
        """All that is to be known of a file. Raises as `plan` does."""
        plan = self.plan(file)
        return Parsed(plan, partial(self.form, file, plan), partial(self.family, file, plan))

    def selected(self, plan: ReadPlan) -> ReadPlan:
        """The plan that reads what is kept of a feature. Raises ValueError if it lacks that."""
        return plan if self.selection is None else self.selection.plan(plan)

    def remembered(self, version: bytes) -> ReadPlan | None:
        """The read plan of the file that has this version, if it is remembered."""
        return self._plans.get(version)

    def remember(self, version: bytes, plan: ReadPlan) -> None:
        """Remember the read plan of a file, unless it is large."""
        if plan.cost > MAX_PLAN_COST:
            return
        self._cost += plan.cost
        if len(self._plans) >= _MAX_PLANS or self._cost > _MAX_COST:
            self._plans.clear()
            self._cost = plan.cost
        self._plans[version] = plan

    def open(self, path: str) -> "PlannedFeature":
        """Open the feature in a file. The caller closes it.

        Raises:
            Unsupported: see `plan`.
            OSError: the file cannot be opened or read, or is not a regular file.
        """
        feature = PlannedFeature(path)
        try:
            status = os.fstat(feature.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path!r} is not a regular file")
            size = status.st_size
            version = version_of(status)
            plan = self.remembered(version)
            if plan is not None:
                feature.follow(plan, b"")
                return feature
            data = b""
            if size <= MAX_WHOLE_BYTES:
                data = os.read(feature.fd, size + 1)
                if len(data) != size:
                    raise Unsupported("the file changes while it is read")
                plan = self.selected(self.plan(Bytes(data)))
            else:
                plan = self.selected(self.plan(Windows(feature.fd, size)))
            if not is_racy(status):
                self.remember(version, plan)
            feature.follow(plan, data)
        except BaseException:
            feature.close()
            raise
        return feature


def _open(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO must not block a reader thread.
    return os.open(path, _FLAGS)


class PlannedFeature:
    """An OpenFeature that reads the bytes of a file by a read plan.

    It owns the descriptor of the file from the moment on that there is one, and nothing else
    closes it. If a descriptor is closed twice, its number may by then belong to a file that another
    thread has opened.

    A FileIO opens the file, because it closes the descriptor by itself if an interrupt prevents the
    call of `close`. What does not work: a bare descriptor from `os.open`. An interrupt before its
    number is stored leaks it, and an interrupt between `os.close` and the note that it is closed
    makes the next `close` close it twice. A `__del__` of this class would not leak it, but would
    swallow an exception that a signal handler raises in it.

    Attributes:
        fd: the descriptor.
        plan: how to read it; set by `follow`.
        layout: see OpenFeature; set by `follow`.
        values: see OpenFeature; set by `follow`.
    """

    plan: ReadPlan
    layout: Layout
    values: tuple[Any, ...]

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = io.FileIO(path, opener=_open)
        except IsADirectoryError:
            raise IsADirectoryError(f"{path!r} is a directory") from None
        self.fd = self._file.fileno()

    def follow(self, plan: ReadPlan, data: bytes) -> None:
        """Read by `plan`. `data` is the whole file if finding the plan has read it, or empty."""
        self.layout = plan.layout
        self.values = plan.values
        self.plan = plan
        self._data = memoryview(data)

    @property
    def bytes_read(self) -> int:
        """See OpenFeature."""
        if self._data:
            return len(self._data)
        contiguous = sum(extent.nbytes for extent in self.plan.extents)
        return contiguous + sum(extent.nbytes for extent in self.plan.strided_extents)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature. Raises OSError if the file ends before an extent does."""
        if self._data:
            fill(self.plan, self._data, buffers)
            return
        for start, offset, nbytes in self.plan.extents:
            self._read(cut(buffers, offset, nbytes), start)
        for extent in self.plan.strided_extents:
            held = bytearray(extent.nbytes)
            self._read([memoryview(held)], extent.start)
            copy_one(held, extent, buffers)

    def _read(self, parts: list[memoryview], start: int) -> None:
        """Fill `parts`, which are emptied, with the bytes from `start` on."""
        while parts:
            count = os.preadv(self.fd, parts[:_MAX_BUFFERS_PER_CALL], start)
            if not count:
                raise OSError(f"{self._path!r} ends early: it changed while it was read")
            start += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = parts[0][count:]

    def close(self) -> None:
        """See OpenFeature."""
        self._file.close()


def fill(plan: ReadPlan, data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill `buffers` with the feature of a file whose bytes are `data`, as OpenFeature does."""
    single = buffers[0] if len(buffers) == 1 else None
    for start, offset, nbytes in plan.extents:
        if single is not None:
            single[offset : offset + nbytes] = data[start : start + nbytes]
            continue
        for part in cut(buffers, offset, nbytes):
            part[:] = data[start : start + len(part)]
            start += len(part)
    for extent in plan.strided_extents:
        held = bytearray(data[extent.start : extent.start + extent.nbytes])
        copy_one(held, extent, buffers)


def cut(buffers: Sequence[memoryview], offset: int, nbytes: int) -> list[memoryview]:
    """Return `nbytes` bytes from `offset` on of the buffers taken as one, without copying."""
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
