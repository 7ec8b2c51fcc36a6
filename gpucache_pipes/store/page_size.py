"""The size of a page."""

from collections.abc import Sequence

_SMALLEST = 64
_MOST_WASTE = 1 / 16
_SAME_SIZE = 1024


def choose_page_bytes(
    spans: Sequence[int], file_sizes: Sequence[int] = (), overhead: int = 0
) -> int:
    """The largest page in which features of these sizes waste at most a sixteenth.

    Features of one size get a page each, so that a batch is one row of pages and each leaf one
    column of it. Features of many sizes get pages small enough that the unused end of each
    one's last page matters little. Sizes in bytes; at least one span is not 0.

    `file_sizes` are those of other files like these, which have `overhead` bytes beside the
    feature. They count if they differ by more than names and padding can make them differ.
    """
    if file_sizes and max(file_sizes) - min(file_sizes) > _SAME_SIZE:
        spans = [*spans, *(max(16, size - overhead) for size in file_sizes)]
    needed = [-(-span // 16) * 16 for span in spans]
    largest = page = max(needed)
    while page > _SMALLEST:
        held = sum(-(-size // page) * page for size in needed)
        if held - sum(needed) <= held * _MOST_WASTE:
            break
        # Powers of two after the first: sizes seen later divide about as well as these.
        page = 1 << (page - 1).bit_length() - 1
    return largest if page == largest else max(page, _SMALLEST)
