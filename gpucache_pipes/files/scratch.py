"""Memory for the files of a native call, which is reused once what borrowed it is dropped."""

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

SCRATCH_BYTES = 4 << 20
_MOST_FREE = 32
"""Memories that are kept for reuse, all together in this process."""


class _Loan(weakref.ref[Any]):
    """A weak reference to the borrower, with the memory that it has."""

    __slots__ = ("memory",)
    __hash__ = object.__hash__  # not that of the borrower

    def __eq__(self, other: object) -> bool:
        return self is other

    memory: npt.NDArray[np.uint8]


# A weak reference must be held for its callback to be called. Single operations on both are atomic.
_loans: set[_Loan] = set()
_returned: deque[_Loan] = deque()


def borrow(borrower: object) -> npt.NDArray[np.uint8]:
    """Memory of SCRATCH_BYTES, uint8, for as long as `borrower` is referred to.

    Not one memory for each thread: a signal handler may read files in the middle of a call.

    When the borrower is dropped, `deque.append` is called, and no Python code: what a signal
    handler raises inside of that, as in what `weakref.finalize` calls, would be swallowed.
    """
    memory = None
    while memory is None or len(_returned) >= _MOST_FREE:
        try:
            loan = _returned.popleft()
        except IndexError:
            break
        _loans.discard(loan)
        memory = loan.memory
    if memory is None:
        memory = np.empty(SCRATCH_BYTES, np.uint8)
    loan = _Loan(borrower, _returned.append)
    loan.memory = memory
    _loans.add(loan)
    return memory
