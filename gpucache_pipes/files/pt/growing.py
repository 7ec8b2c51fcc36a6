"""Tensors whose size differs from file to file, and the numbers of the pickle that follow."""

from gpucache_pipes.files.pt.names import SavedTensor


def growing_dimension(
    one: SavedTensor, other: SavedTensor, before: int | None, grows: bool
) -> int | None:
    """The only dimension in which a tensor differs between files."""
    if len(one.shape) != len(other.shape) or one.dtype != other.dtype:
        raise ValueError("a tensor differs in more than its size")
    differing = {d for d, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b}
    if before is not None:
        differing.add(before)
    if len(differing) != grows:
        raise ValueError("a tensor differs in several dimensions, or less than its storage")
    return differing.pop() if grows else None


def numbers_of(tensor: SavedTensor) -> list[int]:
    """The numbers by which the pickle describes a tensor, in their order."""
    storage = tensor.storage
    itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
    return [storage.nbytes // itemsize, tensor.offset, *tensor.shape, *tensor.strides]


def growth_of(tensor: SavedTensor, dimension: int) -> list[tuple[int, int]]:
    """For each of `numbers_of`, factor and divisor by which it grows with bytes; 0 if not."""
    itemsize = 1 if tensor.storage.dtype is None else tensor.storage.dtype.itemsize
    row = row_bytes(tensor, dimension)
    growth = [(1, itemsize), (0, 1)]
    growth += [(int(d == dimension), row) for d in range(len(tensor.shape))]
    for d in range(len(tensor.shape)):
        inner = 1
        for further in range(d + 1, len(tensor.shape)):
            inner *= 1 if further == dimension else tensor.shape[further]
        growth.append((inner if d < dimension else 0, row))
    return growth


def row_bytes(tensor: SavedTensor, dimension: int) -> int:
    """Bytes of a tensor for each step of a dimension."""
    row = tensor.dtype.itemsize
    for d, size in enumerate(tensor.shape):
        row *= 1 if d == dimension else size
    return row
