"""Reads small files of known forms, many in one call and without the interpreter lock.

What takes the time of small files is Python: about 20 us for each, against 5 us for opening and
reading it. So the first files of a data set are parsed by a `PlanReader`, and what must be equal in
others for the same read plan to hold is noted as a form. `_native.c` reads the others, compares
each with the forms of its size, and copies its leaves to their places.

A file of no known form is in memory then, and is parsed by the PlanReader. Files that are large,
and those that cannot be read, are left to `PlanReader.open`.

Without the native module (see `native_problem`) all files are.
"""

import importlib
import os
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import MAX_PLAN_COST, Bytes, PlanReader, fill
from gpucache_pipes.files.plans import FormParts, ReadPlan
from gpucache_pipes.files.scratch import borrow
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature
from gpucache_pipes.files.strided import copy_many
from gpucache_pipes.files.versions import is_racy_between

_WHOLE = 1 << 20
"""Bytes of a file that is read whole. Copying its leaves once more costs less than the Python code
that reads them in place."""

_FIRST = 4
"""Files of the first call: their form is learned before the others are read."""

_MOST_FORMS = 4096
_MOST_OF_A_SIZE = 64
_MOST_RUNS = 1 << 16
"""Bytes that a form may compare."""

# The columns of a row, and the values of STATUS that are not the number of a form: see _native.c.
_STATUS, _START, _VERSION, _SIZE, _MTIME, _COLUMNS = 0, 1, slice(2, 6), 4, 5, 6
_UNKNOWN, _LEFT_TO_PYTHON = -1, -2


def _import_native() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("GPUCACHE_PIPES_NATIVE") == "0":
        return None, "GPUCACHE_PIPES_NATIVE=0"
    try:
        return importlib.import_module("gpucache_pipes.files._native"), None
    except ImportError as error:
        return (
            None,
            f"it was not built; that takes a C compiler when the package is installed ({error})",
        )


_native, native_problem = _import_native()
"""The module, and why there is none."""


class _Known(NamedTuple):
    """Forms, in ascending order of size, and the read plan of each."""

    sizes: list[int]
    forms: tuple[Any, ...]
    plans: list[ReadPlan]


class BatchReader:
    """Opens many files of one format at once, and learns their forms. For any number of threads.

    Args:
        reader: parses files whose form is not known.
    """

    # Threads share `_known` and `_last` without a lock. `_known` is replaced as a whole: of two
    # forms that threads add at the same time one can be lost, and is learned again.

    def __init__(self, reader: PlanReader) -> None:
        self._reader = reader
        self._last: dict[int, ReadPlan] = {}
        self._begun = False
        self._matched = 0  # files that were of a known form; approximate
        self._known = _Known([], (), []) if _native is not None else None

    def open(self, paths: list[str], progress: Progress) -> "list[VersionedFeature | None]":
        """Open the first of these files: at least one, unless `progress` says to stop.

        Returns:
            What was opened, in order. None is a file that `PlanReader.open` has to open. Empty if
            it has to open all of them.
        """
        known = self._known
        if _native is None or known is None:
            return []
        if not self._begun:
            self._begun = True
            paths = paths[:_FIRST]
        chunk = _Chunk(known, len(paths))
        begin = time.monotonic_ns()
        end = 0
        while not end and not progress.stopped:  # a signal ends the call early
            end = _native.read(
                known.forms, tuple(paths), _WHOLE, chunk.memory, chunk.rows, progress.shared
            )
        chunk.ended = time.time_ns()
        self._matched += int((chunk.rows[:end, _STATUS] >= 0).sum())
        features: list[VersionedFeature | None] = []
        for number, (form, _, _, _, size, _) in enumerate(chunk.rows[:end].tolist()):
            if form == _UNKNOWN:
                if progress.stopped:
                    break
                progress.begin(number, time.monotonic_ns() - begin)
            features.append(self._feature(chunk, number, form, size))
        return features

    def _feature(
        self, chunk: "_Chunk", number: int, form: int, size: int
    ) -> "ScratchFeature | None":
        if form == _LEFT_TO_PYTHON:
            return None
        plan = chunk.known.plans[form] if form >= 0 else self._parse(chunk, number)
        return None if plan is None else ScratchFeature(plan, chunk, number, size)

    def _parse(self, chunk: "_Chunk", number: int) -> ReadPlan | None:
        """The read plan of a file in scratch; None if it is Unsupported."""
        version = chunk.version(number)
        plan = self._reader.remembered(version) if version else None
        if plan is not None:
            return plan
        file = Bytes(bytes(chunk.data(number)))
        try:
            plan, form = self._reader.plan_and_form(file)
            plan = self._reader.selected(plan)
        except (Unsupported, ValueError, MemoryError, RecursionError):
            return None  # PlanReader.open says what is wrong with the file
        if version:
            self._reader.remember(version, plan)
        if plan.cost > MAX_PLAN_COST:
            return plan
        # The form is learned of the second file that has it; of the first one, once it has turned
        # out that there are mostly several.
        known = self._known
        last = self._last.get(file.size)
        is_second = plan is last or (plan == last and not plan.values)
        if is_second or (known is not None and self._matched >= 2 * len(known.forms) > 0):
            self._learn(file, plan, form())
        else:
            if len(self._last) >= _MOST_FORMS:
                self._last.clear()
            self._last[file.size] = plan
        return plan

    def _learn(self, file: Bytes, plan: ReadPlan, parts: FormParts | None) -> None:
        """Add the form of a file."""
        assert _native is not None and self._known is not None and file.whole is not None
        known = self._known
        begin = bisect_left(known.sizes, file.size)
        after = bisect_right(known.sizes, file.size)
        if any(other is plan for other in known.plans[begin:after]):
            return  # by a file of the same call
        if parts is None or sum(count for _, count in parts.equal) > _MOST_RUNS:
            return
        content = b"".join(file.whole[start : start + count] for start, count in parts.equal)
        runs = [array("q", chain.from_iterable(part)).tobytes() for part in (*parts, plan.extents)]
        form = _native.Form(file.size, runs[0], content, *runs[1:])
        if len(known.forms) >= _MOST_FORMS:
            known, begin, after = _Known([], (), []), 0, 0
        # The newest of a size comes first, and the oldest goes.
        end = min(after, begin + _MOST_OF_A_SIZE - 1)
        self._known = _Known(
            [*known.sizes[:begin], file.size, *known.sizes[begin:end], *known.sizes[after:]],
            (*known.forms[:begin], form, *known.forms[begin:end], *known.forms[after:]),
            [*known.plans[:begin], plan, *known.plans[begin:end], *known.plans[after:]],
        )


