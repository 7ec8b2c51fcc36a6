"""A process whose device memory runs out at places of a store. Run by test_out_of_memory.py.

    python running_out.py TAKEN

The memory is limited to 4 GiB, of which the part TAKEN is taken by somebody else from the start. At
each place, with a store of its own, all the rest is taken, too. The store may then raise, or help
itself by evicting; afterwards, with the memory back, every batch is exact.
"""

import contextlib
import sys
from collections.abc import Iterator

import torch
from conftest import ACCELERATOR
from edges import new_backend
from gpu_common import ON_CUDA, MiB, first_column, wait

from gpucache_pipes import FeatureLoadError, GPUFeatureStore

LIMIT = 4096 * MiB
FILE = 4 * MiB
FILES = 1200 if ON_CUDA else 20
REFUSALS = (torch.OutOfMemoryError, MemoryError, FeatureLoadError)


def feature(path: str) -> torch.Tensor:
    return torch.full((FILE // 4,), float(path.rpartition("/")[2]))


def names(*numbers: int) -> list[str]:
    return [f"/f/{n}" for n in numbers]


def take(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes if ON_CUDA else 0, dtype=torch.uint8, device=ACCELERATOR)


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    """Take all memory that there is, down to pieces of 64 KiB."""
    taken = []
    if ON_CUDA:
        torch.cuda.empty_cache()
        nbytes = 512 * MiB
        while nbytes >= 64 << 10:
            try:
                taken.append(take(nbytes))
            except torch.OutOfMemoryError:
                nbytes //= 2
    yield
    del taken


def check(store: GPUFeatureStore, numbers: list[int]) -> None:
    batch = store.get_batch(names(*numbers)).collate()
    assert first_column(batch) == numbers, numbers
    assert bool((batch == batch[:, :1]).all()), numbers


def try_to(store: GPUFeatureStore, numbers: list[int]) -> None:
    """A batch that is exact, or refused for a lack of memory."""
    try:
        check(store, numbers)
    except REFUSALS as error:
        print(f"refused: {type(error).__name__}: {error}".splitlines()[0])


PLACES = ("upload", "gather", "grow", "consumer")


def run_out(place: str) -> None:
    with GPUFeatureStore(
        new_backend(), load_fn=feature, reader_threads=2, staging_bytes="32MiB"
    ) as store:
        check(store, [0, 1])
        if place == "upload":  # files that are not loaded
            with nothing_is_left():
                try_to(store, [2, 3])
        elif place == "gather":  # files that are cached, so that only the result needs memory
            check(store, [2, 3])
            store.wait_idle()
            with nothing_is_left():
                try_to(store, [0, 1, 2, 3])
        elif place == "grow":  # more files than there is memory for
            for start in range(4, FILES - 2, 2):
                check(store, [start, start + 1])
            assert not ON_CUDA or len(store) < FILES - 6
        else:  # the consumer's own allocations fail, again and again
            for start in range(4, min(FILES - 2, 60), 2):
                with nothing_is_left(), contextlib.suppress(torch.OutOfMemoryError):
                    take(64 * MiB)
                check(store, [start, start + 1])
        wait()
        for start in range(0, min(FILES - 2, 60), 2):
            check(store, [start, start + 1])
        check(store, [0, 1])
        store.check()
    print(f"{place}: exact", flush=True)


def main(taken: float) -> None:
    if ON_CUDA:
        total = torch.cuda.mem_get_info(ACCELERATOR)[1]
        torch.cuda.set_per_process_memory_fraction(LIMIT / total, ACCELERATOR)
    held = take(int(LIMIT * taken))
    for place in PLACES:
        run_out(place)
        if ON_CUDA:
            torch.cuda.empty_cache()
    del held


if __name__ == "__main__":
    main(float(sys.argv[1]))
