"""In which order an epoch goes through the files."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gpucache_pipes.nodes.buckets import Buckets
from gpucache_pipes.nodes.sharding import Shards


class DrawnOrder:
    """All files or one part of them, as they are listed, or in a new order in each epoch.

    Shuffled orders are those of torch.utils.data.DistributedSampler: from seed + epoch.
    """

    def __init__(
        self, files: int, shuffle: bool, seed: int, shards: Shards, buckets: Buckets | None
    ) -> None:
        self._files = files
        self._shuffle = shuffle
        self._seed = seed
        self._shards = shards
        self._buckets = buckets

    def draw(self, epoch: int) -> Sequence[int]:
        """Positions in the list of files."""
        pool = self._shards.pool(self._files)
        random = None
        if self._shuffle:
            random = _generator(self._seed + epoch)
            drawn = torch.randperm(len(pool), generator=random).tolist()
            pool = [pool[at] for at in drawn] if self._shards.static else drawn
        order = self._shards.share(pool)
        return order if self._buckets is None else self._buckets.group(order, random)

    def __len__(self) -> int:
        return self._shards.size(self._files)

    def __str__(self) -> str:
        """What a state must have in common with the lister that resumes it."""
        words = f"shuffle={self._shuffle}, seed={self._seed}"
        if self._shards.static:
            words += ', shard="static"'
        return words if self._buckets is None else f"{words}, bucket_by, {self._buckets}"


class SampledOrder:
    """What a sampler yields: positions, or lists of them that are batches.

    What it draws from torch's random numbers is determined by seed + epoch, and nobody else's
    random numbers are moved by it.
    """

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self._sampler: Any = sampler
        self._seed = seed
        # A generator of the sampler's own: its seed stays part of the order, and is remembered
        # because seeding it for an epoch changes what it says of itself.
        self._inner: Any = getattr(sampler, "sampler", sampler)  # of a BatchSampler
        self._generator: torch.Generator | None = getattr(self._inner, "generator", None)
        self._generator_seed = self._generator.initial_seed() if self._generator else 0

    def draw(self, epoch: int) -> Sequence[Any]:
        """Positions in the list of files, or lists of them."""
        for sampler in {id(s): s for s in (self._sampler, self._inner)}.values():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        # The CPU's generator only, which is the one that samplers draw from: torch.manual_seed
        # would seed the devices as well.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed((self._seed + epoch) % 2**63)
        if self._generator is not None:
            self._generator.manual_seed((self._generator_seed + self._seed + epoch) % 2**63)
        try:
            return [
                [int(i) for i in index] if isinstance(index, (list, tuple)) else int(index)
                for index in self._sampler
            ]
        finally:
            torch.default_generator.set_state(before)

    def __len__(self) -> int:
        return len(self._sampler)

    def __str__(self) -> str:
        return f"sampler={type(self._sampler).__name__}, seed={self._seed}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)
