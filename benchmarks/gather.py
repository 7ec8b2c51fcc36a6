"""Compare ways to gather 256 rows of 4 KiB and a label from pages: dtypes, whole pages, columns.

The rows are those of two tensors of 4,000 x float32[1024] and int64[1]. Every way starts from a
list of page numbers and ends with two contiguous tensors. A second table compares gathers of 256 of
200,000 rows in small and in huge kernel pages. With `--busy N` the ways are compared for rows of
1 KiB to 1 MiB and batches of 8 to 1,024 instead, while N other processes compute: one gather by
`HostBackend`, the index_select of torch with its threads, and torch.stack of rows from a dict.

    python benchmarks/gather.py [--busy N] [--json FILE]
"""

import mmap
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _common import interleaved, parser_for, report, save

from gpucache_pipes.device import HostBackend

FILES, BATCH, WIDTH = 4000, 256, 1024
PAGE = WIDTH * 4 + 16


def by_size(rounds: int) -> dict[str, Any]:
    """Figures for each size of a row and of a batch."""
    figures = {}
    for row in (1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20):
        ways = ways_to_gather(row, min(4000, (512 << 20) // row))
        for batch in (8, 32, 256, 1024):
            if batch * row <= 64 << 20:
                title = f"rows of {row >> 10} KiB, batch {batch}"
                turns = {name: partial(way, batch) for name, way in ways.items()}
                figures[title] = report(title, interleaved(turns, rounds), "torch.stack")
    return figures


def ways_to_gather(row: int, count: int) -> dict[str, Callable[[int], Iterator[object]]]:
    """By name: gathers some random batches out of `count` rows of `row` bytes."""
    backend = HostBackend()
    backend.configure(row + 16)
    backend.grow(count, count)
    memory = backend.memory()
    assert memory is not None
    pages = memory[: count * (row + 16)].fill_(1).view(count, -1)
    rows = pages.view(torch.int64)[:, : row // 8]
    by_path = dict(enumerate(rows.clone()))

    def over(way: Callable[[list[int]], object]) -> Callable[[int], Iterator[object]]:
        return lambda batch: map(way, torch.randint(0, count, (4, batch)).tolist())

    return {
        "HostBackend.gather": over(lambda at: backend.gather(at, [(0, row)])),
        "index_select": over(lambda at: rows.index_select(0, torch.tensor(at))),
        "torch.stack": over(lambda at: torch.stack([by_path[n] for n in at])),
    }


def main() -> None:
    parser = parser_for(__doc__, rounds=60)
    parser.add_argument("--busy", type=int, help="processes that compute meanwhile")
    args = parser.parse_args()
    if args.busy is not None:
        endless = [sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(endless) for _ in range(args.busy)]
        try:
            save(args.json, by_size(args.rounds))
        finally:
            for process in others:
                process.kill()
        return

    features, labels = torch.randn(FILES, WIDTH), torch.arange(FILES).unsqueeze(1)
    pages = torch.zeros(FILES, PAGE, dtype=torch.uint8)
    pages[:, : WIDTH * 4] = features.view(torch.uint8)
    pages[:, WIDTH * 4 : WIDTH * 4 + 8] = labels.view(torch.uint8)
    backend = HostBackend()
    backend.configure(PAGE)
    backend.grow(FILES, FILES)
    upload = backend.upload([[page] for page in range(FILES)])
    for page in range(FILES):
        upload.buffers(page)[0][:] = pages[page].numpy().data
    upload.finish()

    def index(rows: list[int]) -> torch.Tensor:
        return torch.frombuffer(array("q", rows), dtype=torch.int64)

    def column(dtype: torch.dtype) -> Callable[[list[int]], object]:
        source = pages.view(dtype)[:, : WIDTH * 4 // dtype.itemsize]
        label = pages.view(torch.int64)[:, WIDTH // 2 : WIDTH // 2 + 1]

        def gather(rows: list[int]) -> object:
            at = index(rows)
            return source.index_select(0, at).view(torch.float32), label.index_select(0, at)

        return gather

    def resident(rows: list[int]) -> object:
        at = index(rows)
        return features.index_select(0, at), labels.index_select(0, at)

    def whole_pages(rows: list[int]) -> object:
        block = pages.view(torch.complex128).index_select(0, index(rows)).view(torch.uint8)
        feature = block[:, : WIDTH * 4].contiguous().view(torch.float32)
        return feature, block[:, WIDTH * 4 : WIDTH * 4 + 8].contiguous().view(torch.int64)

    def over_batches(gather: Callable[[list[int]], object]) -> Callable[[], Iterator[object]]:
        return lambda: map(gather, [rows.tolist() for rows in torch.randperm(FILES).split(BATCH)])

    ways = {
        "two resident tensors": resident,
        "columns of pages, float32": column(torch.float32),
        "columns of pages, int64": column(torch.int64),
        "columns of pages, complex128": column(torch.complex128),
        "HostBackend.gather": lambda rows: backend.gather(rows, [(0, WIDTH * 4), (WIDTH * 4, 8)]),
        "whole pages, then copies": whole_pages,
    }
    times = interleaved({name: over_batches(way) for name, way in ways.items()}, args.rounds)
    figures = {"gather": report("gather", times, "two resident tensors")}

    many = 200_000

    def rows_in(advice: int) -> Callable[[], Iterator[object]]:
        memory = mmap.mmap(-1, many * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(many, PAGE).fill_(1)
        words = rows.view(torch.complex128)
        return lambda: (words.index_select(0, torch.randint(0, many, (BATCH,))) for _ in range(20))

    kernel_pages = {
        "small": rows_in(mmap.MADV_NOHUGEPAGE),
        "large": rows_in(mmap.MADV_HUGEPAGE),
    }
    times = interleaved(kernel_pages, args.rounds)
    figures["kernel_pages"] = report("kernel pages, 200,000 rows", times, "small")
    save(args.json, figures)


if __name__ == "__main__":
    main()
