"""A process that trains while a store without a budget caches. Run by test_model_memory.py.

    python growing_model.py growing|yielding|hopeless

The memory is limited to 4 GiB; there are 8 GiB of data.
"""

import contextlib
import sys

import torch
from conftest import ACCELERATOR
from edges import new_backend
from gpu_common import ON_CUDA, MiB, first_column

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

LIMIT = 4096 * MiB
FILES = 8192 if ON_CUDA else 64
NAMES = [f"/f/{n}" for n in range(FILES)]


def feature(path: str) -> torch.Tensor:
    return torch.full((MiB // 4,), float(path.rpartition("/")[2]))


class Training:
    """Batches of a pipeline, and steps that need a given amount of memory for activations."""

    def __init__(self, store: GPUFeatureStore) -> None:
        self.lister = PathLister(NAMES, batch_size=8, shuffle=True)
        self.order = PathLister(NAMES, batch_size=8, shuffle=True)
        self.node = GPUCollator(GPUPrefetcher(self.lister, store))
        self.weight = torch.ones((), device=ACCELERATOR, requires_grad=True)

    def next_batch(self) -> torch.Tensor:
        try:
            paths = next(self.order)
        except StopIteration:
            self.order.reset()
            self.node.reset()
            paths = next(self.order)
        batch: torch.Tensor = next(self.node)
        assert first_column(batch) == [int(path[3:]) for path in paths]
        return batch

    def step(self, batch: torch.Tensor, nbytes: int) -> None:
        """A forward pass that keeps 16 tensors of `nbytes` together, and a backward pass."""
        self.zero_grad()
        start = batch.sum() * 0
        one = nbytes // 64 if ON_CUDA else 16
        # exp keeps its result for the backward pass.
        activations = [(self.weight * start).expand(one).exp() for _ in range(16)]
        loss = torch.stack([part[0] for part in activations]).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    def zero_grad(self) -> None:
        self.weight.grad = None


def growing(store: GPUFeatureStore) -> None:
    """No step needs over 10% more than one before it has needed: none of them fails."""
    training = Training(store)
    fill(training)
    nbytes = LIMIT // 20
    while nbytes < LIMIT * 0.75:
        for _ in range(6):
            training.step(training.next_batch(), nbytes)
        nbytes = int(nbytes * 1.1) if ON_CUDA else LIMIT
    print(f"grown to {nbytes >> 20} MiB, {len(store)} features are still cached")


def fill(training: Training) -> None:
    for _ in range(FILES // 8):
        training.step(training.next_batch(), LIMIT // 20)


def yielding(store: GPUFeatureStore) -> None:
    """A step that is much larger than any before runs out of memory once, and is repeated."""
    training = Training(store)
    fill(training)
    before = store.stats().reserved_bytes
    # More than is left beside the cache, and less than there is without it.
    nbytes = min(LIMIT - before, int(LIMIT * 0.75))
    assert not ON_CUDA or before > LIMIT * 0.3, "the cache is too small to be in the way"
    calls: list[torch.Tensor] = []
    zeroed: list[None] = []

    def large(batch: torch.Tensor) -> float:
        calls.append(torch.rand(4, device=ACCELERATOR))
        training.step(batch, nbytes)
        return float(batch[0, 0])

    batch = training.next_batch()
    expected = float(batch[0, 0])
    result = store.yield_memory_to(large, batch, zero_grad=lambda: zeroed.append(None))
    assert result == expected
    if ON_CUDA:
        assert len(calls) == 2 and len(zeroed) == 1, (len(calls), len(zeroed))
        assert torch.equal(calls[0], calls[1])  # the same random numbers
        assert store.stats().reserved_bytes < before
    for _ in range(20):
        training.step(training.next_batch(), LIMIT // 20)
    print(f"{len(store)} features are still cached")


def hopeless(store: GPUFeatureStore) -> None:
    """A step that does not fit into an empty device fails, and the store goes on."""
    training = Training(store)
    fill(training)

    def too_large() -> torch.Tensor:
        return torch.empty(2 * LIMIT, dtype=torch.uint8, device=ACCELERATOR)

    raised = False
    try:
        store.yield_memory_to(too_large)
    except torch.OutOfMemoryError:
        raised = True
    assert raised == ON_CUDA
    for _ in range(20):
        training.step(training.next_batch(), LIMIT // 20)


def main(kind: str) -> None:
    if ON_CUDA:
        total = torch.cuda.mem_get_info(ACCELERATOR)[1]
        torch.cuda.set_per_process_memory_fraction(LIMIT / total, ACCELERATOR)
    with GPUFeatureStore(new_backend(), load_fn=feature, reader_threads=2) as store:
        {"growing": growing, "yielding": yielding, "hopeless": hopeless}[kind](store)
        store.check()
    with contextlib.suppress(AttributeError):
        print(f"ooms: {torch.cuda.memory_stats().get('num_ooms')}")
    print("exact")


if __name__ == "__main__":
    main(sys.argv[1])
