"""Compare the `.pt` reader with torch.load and with reading the bytes only.

2,000 files of {"feature": f32[1024], "label": int64[1]}, the same number of files that each have a
layout of their own, and 64 files of 8 MB, with a warm page cache and one thread. "first" reads
files that this reader has not read before, but of a data set that it knows. "again" reads files
that it has read.

    python benchmarks/reader.py [--json FILE]
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _common import interleaved, parser_for, report, save, temporary_directory, write_files

from gpucache_pipes.files.pt.reader import PtReader


def write_unlike(directory: str, count: int) -> list[str]:
    """Files of one tensor each, all of different shapes."""
    paths = []
    for number in range(count):
        path = Path(directory) / f"{number:06d}.pt"
        torch.save({"feature": torch.zeros(1000 + number)}, path)
        paths.append(str(path))
    return paths


def main() -> None:
    args = parser_for(__doc__, rounds=7).parse_args()
    figures = {}
    kinds: dict[str, Callable[[str], list[str]]] = {
        "files of 6 KB": lambda directory: write_files(directory, 2000),
        "files of 6 to 14 KB, each with its own layout": lambda d: write_unlike(d, 2000),
        "files of 8 MB": lambda directory: write_files(directory, 64, 2 << 20),
    }
    for title, write in kinds.items():
        with temporary_directory() as directory:
            paths = write(directory)
            for path in paths:
                os.utime(path, (1, 1))  # the reader does not cache plans of files written just now
            size = os.path.getsize(paths[-1])
            buffers = [memoryview(bytearray(size))]
            reader, known = PtReader(), PtReader()

            def read(reader: PtReader, path: str, buffers: list[memoryview] = buffers) -> bool:
                feature = reader.open(path)
                feature.read_into([buffers[0][: feature.layout.span]])
                feature.close()
                return True

            def bare(path: str, buffers: list[memoryview] = buffers) -> bool:
                fd = os.open(path, os.O_RDONLY)
                os.preadv(fd, buffers, 0)
                os.close(fd)
                return True

            def first(path: str, reader: PtReader = reader) -> bool:
                reader._plans.clear()  # as for a file that was not read before
                return read(reader, path)

            def over(
                function: Callable[[str], object], paths: list[str] = paths
            ) -> Callable[[], Iterator[object]]:
                return lambda: map(function, paths)

            contenders = {
                "torch.load": over(torch.load),
                "first": over(first),
                "again": over(lambda path, known=known: read(known, path)),
                "bare preadv": over(bare),
            }
            times = interleaved(contenders, args.rounds)
            figures[title] = report(title, times, "torch.load")
            for name, row in figures[title].items():
                print(f"{1 / row['ratio']:8.2f} times as fast as torch.load: {name}")
    save(args.json, figures)


if __name__ == "__main__":
    main()
