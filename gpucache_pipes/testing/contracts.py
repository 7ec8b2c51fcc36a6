"""What the contracts for sources, formats and backends share."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, settings

from gpucache_pipes.files import OpenFeature, build


def inherited(max_examples: int) -> settings:
    """Hypothesis settings for a test that several classes inherit, each for runs of its own."""
    return settings(
        deadline=None,
        max_examples=max_examples,
        report_multiple_bugs=False,  # an ExceptionGroup would hide the AssertionError
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )


def read_feature(opened: OpenFeature, cuts: Sequence[int] = (), spare: int = 0) -> Any:
    """Read an open feature as the store does, and return it on the host.

    The bytes of each leaf are where the layout says. It does not close `opened`.

    Args:
        opened: the feature, of which nothing has been read.
        cuts: byte offsets at which one buffer ends and the next one begins. Those beyond the end
            are ignored.
        spare: how many bytes longer than the feature the buffers are, as pages may be.

    Raises:
        AssertionError: `bytes_read` is not a number of bytes.
    """
    layout = opened.layout
    nbytes = opened.bytes_read
    assert isinstance(nbytes, int) and nbytes >= 0, f"bytes_read={nbytes!r}"
    size = layout.span + spare
    # A pattern, so that bytes that are never written do not pass for zeros.
    memory = bytearray(b"\xee" * size)
    ends = sorted({cut for cut in cuts if 0 < cut < size} | {size})
    view = memoryview(memory)
    opened.read_into([view[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    return build_feature(opened, view)


def build_feature(opened: OpenFeature, memory: memoryview) -> Any:
    """Return the feature whose bytes were read into `memory`, on the host."""
    layout = opened.layout

    def leaf(number: int) -> torch.Tensor:
        dtype, shape, offset, nbytes = layout.leaves[number]
        if not nbytes:
            return torch.empty(shape, dtype=dtype, device="cpu")
        content = torch.frombuffer(memory, dtype=torch.uint8)[offset : offset + nbytes].clone()
        return content.view(dtype).view(shape)

    return build(layout.tree, leaf, lambda number: opened.values[number])


def error_of(call: Callable[[], Any], *kinds: type[Exception]) -> Exception | None:
    """What `call` raises if it is one of `kinds`, or None if it raises nothing."""
    try:
        call()
    except kinds as error:
        return error
    return None


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Call `work(0)`, `work(1)`, ... in threads that begin together.

    Raises what the first of them raised.
    """
    errors: list[BaseException] = []
    begin = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            begin.wait(60)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def open_descriptors() -> set[str]:
    """The numbers of the open file descriptors of this process; empty if the system has no list.

    A descriptor that the caller opens between two calls may get the number of one that was closed,
    so compare sets only around code that leaves nothing open.
    """
    for directory in ("/proc/self/fd", "/dev/fd"):
        try:
            return set(os.listdir(directory))
        except OSError:
            continue
    return set()
