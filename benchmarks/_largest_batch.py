"""Find the largest batch with which a small model trains in a limited part of device memory.

    python benchmarks/_largest_batch.py off|on|yielding [--device cuda] [--scale 1.0]

- off: each batch comes from host memory.
- on: from a store without a budget, over twice as much data as there is memory.
- yielding: the same, with each step in `store.yield_memory_to`, which repeats a step that ran out
  of memory after the cache has made room.

The memory is limited to 8 GiB by torch.cuda.set_per_process_memory_fraction. A size fits if a few
steps of it succeed after the cache has had time to fill. Prints the result as JSON. The CPU has no
limit, and there the search ends at 8.
"""

import argparse
import gc
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _device import Device, Figures

from gpucache_pipes import GPUCollator, GPUFeatureStore, GPUPrefetcher, PathLister

_WIDTH = 256
_STEPS = 6


class Model(torch.nn.Module):
    """Layers whose activations take most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(_WIDTH, _WIDTH) for _ in range(6))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The mean of the last layer's squares, of [B, T, width]."""
        for layer in self.layers:
            batch = torch.nn.functional.gelu(layer(batch))
        return batch.square().mean()


class Trainer:
    """Trains one model on batches.

    Args:
        device: where.
    """

    def __init__(self, device: Device) -> None:
        self.model = Model().to(device.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)

    def __call__(self, batch: torch.Tensor) -> None:
        """One step."""
        self.zero_grad()
        self.model(batch).backward()
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget what an unfinished step has accumulated."""
        self.optimizer.zero_grad()


def batches_without_cache(device: Device, row: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """The same batch again and again, moved from the host."""
    host = torch.stack([row] * size)
    while True:
        yield host.to(device.device)


def fits(device: Device, cache: str, size: int, tokens: int, files: int) -> bool:
    """Whether a few steps with batches of `size` succeed."""
    row = torch.zeros(tokens, _WIDTH)
    trainer = Trainer(device)
    try:
        if cache == "off":
            for batch in itertools.islice(batches_without_cache(device, row, size), _STEPS):
                trainer(batch)
                del batch
            device.wait()
            return True
        with GPUFeatureStore(device.device, load_fn=lambda path: row, reader_threads=2) as store:
            names = [f"/{n}" for n in range(files)]
            node = GPUCollator(GPUPrefetcher(PathLister(names, batch_size=size), store))
            step: Callable[[torch.Tensor], Any] = trainer
            if cache == "yielding":
                step = lambda batch: store.yield_memory_to(  # type: ignore[attr-defined] # noqa: E731
                    trainer, batch, zero_grad=trainer.zero_grad
                )
            # The first steps of an epoch, the last ones of it, when the cache has taken what it
            # takes, and some of the next epoch.
            for number in range(-(-files // size) + _STEPS):
                if number % -(-files // size) == 0:
                    node.reset()
                batch = next(node)
                step(batch)
                del batch
            device.wait()
        return True
    except (torch.OutOfMemoryError, MemoryError):
        return False


def search(device: Device, cache: str, scale: float) -> Figures:
    """The largest size that fits, by doubling and then by halving the interval."""
    memory = max(1 << 30, int((8 << 30) * scale))
    device.limit_memory(memory)
    # On the CPU, where a step takes long and nothing runs out, sequences and data are short.
    tokens = 8 if device.is_cpu else 1024
    files = 64 if device.is_cpu else 2 * memory // (tokens * _WIDTH * 4)
    most = 8 if device.is_cpu else 1 << 20
    if cache == "yielding" and not hasattr(GPUFeatureStore, "yield_memory_to"):
        return {"largest_batch": None, "problem": "this version has no yield_memory_to"}
    tried = []

    def try_size(size: int) -> bool:
        tried.append(size)
        succeeded = fits(device, cache, size, tokens, files)
        gc.collect()
        device.empty_cache()
        return succeeded

    # On a device a size of 1 would take two epochs of thousands of steps.
    good, bad = 0, 1 if device.is_cpu else 16
    while bad <= most and try_size(bad):
        good, bad = bad, 2 * bad
    # To about 3%: exact sizes say no more, and each try takes seconds.
    while bad <= most and bad - good > max(1, good // 32):
        middle = (good + bad) // 2
        if try_size(middle):
            good = middle
        else:
            bad = middle
    return {"largest_batch": good, "memory_bytes": memory, "tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", choices=["off", "on", "yielding"])
    parser.add_argument("--device", default=None)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    print(json.dumps(search(Device(args.device), args.cache, args.scale)))


if __name__ == "__main__":
    main()
