"""The size of a page."""

from collections.abc import Sequence

_SMALLEST = 64
_MOST_WASTE = 1 / 16
_SAME_SIZE = 1024


def choose_page_bytes(
    spans: Sequence[int], file_sizes: Sequence[int] = (), overhead: int = 0
) -> int:
    """The largest page in which features of these sizes waste at most a sixteenth.

    Features of one size get a page each: then a batch is one row of pages, and each leaf is one
    column of it. Features of many sizes get pages so small that the unused end of each feature's
    last page matters little.

        >>> choose_page_bytes([4096, 4096])
        4096
        >>> choose_page_bytes([1000, 30_000])
        2048

    Args:
        spans: sizes of features in bytes, at least one of them not 0.
        file_sizes: bytes of other files of the same kind. They count only if they differ by more
            than names and padding make files differ.
        overhead: bytes that such a file has in addition to its feature.
    """
    if file_sizes and max(file_sizes) - min(file_sizes) > _SAME_SIZE:
        spans = [*spans, *(max(16, size - overhead) for size in file_sizes)]
    needed = [-(-span // 16) * 16 for span in spans]
    largest = page = max(needed)
    while page > _SMALLEST:
        held = sum(-(-size // page) * page for size in needed)
        if held - sum(needed) <= held * _MOST_WASTE:
            break
        # Powers of two after the first: sizes that are seen later divide about as well.
        page = 1 << (page - 1).bit_length() - 1
    return largest if page == largest else max(page, _SMALLEST)


def pages_per_file(
    spans: Sequence[int], file_sizes: Sequence[int], overhead: int, page_bytes: int
) -> float:
    """The mean number of pages that a feature takes. Arguments as for `choose_page_bytes`.

    >>> pages_per_file([4096, 4096], [5000, 5100], 1000, 4096)
    1.0
    >>> pages_per_file([1000, 30_000], [1300, 30_300, 30_300], 300, 2048)
    10.333333333333334
    """
    if file_sizes and max(file_sizes) - min(file_sizes) > _SAME_SIZE:
        spans = [max(16, size - overhead) for size in file_sizes]
    return sum(-(-span // page_bytes) for span in spans) / len(spans)
