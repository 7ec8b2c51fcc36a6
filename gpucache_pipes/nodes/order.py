"""The order of an epoch: drawn from a seed, or by a sampler of the user's."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpucache_pipes.files import PathList, Paths, Samples, files_of
from gpucache_pipes.nodes.buckets import Buckets
from gpucache_pipes.nodes.options import require_batches
from gpucache_pipes.nodes.sharding import Shards, warn_of_ranks_that_read_the_same

Order = NDArray[np.intp] | list[Any]
"""Positions in the list of files; a list of positions or of batches where a sampler yields them."""


class DrawnOrder:
    """All files or one part of them: as they are listed, or shuffled anew in each epoch.

    Shuffled orders are those of torch.utils.data.DistributedSampler, drawn from seed + epoch.

    Args:
        files: number of files.
        shuffle: whether to shuffle.
        seed: any whole number.
        shards: the part to take.
        buckets: how to group files of similar size into batches; None not to.

    >>> order = DrawnOrder(6, True, 0, Shards(), None)
    >>> sorted(order.draw(1).tolist()), str(order)
    ([0, 1, 2, 3, 4, 5], 'shuffle=True, seed=0')
    """

    def __init__(
        self, files: int, shuffle: bool, seed: int, shards: Shards, buckets: Buckets | None
    ) -> None:
        self._files = files
        self._shuffle = shuffle
        self._seed = seed
        self._shards = shards
        self._buckets = buckets

    def draw(self, epoch: int) -> NDArray[np.intp]:
        """The positions in the list of files, in the order of this epoch. In any thread."""
        return self.draw_shards(epoch, [self._shards.index])[0]

    def draw_shards(self, epoch: int, shards: Sequence[int]) -> list[NDArray[np.intp]]:
        """The same for several shards: what `draw` gives in the rank of each. In any thread."""
        drawn: list[NDArray[np.intp]] = []
        pool, state = None, torch.empty(0, device="cpu")
        for index in shards:
            own = replace(self._shards, index=index)
            random = _generator(self._seed + epoch) if self._shuffle else None
            if pool is None or own.static:
                pool = own.pool(self._files)
                if random is not None:
                    drawn_at = torch.randperm(len(pool), generator=random, device="cpu")
                    pool = pool[drawn_at.numpy()]
                    state = random.get_state()
            elif random is not None:  # as it is after the same drawing
                random.set_state(state)
            order = own.share(pool)
            drawn.append(order if self._buckets is None else self._buckets.group(order, random))
        return drawn

    def __len__(self) -> int:
        """Files in an epoch."""
        return self._shards.size(self._files)

    def __str__(self) -> str:
        """What must be the same in a state and in the lister that resumes it."""
        words = f"shuffle={self._shuffle}, seed={self._seed}"
        if self._shards.static:
            words += ', shard="static"'
        return words if self._buckets is None else f"{words}, bucket_by, {self._buckets}"


class SampledOrder:
    """What a sampler yields: positions, or lists of positions that are batches.

    What the sampler draws from torch's random numbers follows from seed + epoch. The random
    numbers of the rest of the program are not affected.

    Args:
        sampler: a torch Sampler or BatchSampler, or any iterable of the same elements.
        seed: any whole number.
        files: how many there are.

    Raises:
        ValueError: it has weights for another number of files.
    """

    def __init__(self, sampler: Iterable[Any], seed: int, files: int) -> None:
        self._sampler: Any = sampler
        self._seed = seed
        self._inner: Any = getattr(sampler, "sampler", sampler)  # of a BatchSampler
        self._warned = False
        weights: Any = getattr(self._inner, "weights", None)
        if hasattr(weights, "__len__") and len(weights) != files:
            raise ValueError(f"the sampler has {len(weights)} weights for {files} files")
        # A generator that the user gave the sampler: its seed is part of the order. It is read
        # once, since seeding the generator for an epoch changes its `initial_seed()`.
        self._generator: torch.Generator | None = getattr(self._inner, "generator", None)
        self._generator_seed = self._generator.initial_seed() if self._generator else 0

    def draw(self, epoch: int) -> list[Any]:
        """The positions in the list of files, or lists of them, in the order of this epoch.

        Calls `set_epoch(epoch)` of the sampler, and of the one within a BatchSampler, where they
        have it.
        """
        if not self._warned:
            self._warned = True
            warn_of_ranks_that_read_the_same(self._inner, "PathLister")
        for sampler in {id(s): s for s in (self._sampler, self._inner)}.values():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        # The generator of the CPU is the one that samplers draw from. torch.manual_seed would seed
        # those of the devices as well.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed((self._seed + epoch) % 2**63)
        if self._generator is not None:
            self._generator.manual_seed((self._generator_seed + self._seed + epoch) % 2**63)
        # Torch's samplers draw on the default device, with a generator that must be of that device.
        where = torch.device("cpu") if self._generator is None else self._generator.device
        try:
            with where:
                return [
                    list(map(_position, index))
                    if isinstance(index, (list, tuple))
                    else _position(index)
                    for index in self._sampler
                ]
        finally:
            torch.default_generator.set_state(before)

    def __len__(self) -> int:
        """What the sampler says. Raises TypeError if it has no length."""
        return len(self._sampler)

    def __str__(self) -> str:
        """What must be the same in a state and in the lister that resumes it."""
        return f"sampler={type(self._sampler).__name__}, seed={self._seed}"


def _position(index: Any) -> int:
    try:
        return operator.index(index)
    except TypeError:
        raise TypeError(
            f"the sampler yields {index!r:.80}, which is no position of a file; of weights, "
            "torch.utils.data.WeightedRandomSampler makes positions"
        ) from None


def flatten(sampled: list[Any], files: int) -> NDArray[np.intp]:
    """The positions that a sampler yields, those of its batches one after the other, from 0 on.

    They may be negative, as in sequences. Those out of range are left out: they are an error in the
    `next()` that reaches them.

    >>> flatten([[0, -1], [7, 1]], files=3)
    array([0, 2, 1])
    """
    if sampled and not isinstance(sampled[0], int):
        sampled = list(chain.from_iterable(sampled))
    flat = np.array(sampled, np.intp)
    return flat[(flat >= -files) & (flat < files)] % files


def picked(order: Order, files: PathList, batch_size: int | None) -> Sequence[Any]:
    """The paths or samples at these positions; a list of batches, if the order is one.

    Raises:
        ValueError: batches together with a batch_size, or samples of several files without.
        IndexError: a position beyond the files.
    """
    pick = Samples.pick if files.parts else Paths
    if isinstance(order, np.ndarray):
        # A copy, so that a batch does not keep the order of its epoch.
        return pick(files, order.copy())
    if order and not isinstance(order[0], int):
        if batch_size is not None:
            raise ValueError("the sampler yields batches already: omit batch_size")
        return [picked(batch, files, len(batch)) for batch in order]
    if order and files.parts:
        require_batches(batch_size)
    positions, count = np.array(order, np.intp), files.samples
    if order and not -count <= positions.min() <= positions.max() < count:
        raise IndexError(f"the sampler yields positions beyond the {count} files")
    return pick(files, positions % count)


def requested(order: Order, files: PathList, batch_size: int | None) -> NDArray[np.intp]:
    """The positions of files in the order in which their batches are requested.

    Args:
        order: positions of samples, or lists of them that are batches.
        files: the list.
        batch_size: samples in a batch, where `order` has no batches.

    >>> files = PathList(["v0", "v1", "v2", "a0", "a1", "a2"], parts=("video", "audio"))
    >>> requested(np.array([2, 0, 1]), files, batch_size=2)
    array([2, 0, 5, 3, 1, 4])
    """
    samples = files.samples
    if not files.parts:
        return order if isinstance(order, np.ndarray) else flatten(order, samples)
    if isinstance(order, list) and order and not isinstance(order[0], int):
        batches = [files_of(flatten(batch, samples), files) for batch in order]
        return np.concatenate(batches).astype(np.intp)
    flat = order if isinstance(order, np.ndarray) else flatten(order, samples)
    size = batch_size or 1
    whole = len(flat) - len(flat) % size
    alike = files_of(flat[:whole].reshape(-1, 1, size), files)
    return np.append(alike.reshape(-1), files_of(flat[whole:], files)).astype(np.intp)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)