class _Chunk:
    """The files of one call, in scratch memory, which is reused once they are dropped."""

    def __init__(self, known: _Known, files: int) -> None:
        self.known = known
        self.rows = np.empty((files, _COLUMNS), np.int64)
        self.memory = borrow(self)
        # When it was read: from before the first file to after the last one.
        self.begun = self.ended = time.time_ns()

    def data(self, number: int) -> memoryview:
        """The bytes of a file."""
        row = self.rows[number]
        return self.memory.data[int(row[_START]) :][: int(row[_SIZE])]

    def version(self, number: int) -> bytes | None:
        """The version of a file, see `version_of`; None if it may still change unnoticed."""
        row = self.rows[number]
        racy = is_racy_between(int(row[_MTIME]), self.begun, self.ended)
        return None if racy else row[_VERSION].tobytes()


class ScratchFeature:
    """An OpenFeature whose file is in scratch memory as a whole.

    Attributes:
        layout: see OpenFeature.
        values: see OpenFeature.
        chunk: the files that were read with it, and which of them it is.
        number: which of them it is.
    """

    __slots__ = ("_plan", "bytes_read", "chunk", "layout", "number", "values")

    def __init__(self, plan: ReadPlan, chunk: _Chunk, number: int, nbytes: int) -> None:
        self.layout = plan.layout
        self.values = plan.values
        self.bytes_read = nbytes
        self.chunk = chunk
        self.number = number
        self._plan = plan

    @property
    def version(self) -> bytes | None:
        """See VersionedFeature."""
        return self.chunk.version(self.number)

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        fill(self._plan, self.chunk.data(self.number), buffers)

    def close(self) -> None:
        """See OpenFeature."""


def read_many(
    features: Sequence[OpenFeature], memory: memoryview, offsets: npt.NDArray[np.int64]
) -> list[int]:
    """Fill `memory` with those features that are of known forms, without the interpreter lock.

    Args:
        features: what was opened.
        memory: writable bytes.
        offsets: where the bytes of each feature go; negative leaves it out.

    Returns:
        The positions of those that are left, to be read one by one.
    """
    left: list[int] = []
    by_chunk: dict[_Chunk, list[int]] = {}
    for at, feature in enumerate(features):
        if isinstance(feature, ScratchFeature):
            by_chunk.setdefault(feature.chunk, []).append(at)
        else:
            left.append(at)
    for chunk, positions in by_chunk.items():
        numbers = np.array([features[at].number for at in positions], np.int64)  # type: ignore[attr-defined]
        places = offsets[positions]
        known = (chunk.rows[numbers, _STATUS] >= 0) & (places >= 0)
        if not known.all():
            left += np.array(positions)[~known].tolist()
            numbers, places = numbers[known], places[known]
        assert _native is not None
        _native.copy(chunk.known.forms, chunk.rows, numbers, chunk.memory, memory, places)
        _copy_strided(chunk, numbers, memory, places)
    return left


def _copy_strided(
    chunk: _Chunk,
    numbers: npt.NDArray[np.int64],
    memory: memoryview,
    places: npt.NDArray[np.int64],
) -> None:
    """Copy the leaves that are strided in these files, or of another dtype."""
    forms = chunk.rows[numbers, _STATUS]
    for form in sorted(set(forms.tolist())):
        if extents := chunk.known.plans[form].strided_extents:
            these = forms == form
            starts = chunk.rows[numbers[these], _START]
            source = torch.from_numpy(chunk.memory)
            target = torch.frombuffer(memory, dtype=torch.uint8)
            for extent in extents:
                copy_many(source, starts, extent, target, places[these])
