"""Which files of an epoch belong to this rank."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed

from gpucache_pipes.units import positive_int


@dataclass(frozen=True)
class Shards:
    """One part of several, each as large as the others.

    Attributes:
        count: number of parts; 1 is no sharding.
        index: which of them this is.
        static: whether it is made of the same files in each epoch.
        drop: leave files out to make the parts equal, rather than repeat some.
    """

    count: int = 1
    index: int = 0
    static: bool = False
    drop: bool = False

    def __post_init__(self) -> None:
        positive_int("num_shards", self.count)
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard_index={self.index} must be from 0 to {self.count - 1}")

    def size(self, files: int) -> int:
        """Files in a part: as torch.utils.data.DistributedSampler counts them."""
        return files // self.count if self.drop else math.ceil(files / self.count)

    def pool(self, files: int) -> Sequence[int]:
        """The files that an epoch is drawn from; what a static part repeats is its own, too."""
        if not self.static:
            return range(files)
        mine = list(range(self.index, files, self.count))[: self.size(files)]
        return mine + [self.index % files] * (self.size(files) - len(mine))

    def share(self, order: Sequence[int]) -> Sequence[int]:
        """The part of an epoch whose pool is in this order: DistributedSampler's."""
        if self.static or self.count == 1:
            return order
        total = self.size(len(order)) * self.count
        if total > len(order):
            order = [*order, *(order[at % len(order)] for at in range(total - len(order)))]
        return order[self.index : total : self.count]


def find_rank() -> tuple[int, int]:
    """(number of ranks, this one): of torch.distributed, or as torchrun has announced them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    return 1, 0
