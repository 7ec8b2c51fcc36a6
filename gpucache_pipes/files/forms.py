"""The forms of files that are known, and what they are for the native reader."""

from array import array
from bisect import bisect_left, bisect_right
from itertools import chain
from typing import Any, NamedTuple

from gpucache_pipes.files.plans import FormParts, PlanFamily, ReadPlan

MOST_FORMS = 4096
MOST_OF_A_SIZE = 64
MOST_GROWING_FORMS = 128
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

    def with_growing(self, form: Any, reader: PlanFamily) -> "KnownForms":
        """These and one with growing parts. Where there are too many, the oldest goes."""
        known = self if self.growing < MOST_GROWING_FORMS else self.without(self.growing - 1)
        return known._replace(
            forms=(form, *known.forms),
            readers=(reader, *known.readers),
            growing=known.growing + 1,
        )

    def with_fixed(self, form: Any, reader: ReadPlan | PlanFamily, size: int) -> "KnownForms":
        """These and one of files of this size. Where the size has too many, its oldest goes."""
        known, growing = self, self.growing
        if len(self.sizes) >= MOST_FORMS:
            known = KnownForms(self.forms[:growing], self.readers[:growing], growing)
        begin, after = known.of_size(size)
        end = min(after, begin + MOST_OF_A_SIZE - 1)
        before, behind = known.sizes[: begin - growing], known.sizes[after - growing :]
        return KnownForms(
            (*known.forms[:begin], form, *known.forms[begin:end], *known.forms[after:]),
            (*known.readers[:begin], reader, *known.readers[begin:end], *known.readers[after:]),
            growing,
            (*before, *[size] * (1 + end - begin), *behind),
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
