"""Opens a disk cache of a million files: seconds, and host memory for each file.

python benchmarks/million_packed.py [--files 1000000] [--json FILE]
"""

import argparse
import ctypes
import gc
import time
from pathlib import Path

import numpy as np
import torch
from _common import save, temporary_directory

from gpucache_pipes.files import Layout
from gpucache_pipes.files.packed import DiskDirectory
from gpucache_pipes.files.packed.index import Index
from gpucache_pipes.files.packed.segment import name_hashes
from gpucache_pipes.files.packed.segment_writer import Records, SegmentWriter

SEGMENTS, GROUP = 8, 5000


def fill(directory: DiskDirectory, files: int) -> None:
    """Segments of features of one tensor of 16 bytes."""
    layout = Layout.of(0, [(torch.float32, (4,))])
    for part in np.array_split(np.arange(files), SEGMENTS):
        directory.reserve(1 << 30, 1)
        writer = SegmentWriter(directory.partial_path())
        for some in np.array_split(part, max(1, len(part) // GROUP)):
            names = [f"/data/features/part-{n // 1000:04d}/{n:09d}.pt" for n in some.tolist()]
            writer.append(
                Records(
                    names, name_hashes(names, "|"), np.stack([some, some], axis=1),
                    [layout] * len(names), [b""] * len(names),
                    np.arange(len(names), dtype=np.int64) * 16, np.zeros(16 * len(names), np.uint8),
                )
            )  # fmt: skip
        writer.finish(directory.segment_path())


def resident() -> int:
    """Bytes of memory that this process has in RAM, without what it has freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of the GNU C library
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    with temporary_directory() as root:
        filled = DiskDirectory(f"{root}/cache", None)
        fill(filled, args.files)
        filled.close()
        del filled
        before = resident()
        begin = time.perf_counter()
        directory = DiskDirectory(f"{root}/cache", None)
        index = Index(directory.segments())
        seconds = time.perf_counter() - begin
        assert len(index) == args.files
        figures = {"seconds": seconds, "bytes_per_file": (resident() - before) / args.files}
        assert (index.find(name_hashes(["/data/features/part-0000/000000007.pt"], "|")) >= 0).all()
        directory.close()
    print(f"{args.files:,} files: {seconds:.2f} s, {figures['bytes_per_file']:.0f} bytes each")
    save(args.json, figures)


if __name__ == "__main__":
    main()
