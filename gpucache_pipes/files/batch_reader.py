"""Reads small files of known forms, many in one call and without the interpreter lock.

What takes the time of small files is Python: about 20 us for each, against 5 us for opening and
reading it. So the first files of a data set are parsed by a `PlanReader`, and what others must have
in common with them for the same read plan to hold, or for one of a family, is noted as a form.
`_native.c` reads the others, compares them with the forms, and copies their leaves to their places.

A file of no known form is in memory then, and is parsed by the PlanReader. Files that are large,
and those that cannot be read, are left to `PlanReader.open`.

Without the native module (see `native_problem`) all files are.
"""

import importlib
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from gpucache_pipes.files.chunks import (
    LEFT_TO_PYTHON,
    START,
    STATUS,
    UNKNOWN,
    Chunk,
    ScratchFeature,
)
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.forms import (
    MOST_FORMS,
    MOST_GROWING_FORMS,
    KnownForms,
    form_arguments,
    is_small,
)
from gpucache_pipes.files.planned import MAX_PLAN_COST, Bytes, PlanReader
from gpucache_pipes.files.plans import FormParts, PlanFamily, ReadPlan
from gpucache_pipes.files.source import Progress, VersionedFeature

_WHOLE = 1 << 20
"""Bytes of a file that is read whole. Copying its leaves once more costs less than the Python code
that reads them in place."""

_FREE_TRIES = 128
"""Files whose family is looked for, which costs as much as parsing them a few times. More of them
must be paid for by files of known families."""

_FIRST = 4
"""Files of the first call: their form is learned before the others are read."""


def import_native(name: str) -> tuple[ModuleType | None, str | None]:
    """A native module of this package; or None, and why there is none."""
    if os.environ.get("GPUCACHE_PIPES_NATIVE") == "0":
        return None, "GPUCACHE_PIPES_NATIVE=0"
    try:
        return importlib.import_module(f"gpucache_pipes.files.{name}"), None
    except ImportError as error:
        return (
            None,
            f"it was not built; that takes a C compiler when the package is installed ({error})",
        )


_native, native_problem = import_native("_native")
"""The module, and why there is none."""


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
        self._tried = 0  # files whose family was looked for
        self._of_families = 0  # files that were of a known one
        self._matched = 0  # files that were of a known form; approximate
        self._known = KnownForms() if _native is not None else None
        # The names of the families whose forms are among `_known`.
        self._families: dict[Any, PlanFamily] = {}

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
        chunk = Chunk(_native, known, len(paths))
        begin = time.monotonic_ns()
        end = 0
        while not end and not progress.stopped:  # a signal ends the call early
            end = _native.read(
                known.forms, tuple(paths), _WHOLE, chunk.memory, chunk.rows, progress.shared
            )
        chunk.ended = time.time_ns()
        chunk.starts = chunk.rows[:end, START].tolist()
        return self._features(chunk, end, progress, begin)

    def open_read(
        self, make: Callable[[Any, KnownForms, int], Chunk], files: int, progress: Progress
    ) -> "list[VersionedFeature | None]":
        """Open files whose bytes the caller puts into the scratch memory of a chunk.

        Args:
            make: makes the chunk, and fills its rows: see `Chunk`.
            files: how many at most.
            progress: may say to stop.
        """
        known = self._known or KnownForms()
        begin = time.monotonic_ns()
        if not self._begun:
            self._begun = True
            files = min(files, _FIRST)
        chunk = make(_native if self._known is not None else None, known, files)
        end = len(chunk.starts)
        if end and chunk.native is not None:
            chunk.native.find(known.forms, chunk.memory, chunk.rows[:end])
        return self._features(chunk, end, progress, begin)

    def _features(
        self, chunk: Chunk, end: int, progress: Progress, begin: int
    ) -> "list[VersionedFeature | None]":
        """The features in a chunk: `open` without the reading."""
        self._matched += int((chunk.rows[:end, STATUS] >= 0).sum())
        features: list[VersionedFeature | None] = []
        for number, (form, _, _, _, size, _) in enumerate(chunk.rows[:end].tolist()):
            if form == UNKNOWN:
                if progress.stopped:
                    break
                progress.begin(number, time.monotonic_ns() - begin)
            features.append(self._feature(chunk, number, form, size))
        return features

    def _feature(self, chunk: Chunk, number: int, form: int, size: int) -> ScratchFeature | None:
        if form == LEFT_TO_PYTHON:
            return None
        reader = chunk.known.readers[form] if form >= 0 else self._parse(chunk, number)
        if reader is None:
            return None
        if isinstance(reader, ReadPlan):
            return ScratchFeature(reader, reader.values, chunk, number, size, form >= 0)
        data = chunk.data(number)
        try:
            plan = reader.plan(data)
            self._of_families += 1
            return ScratchFeature(plan, reader.values(plan, data), chunk, number, size, True)
        except (Unsupported, ValueError, MemoryError):
            return None  # PlanReader.open says what is wrong with the file

    def _parse(self, chunk: Chunk, number: int) -> ReadPlan | None:
        """The read plan of a file in scratch; None if it is Unsupported."""
        version = chunk.plan_key(number)
        plan = self._reader.remembered(version) if version else None
        if plan is not None:
            return plan
        file = Bytes(bytes(chunk.data(number)))
        try:
            parsed = self._reader.parse(file)
            plan = self._reader.selected(parsed.plan)
        except (Unsupported, ValueError, MemoryError, RecursionError):
            return None  # PlanReader.open says what is wrong with the file
        if version:
            self._reader.remember(version, plan)
        if plan.cost > MAX_PLAN_COST or self._known is None:
            return plan
        if self._tried <= _FREE_TRIES + self._of_families // 16:
            self._tried += 1
            family = parsed.family()
            if family is not None and self._learn_family(*family):
                return plan
        # The form is learned of the second file that has it; of the first one, once it has turned
        # out that there are mostly several.
        known = self._known
        last = self._last.get(file.size)
        is_second = plan is last or (plan == last and not plan.values)
        if is_second or (known is not None and self._matched >= 2 * len(known.forms) > 0):
            self._learn(file, plan, parsed.form())
        else:
            if len(self._last) >= MOST_FORMS:
                self._last.clear()
            self._last[file.size] = plan
        return plan

    def _learn(self, file: Bytes, plan: ReadPlan, parts: FormParts | None) -> None:
        """Add the form of a file."""
        assert _native is not None and self._known is not None and file.whole is not None
        begin, after = self._known.of_size(file.size)
        if any(other is plan for other in self._known.readers[begin:after]):
            return  # by a file of the same call
        if parts is None or not is_small(parts):
            return
        content = b"".join(file.whole[run.start : run.start + run.length] for run in parts.equal)
        form = _native.Form(*form_arguments(parts, file.size, content))
        self._known = self._known.with_fixed(form, plan, file.size)

    def _learn_family(self, name: Any, family: PlanFamily) -> bool:
        """Add the form of a family, or replace the one that had the name before.

        Returns False if it was there.
        """
        known = self._known
        assert known is not None and _native is not None
        if any(reader is family for reader in known.readers) or not is_small(family.parts):
            return False
        before = self._families.get(name)
        for number, reader in enumerate(known.readers):
            if reader is before:
                known = known.without(number)
                break
        form = _native.Form(*form_arguments(family.parts, family.size, family.content))
        if family.parts.growing:
            self._known = known.with_growing(form, family)
        else:
            self._known = known.with_fixed(form, family, family.size)
        if len(self._families) >= MOST_GROWING_FORMS:
            self._families.clear()  # those that are known stay: at worst there are two of a name
        self._families[name] = family
        return True
