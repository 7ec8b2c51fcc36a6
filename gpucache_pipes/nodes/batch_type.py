"""Batch: the type of what a loader or a collator yields, for type checkers and editors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Batch = TypeVar("Batch", default=Any)
else:  # a default for type checkers alone, which the standard library has from Python 3.13 on
    from typing import TypeVar

    Batch = TypeVar("Batch")
