"""The forms of files that are known, and what they are for the native reader."""

from array import array
from bisect import bisect_left, bisect_right
from itertools import chain
from typing import Any, NamedTuple

from gpucache_pipes.files.plans import FormParts, PlanFamily, ReadPlan

MOST_FORMS = 4096
MOST_OF_A_SIZE = 64
MOST_GROWING = 128
_MOST_RUNS = 1 << 16
"""Bytes that a form may compare."""


class KnownForms(NamedTuple):
    """Forms: those with growing parts, the latest first; then the others by size.

    Attributes:
        forms: the native forms.
        readers: by what files of each form are read.
        growing: how many of the forms have growing parts.
        sizes: of the others.
    """

    forms: tuple[Any, ...] = ()
    readers: tuple[ReadPlan | PlanFamily, ...] = ()
    growing: int = 0
    sizes: tuple[int, ...] = ()

    def of_size(self, size: int) -> tuple[int, int]:
        """From which to which number the forms of files of this size are."""
        return (
            self.growing + bisect_left(self.sizes, size),
            self.growing + bisect_right(self.sizes, size),
        )

    def with_form(self, form: Any, reader: ReadPlan | PlanFamily, size: int) -> "KnownForms":
        """These and another one, of files of this size; 0 for one with growing parts.

        The latest of a size comes first, and where there are too many, the oldest goes.
        """
        if not size:
            known = self
            if self.growing >= MOST_GROWING:
                known = self.without(self.growing - 1)
            begin, end, after, growing = 0, known.growing, known.growing, known.growing + 1
            sizes = known.sizes
        else:
            known = self
            if len(known.sizes) >= MOST_FORMS:
                known = KnownForms(
                    self.forms[: self.growing], self.readers[: self.growing], self.growing
                )
            begin, after = known.of_size(size)
            end, growing = min(after, begin + MOST_OF_A_SIZE - 1), known.growing
            at = begin - growing
            sizes = (*known.sizes[:at], size, *known.sizes[at : end - growing],
                     *known.sizes[after - growing :])  # fmt: skip
        forms, readers = known.forms, known.readers
        return KnownForms(
            (*forms[:begin], form, *forms[begin:end], *forms[after:]),
            (*readers[:begin], reader, *readers[begin:end], *readers[after:]),
            growing,
            sizes,
        )

    def without(self, number: int) -> "KnownForms":
        """These without one."""
        forms, readers, growing, sizes = self
        at = number - growing
        return KnownForms(
            (*forms[:number], *forms[number + 1 :]),
            (*readers[:number], *readers[number + 1 :]),
            growing - (at < 0),
            sizes if at < 0 else (*sizes[:at], *sizes[at + 1 :]),
        )


def is_small(parts: FormParts) -> bool:
    """Whether comparing files with this form costs little."""
    return sum(run.length for run in parts.equal) <= _MOST_RUNS


def form_arguments(parts: FormParts, size: int, content: bytes) -> tuple[Any, ...]:
    """What the native form is made of: see Form in `_native.c`.

    Args:
        parts: what files have in common, as in one of them.
        size: of that file in bytes.
        content: what its equal runs hold, end to end.
    """
    runs = [
        array("q", chain.from_iterable(part)).tobytes()
        for part in (parts.equal, parts.digits, parts.prefixes, parts.numbers)
    ]
    return (size, parts.growing, runs[0], content, *runs[1:])
