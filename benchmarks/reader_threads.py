"""A cold epoch through the pipeline by the number of reader threads, the page cache warm.

4,000 files of 6 KB in batches of 256, and 64 files of 4 MB in batches of 8, on the CPU.

    python benchmarks/reader_threads.py [--json FILE]
"""

from collections.abc import Callable, Iterator

from _common import interleaved, parser_for, report, save, temporary_directory, write_files

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister


def main() -> None:
    args = parser_for(__doc__, rounds=7).parse_args()
    figures = {}
    for count, width, batch_size in ((4000, 1024, 256), (64, 1 << 20, 8)):
        with temporary_directory() as directory:
            write_files(directory, count, width)

            def epochs(
                threads: int, directory: str = directory, batch_size: int = batch_size
            ) -> Callable[[], Iterator[bool]]:
                def epoch() -> Iterator[bool]:
                    options = {"reader_threads": threads} if threads else {"asynchronous": False}
                    with GPUFeatureStore("cpu", **options) as store:
                        lister = PathLister(directory, batch_size=batch_size)
                        for _ in GPUCollator(GPUPrefetcher(lister, store, depth=2)):
                            pass
                        yield True

                return epoch

            contenders = {f"{n} threads" if n else "in the caller": epochs(n) for n in range(5)}
            times = interleaved(contenders, args.rounds)
            title = f"{count} files of {width * 4 // 1024} KiB"
            figures[title] = report(title, times, "1 threads", 1.0, "s")
    save(args.json, figures)


if __name__ == "__main__":
    main()
