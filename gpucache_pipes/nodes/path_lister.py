"""PathLister: the order of an epoch."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torchdata.nodes import BaseNode

from gpucache_pipes.files.listing import GivenPaths, find_files
from gpucache_pipes.nodes.buckets import Buckets
from gpucache_pipes.nodes.order import DrawnOrder, SampledOrder
from gpucache_pipes.nodes.resuming import fingerprint, place
from gpucache_pipes.nodes.sharding import Shards, find_rank
from gpucache_pipes.nodes.upstream import as_node
from gpucache_pipes.store import Upcoming
from gpucache_pipes.units import positive_int

Source = str | os.PathLike[str] | Iterable[Any]


class PathLister(BaseNode[Any]):
    """Yields the paths of feature files, one by one or in batches.

        PathLister("features/", batch_size=256, shuffle=True, seed=0)

    Args:
        source: a directory, a glob such as "data/**/*.pt", or a sequence of paths: then it is
            listed once, here. Or any other iterable, IterDataPipe or node that yields paths:
            then it is read through once in each epoch.
        pattern: which names in a directory are features.
        recursive: look into subdirectories too.
        batch_size: yield lists of so many paths; None yields paths.
        drop_last: leave out a last batch that is smaller.
        shuffle: a new order in each epoch, from (seed, epoch): the one that
            torch.utils.data.DistributedSampler has for one replica.
        seed: any whole number.
        sampler: yields the positions to take from the sorted files in each epoch, or lists of
            positions, each a batch. What it draws from torch's random numbers is determined by
            (seed, epoch); `sampler.set_epoch(epoch)` is called where it exists. It may be
            iterated more often than once an epoch, to know what comes.
        num_shards, shard_index: list only this part of so many. By default the ranks of an
            initialised torch.distributed, or those that torchrun announces. A sampler or a stream
            counts as sharded already. All parts have the same length: files are repeated, or left
            out with drop_last.
        shard: "epoch", another part of the files in each epoch, as
            torch.utils.data.DistributedSampler does it; or "static", always the same files, in
            another order, so that the caches of all ranks add up.
        bucket_by: put files of like size into a batch, so that padding them is cheap:
            "file_size", or a function of the path that gives a number. Batches are still shuffled.
        if_files_changed: what to do with a state over other files: "raise", or "continue" at the
            same place of the same epoch. Some files then come twice in that epoch, or not at all.

    Raises:
        FileNotFoundError: no files; names directory and pattern.
        ValueError: arguments that contradict each other.
    """

    def __init__(
        self,
        source: Source,
        *,
        pattern: str = "*.pt",
        recursive: bool = False,
        batch_size: int | None = None,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        sampler: Iterable[Any] | None = None,
        num_shards: int | None = None,
        shard_index: int | None = None,
        shard: str = "epoch",
        bucket_by: str | Callable[[str], float] | None = None,
        if_files_changed: str = "raise",
    ) -> None:
        super().__init__()
        if batch_size is not None:
            positive_int("batch_size", batch_size)
        elif drop_last:
            raise ValueError("drop_last=True needs a batch_size")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be a whole number")
        if not isinstance(pattern, str):
            raise ValueError(f"pattern={pattern!r} must be a str, such as '*.pt'")
        if shuffle and sampler is not None:
            raise ValueError("shuffle=True and a sampler both set the order; give one of them")
        if isinstance(sampler, Iterator):
            raise ValueError("the sampler is an iterator, which can be read through only once")
        if bucket_by is not None and batch_size is None:
            raise ValueError("bucket_by makes batches of files of like size: give a batch_size")
        if bucket_by is not None and sampler is not None:
            raise ValueError("bucket_by and a sampler both set the order; give one of them")
        if if_files_changed not in ("raise", "continue"):
            raise ValueError(f'if_files_changed={if_files_changed!r} must be "raise" or "continue"')
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.seed = seed
        self.sampler = sampler
        self.if_files_changed = if_files_changed
        self._names_from = ""
        self._stream: BaseNode[Any] | None = None
        self._given: GivenPaths | None = None
        if isinstance(source, (str, os.PathLike, Sequence)):
            if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
                self._names_from = os.path.join(os.fspath(source), "")
            self._given = GivenPaths(find_files(source, pattern, recursive))
        elif shuffle or sampler is not None or bucket_by is not None:
            raise ValueError(
                "an order can only be drawn over a known list: give a directory, a glob or a "
                f"sequence of paths, or shuffle inside the {type(source).__name__}"
            )
        else:
            self._stream = as_node(source)
        self._buckets = None
        if bucket_by is not None and batch_size is not None:
            self._buckets = Buckets.of(self._paths, bucket_by, batch_size)
        # Which rank this is may become known later than there is a lister.
        self._rank_unknown = num_shards is None and sampler is None and self._stream is None
        self._shard = shard
        self.shards = self._choose_shards(num_shards, shard_index, shard)
        self._drawing = self._new_order()
        self._fingerprint: int | None = None
        # The epoch under way, its order, how many paths of it have gone out, and for a batch
        # sampler the same in elements.
        self._epoch = 0
        self._next_epoch: int | None = None
        self._position = 0
        self._order: Sequence[Any] | None = None

    def _choose_shards(self, num_shards: int | None, shard_index: int | None, shard: str) -> Shards:
        if (num_shards is None) != (shard_index is None):
            raise ValueError("num_shards and shard_index go together")
        if shard not in ("epoch", "static"):
            raise ValueError(f'shard={shard!r} must be "epoch" or "static"')
        if self.sampler is not None or self._stream is not None:
            if num_shards is not None:
                raise ValueError(
                    "a sampler or a stream of paths counts as sharded already: leave num_shards "
                    "away, and give each rank its part"
                )
            return Shards()
        if num_shards is None or shard_index is None:
            num_shards, shard_index = find_rank()
        shards = Shards(num_shards, shard_index, shard == "static", self.drop_last)
        if not shards.size(len(self._paths)):
            raise ValueError(
                f"{len(self._paths)} files are too few for {num_shards} shards with drop_last"
            )
        return shards

    def _new_order(self) -> DrawnOrder | SampledOrder:
        if self.sampler is not None:
            return SampledOrder(self.sampler, self.seed)
        files = len(self._paths)
        return DrawnOrder(files, self.shuffle, self.seed, self.shards, self._buckets)

    def _find_rank_again(self) -> None:
        """As when torch.distributed is initialised after this was made."""
        if self._rank_unknown and find_rank() != (self.shards.count, self.shards.index):
            self.shards = self._choose_shards(None, None, self._shard)
            self._drawing = self._new_order()

    @property
    def _paths(self) -> Sequence[str]:
        return () if self._given is None else self._given.now()

    @property
    def paths(self) -> Sequence[str]:
        """All files, sorted. Raises TypeError if the source is a stream.

        As they were given; relative ones become absolute when the current directory changes, so
        that they go on meaning what they meant.
        """
        if self._stream is not None:
            raise TypeError("the paths of a stream are not known in advance")
        return self._paths

    def set_epoch(self, epoch: int) -> None:
        """Let the next reset begin this epoch; without it each reset begins the next one.

        A reset from a state goes on where that was taken; unless this names a later epoch, or
        another one and the state is from the very end of its own.
        """
        self._next_epoch = epoch

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode: begins the next epoch, or goes on where a state was taken."""
        super().reset(initial_state)
        self._find_rank_again()
        following, self._next_epoch = self._next_epoch, None
        if initial_state is not None:
            if "epoch" not in initial_state:
                raise ValueError("this is no state of a PathLister")
            self._epoch, self._position = initial_state["epoch"], initial_state["position"]
        elif following is not None:
            self._epoch, self._position = following, 0
        else:
            self._epoch, self._position = self._epoch + (self._position > 0), 0
        if self._stream is not None:
            self._stream.reset((initial_state or {}).get("source"))
            return
        if initial_state is not None:
            per_rank = self.shards.static or self._buckets is not None
            self._position = place(
                initial_state, self._identity(), self._end, per_rank, self.if_files_changed
            )
        self._order = self._drawing.draw(self._epoch)
        if initial_state is not None and following is not None:
            # A framework that resumes where it ended an epoch says which one it goes on with.
            ended = not self._flat(self._order, self._position)
            if following > self._epoch or (ended and following != self._epoch):
                self._epoch, self._position = following, 0
                self._order = self._drawing.draw(self._epoch)

    def next(self) -> Any:
        """See BaseNode."""
        count = self.batch_size or 1
        if self._stream is not None:
            batch = [_path(item) for item in islice(self._stream, count)]
        else:
            assert self._order is not None
            batch = self._pick(self._order[self._position : self._position + count])
        self._position += len(batch)
        if not batch or (self.drop_last and len(batch) < count):
            raise StopIteration
        return batch[0] if self.batch_size is None else batch

    def _pick(self, order: Sequence[Any]) -> list[Any]:
        """The paths at these positions, or the batches of paths that a batch sampler means."""
        path = self._paths.__getitem__
        if self.sampler is not None:
            return self._pick_sampled(order)
        return list(map(path, order))

    def _pick_sampled(self, order: Sequence[Any]) -> list[Any]:
        path = self._paths.__getitem__
        try:
            if not order or isinstance(order[0], int):
                return list(map(path, order))
            if self.batch_size is not None:
                raise ValueError("the sampler yields batches already: leave batch_size away")
            return [list(map(path, batch)) for batch in order]
        except IndexError as error:
            raise IndexError(
                f"the sampler yields positions beyond the {len(self._paths)} files"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """See BaseNode: a few numbers, however many files there are."""
        state: dict[str, Any] = {"epoch": self._epoch, "position": self._position}
        if self._stream is not None:
            state["source"] = self._stream.state_dict()
        else:
            state |= self._identity()
        return state

    def upcoming(self) -> Upcoming:
        """The paths still to come in this epoch, and all of the next one's, in order.

        Before the first reset those of two epochs. Empty where the order is not known: for a
        stream. Takes about 0.1 us a file; the paths themselves are not copied.
        """
        if self._stream is not None:
            return Upcoming((), (), 0)
        if self._order is None:
            self._find_rank_again()
        begun = self._order is not None
        following = self._epoch + begun if self._next_epoch is None else self._next_epoch
        if self._order is not None:
            rest = self._flat(self._order, self._position)
        else:
            rest = self._flat(self._drawing.draw(following))
            following += 1
        after = self._flat(self._drawing.draw(following))
        return Upcoming(self._paths, [*rest, *after], len(rest))

    def _flat(self, order: Sequence[Any], start: int = 0) -> Sequence[int]:
        """The positions from there on, without those that are dropped at the end."""
        end = len(order)
        if self.drop_last and self.batch_size is not None:
            end -= end % self.batch_size
        rest = order[start:end]
        if self.sampler is None:
            return rest
        if rest and not isinstance(rest[0], int):
            rest = list(chain.from_iterable(rest))
        # Positions as sequences have them; one that is none is an error when it is its turn.
        count = len(self._paths)
        return [i % count for i in rest if -count <= i < count]

    def __len__(self) -> int:
        """Elements in an epoch. Raises TypeError if the source is a stream."""
        if self._stream is not None:
            raise TypeError("how many paths a stream has is not known in advance")
        self._find_rank_again()
        count = len(self._drawing)
        if self.batch_size is None:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def _end(self, shards: int) -> int:
        """How many files a rank has of an epoch on so many."""
        if self.sampler is not None:
            return len(self._drawing)
        size = Shards(shards, 0, self.shards.static, self.drop_last).size(len(self._paths))
        return size - size % self.batch_size if self.drop_last and self.batch_size else size

    def _identity(self) -> dict[str, Any]:
        """What a state says of the lister that it was taken from."""
        if self._fingerprint is None:
            sizes = 0 if self._buckets is None else self._buckets.checksum
            given = () if self._given is None else self._given.given
            self._fingerprint = fingerprint(given, self._names_from, sizes)
        return {
            "order": str(self._drawing),
            "shards": self.shards.count,
            "files": len(self._paths),
            "fingerprint": self._fingerprint,
        }


def _path(item: Any) -> str:
    if not isinstance(item, (str, os.PathLike)):
        raise TypeError(f"the source of a PathLister must yield paths, not {item!r:.200}")
    return os.fspath(item)
