"""Shards: which files of an epoch belong to this rank."""

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray
from torch.utils.data import RandomSampler, SequentialSampler, WeightedRandomSampler

from gpucache_pipes.units import positive_int


@dataclass(frozen=True)
class Shards:
    """One of `count` parts of equal length of a list of files.

    Args:
        count: number of parts; 1 for no sharding.
        index: which of them this one is, from 0.
        static: whether the part has the same files in each epoch. Else each epoch is shuffled
            as a whole and then divided.
        drop: make the parts equal by leaving files out; else by repeating some.

    Raises:
        ValueError: count < 1, or an index that is not below it.

    >>> Shards(count=3, index=0).share(np.arange(7))
    array([0, 3, 6])
    >>> Shards(count=3, index=1).share(np.arange(7))  # 0 and 1 make the parts equal
    array([1, 4, 0])
    >>> Shards(count=3, index=1, drop=True).share(np.arange(7))
    array([1, 4])
    """

    count: int = 1
    index: int = 0
    static: bool = False
    drop: bool = False

    def __post_init__(self) -> None:
        positive_int("num_shards", self.count)
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard_index={self.index} must be from 0 to {self.count - 1}")

    @classmethod
    def of(
        cls, files: int, count: int | None, index: int | None, shard: str, drop: bool
    ) -> "Shards":
        """The part that the arguments of a PathLister mean; None is that of this rank.

        Raises ValueError for arguments that are wrong, and for too few files.
        """
        if (count is None) != (index is None):
            raise ValueError("num_shards and shard_index go together")
        if shard not in ("epoch", "static"):
            raise ValueError(f'shard={shard!r} must be "epoch" or "static"')
        if count is None or index is None:
            count, index = find_rank()
        shards = cls(count, index, shard == "static", drop)
        if not shards.size(files):
            raise ValueError(f"{files} files are too few for {count} shards with drop_last")
        return shards

    def size(self, files: int) -> int:
        """Length of each part of `files` files, as in torch.utils.data.DistributedSampler."""
        return files // self.count if self.drop else math.ceil(files / self.count)

    def pool(self, files: int) -> NDArray[np.intp]:
        """The positions from which an epoch over `files` files is drawn.

        All of them; for a static part its own, with those that it repeats.
        """
        if not self.static:
            return np.arange(files)
        mine = np.arange(self.index, files, self.count)[: self.size(files)]
        return np.append(mine, [self.index % files] * (self.size(files) - len(mine))).astype(
            np.intp
        )

    def share(self, order: NDArray[np.intp]) -> NDArray[np.intp]:
        """The files of this part in an epoch whose pool is in the given order.

        As torch.utils.data.DistributedSampler divides it: every `count`-th position from `index`
        on, the order being continued from its beginning where it is too short.
        """
        if self.static or self.count == 1:
            return order
        total = self.size(len(order)) * self.count
        return np.resize(order, total)[self.index :: self.count]


def warn_of_ranks_that_read_the_same(sampler: Any, what: str) -> None:
    """Warn if there are several ranks, and the sampler of `what` gives each of them all files.

    That is so for those of torch that know nothing of ranks; a class of the user's may.
    """
    ranks, _ = find_rank()
    kinds = (RandomSampler, SequentialSampler, WeightedRandomSampler)
    of_torch = type(sampler).__module__.startswith("torch")
    if ranks > 1 and of_torch and isinstance(sampler, kinds):
        warnings.warn(
            f"each of the {ranks} ranks may read all files of this {what}: give it a "
            "DistributedSampler, or let a PathLister without a sampler take the part of its rank",
            stacklevel=2,
        )


def find_rank() -> tuple[int, int]:
    """(number of ranks, this rank): of torch.distributed, else as torchrun announces them.

    (1, 0) if there is neither.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    return 1, 0
