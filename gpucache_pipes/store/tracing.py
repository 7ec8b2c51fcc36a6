"""Ranges in torch.profiler traces."""

import contextlib

from torch.autograd import profiler

_NO_RANGE = contextlib.nullcontext()


def trace(name: str) -> contextlib.AbstractContextManager[object]:
    """A range of that name while a profiler runs. Without one, nothing: a range costs 6 us."""
    # The flag of the process: the flag of a thread is not set in reader threads, nor where a
    # profiler records all threads.
    return profiler.record_function(name) if profiler._is_profiler_enabled else _NO_RANGE
