"""PathLister: lists files, and yields their paths in the order of an epoch."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchdata.nodes import BaseNode

from gpucache_pipes.files import AnyFiles, PathList, RemoteOptions
from gpucache_pipes.nodes.buckets import Buckets
from gpucache_pipes.nodes.listed_files import ListedFiles
from gpucache_pipes.nodes.options import no_list, require_batches, require_consistent
from gpucache_pipes.nodes.order import DrawnOrder, Order, SampledOrder, picked, requested
from gpucache_pipes.nodes.rank_orders import ShardedOrders
from gpucache_pipes.nodes.resuming import resumed_position
from gpucache_pipes.nodes.sharding import Shards, find_rank
from gpucache_pipes.nodes.upstream import as_node, as_path, is_list
from gpucache_pipes.store import Upcoming
from gpucache_pipes.units import counted, positive_int

Source = str | os.PathLike[str] | Iterable[Any]


class PathLister(BaseNode[Any]):
    """Yields the paths of feature files, one by one or in batches.

        PathLister("features/", batch_size=256, shuffle=True, seed=0)

    Each reset begins the next epoch, or the current one again if nothing was yielded of it. The
    order of an epoch follows from (seed, epoch): a state is a few numbers, and the store is told.

    Args:
        source: a directory, a glob such as "data/**/*.pt", either of which may be a URL such as
            "s3://bucket/features/", or a sequence of paths: a list of
            files, made once, in the constructor. Where a sample is several files, a dict of these,
            {"video": ..., "audio": ...}, or a sequence of dicts or tuples of paths; the files of
            directories and globs go together by name, whatever its ending. Or a stream: any other
            iterable, IterDataPipe or node of paths, iterated once per epoch in its own order.
        pattern: which names in a directory are features.
        recursive: look into subdirectories as well.
        batch_size: yield batches of this many paths, at least 1; None yields single paths.
        drop_last: omit the last batch if it is smaller.
        shuffle: a new order in each epoch: that of torch.utils.data.DistributedSampler with the
            same seed and one replica.
        seed: any whole number.
        sampler: yields positions in the list of files, or lists of positions, each a batch. What
            it draws from torch's random numbers follows from (seed, epoch);
            `sampler.set_epoch(epoch)` is called where it exists. It may be iterated more than once
            per epoch, to announce the order.
        num_shards, shard_index: yield only part `shard_index` of `num_shards`. By default those
            of the ranks of an initialised torch.distributed, or that torchrun announces, looked up
            when an epoch begins. A sampler or a stream counts as sharded already. All parts have
            the same length: some files are repeated or, with drop_last, left out.
        shard: "epoch", another part of the files in each epoch, divided as by DistributedSampler;
            or "static", the same files in each epoch, so that the ranks' caches add up.
        labels: what belongs to each file. A GPUPrefetcher then yields (features, labels), with
            the labels of a batch gathered on the device. For a sequence of paths: a sequence, array
            or tensor of as many labels, or a dict or DataFrame of such columns. For a directory or
            a glob, where a file may be added, by name: a dict, or a Series or DataFrame whose index
            holds names, or a function path -> label, called once for each file. A name is the path
            as it is listed, that below the directory, or the file's own, with or without its
            ending. Numbers become tensors as default_collate makes them, other objects lists.
        bucket_by: put files of similar size into a batch, so that padding them costs little: by
            "file_size", or by a function path -> number; of samples of several files, sample ->
            number. Batches are still shuffled.
        if_files_changed: how to resume a state over other files: "raise", or "continue" at the
            same position of the same epoch, where some files are then read twice or not at all.
        storage_options: for a source that is a URL, as in GPUFeatureStore. Not kept.
        list_cache: a file that remembers what a URL has listed: names, sizes and hashes of etags.
            While it is there, nothing is listed; remove it when objects were added.

    Attributes:
        shards: the part that is yielded.

    Raises:
        FileNotFoundError: no files; names directory and pattern.
        ValueError: arguments that are wrong or contradict each other.
        OSError, ImportError: an object store that denies access, or cannot be reached.
        TypeError: a source that is not iterable; in `next()`, one that yields anything but paths.
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
        labels: Any = None,
        bucket_by: str | Callable[[str], float] | None = None,
        if_files_changed: str = "raise",
        storage_options: Mapping[str, Any] | None = None,
        list_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        remote = RemoteOptions.of(storage_options, list_cache)
        require_consistent(
            pattern, batch_size, drop_last, shuffle, seed, sampler, bucket_by, if_files_changed
        )
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.shuffle = shuffle
        self.seed = seed
        self.sampler = sampler
        self.if_files_changed = if_files_changed
        self._stream: BaseNode[Any] | None = None
        self._listed: ListedFiles | None = None
        if is_list(source):
            self._listed = ListedFiles(source, pattern, recursive, labels, remote)
            if self._files.parts and sampler is None:
                require_batches(batch_size)
        elif shuffle or sampler is not None or bucket_by is not None or labels is not None:
            raise no_list(source)
        else:
            self._stream = as_node(source)  # type: ignore[arg-type]
        self._buckets = None
        if bucket_by is not None and batch_size is not None:
            size = AnyFiles(storage_options=storage_options).size
            self._buckets = Buckets.of(self.paths, bucket_by, batch_size, size)
        # The rank may become known only after the lister was made.
        self._rank_unknown = num_shards is None and sampler is None and self._stream is None
        self._shard = shard
        self.shards = self._choose_shards(num_shards, shard_index, shard)
        self._make_order()
        # The current epoch, the one that set_epoch has named for the next reset, how many paths
        # of the current one were yielded (for a sampler of batches, how many batches), and its
        # order, None before the first reset.
        self._epoch = 0
        self._next_epoch: int | None = None
        self._position = 0
        self._order: Order | None = None

    def _choose_shards(self, num_shards: int | None, shard_index: int | None, shard: str) -> Shards:
        if self.sampler is None and self._stream is None:
            return Shards.of(self._files.samples, num_shards, shard_index, shard, self.drop_last)
        if num_shards is not None or shard_index is not None:
            raise ValueError(
                "a sampler or a stream of paths counts as sharded already: omit num_shards, and "
                "give each rank its part"
            )
        return Shards()

    def _make_order(self) -> None:
        self._drawing: DrawnOrder | SampledOrder
        if self.sampler is not None:
            self._drawing = SampledOrder(self.sampler, self.seed, self._files.samples)
        else:
            count = self._files.samples
            self._drawing = DrawnOrder(count, self.shuffle, self.seed, self.shards, self._buckets)
        self._order_name = str(self._drawing)

    def _find_rank_again(self) -> None:
        """Follow a torch.distributed that was initialised after the lister was made."""
        if self._rank_unknown and find_rank() != (self.shards.count, self.shards.index):
            self.shards = self._choose_shards(None, None, self._shard)
            self._make_order()

    @property
    def _files(self) -> PathList:
        return _NONE if self._listed is None else self._listed.files

    def _require_list(self) -> ListedFiles:
        if self._listed is None:
            raise TypeError("the paths of a stream are not known in advance")
        return self._listed

    @property
    def paths(self) -> Sequence[Any]:
        """All files, as given; those of a directory or a glob sorted. Or samples of several files.

        Relative paths become absolute when the current directory changes. Raises TypeError if the
        source is a stream.
        """
        return self._require_list().everything()

    def set_epoch(self, epoch: int) -> None:
        """Let the next reset begin this epoch; the first is 0. Else each reset begins the next one.

        A reset from a state goes on in the epoch of the state, unless this names a later one, or
        any other one after a state from the end of its own: that with which a framework goes on.
        """
        self._next_epoch = positive_int("epoch", epoch, least=0)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin the next epoch, or go on where a state was taken.

        Raises:
            ValueError: for a state of something else, or over other files; see the class.
        """
        super().reset(initial_state)
        self._find_rank_again()
        following, self._next_epoch = self._next_epoch, None
        if initial_state is not None:
            if "epoch" not in initial_state:
                raise ValueError("this is not a state of a PathLister")
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
            self._position = resumed_position(
                initial_state, self._identity(), self._end, per_rank, self.if_files_changed
            )
        self._order = self._drawing.draw(self._epoch)
        if initial_state is not None and following is not None:
            ended = not len(self._flat(self._order, self._position))
            if following > self._epoch or (ended and following != self._epoch):
                self._epoch, self._position = following, 0
                self._order = self._drawing.draw(self._epoch)

    def next(self) -> Any:
        """The next path, or the next batch, a read-only sequence that is like a list."""
        count = self.batch_size or 1
        batch: Sequence[Any]
        if self._stream is not None:
            batch = [as_path(item) for item in islice(self._stream, count)]
        else:
            assert self._order is not None
            end = self._position + count
            batch = picked(self._order[self._position : end], self._files, self.batch_size)
        self._position += len(batch)
        if not batch or (self.drop_last and len(batch) < count):
            raise StopIteration
        return batch[0] if self.batch_size is None else batch

    def own_paths(self) -> list[str]:
        """The files that the epochs of this shard are made of: all of them, unless it is static."""
        listed = self._require_list()
        self._find_rank_again()
        return listed.own(self.shards)

    @property
    def labelled(self) -> bool:
        """Whether its files have labels."""
        return self._files.labels is not None

    def numbered(self, element: Any) -> Any:
        """What `next` has yielded, of what a state holds: see `files.as_plain_data`."""
        return element if self._listed is None else self._listed.numbered(element)

    def __bool__(self) -> bool:
        return True  # also for a stream, which has no length

    def __repr__(self) -> str:
        if self._stream is not None:
            return f"PathLister(a stream, batch_size={self.batch_size})"
        files = self._files
        told = counted(files.samples, "sample" if files.parts else "file")
        if files.parts:
            told += f" of {', '.join(map(str, files.parts))}"
        if files.labels is not None:
            told += " with labels"
        if self.shards.count > 1:
            told += f", shard {self.shards.index} of {self.shards.count}"
        return f"PathLister({told}, batch_size={self.batch_size}, {self._order_name})"

    def get_state(self) -> dict[str, Any]:
        """Epoch, position, and what identifies the list, or the state of the stream."""
        state: dict[str, Any] = {"epoch": self._epoch, "position": self._position}
        if self._stream is not None:
            state["source"] = self._stream.state_dict()
        else:
            state |= self._identity()
        return state

    def upcoming(self) -> Upcoming:
        """The paths that are left of this epoch, and all of the next one, in order.

        Before the first reset, those of the first two epochs; of a stream none. The next epoch is
        drawn when it is needed, except by a sampler.
        """
        if self._listed is None:
            return Upcoming((), (), 0)
        following = self._next_epoch
        if following is None:
            following = self._epoch + (self._order is not None)
        if self._order is None:
            self._find_rank_again()
            rest = self._flat(self._drawing.draw(following))
            following += 1
        else:
            rest = self._flat(self._order, self._position)
        drawing = self._drawing

        def both_epochs() -> NDArray[np.intp]:
            return np.concatenate([rest, self._flat(drawing.draw(following))])

        # A sampler is for this thread only.
        order = both_epochs if isinstance(drawing, DrawnOrder) else both_epochs()
        return Upcoming(self._files, order, len(rest))

    def sharded_orders(self) -> ShardedOrders | None:
        """Where it stands in the orders of all shards; None where only its own one is known."""
        drawing, at = self._drawing, (self._epoch, self._position)
        if not isinstance(drawing, DrawnOrder) or self._listed is None:
            return None
        identity = self._identity()
        return ShardedOrders(drawing, self.shards, self._files, *at, self._flat, identity)

    def _flat(self, order: Order, start: int = 0) -> NDArray[np.intp]:
        """The positions of files from sample `start` on, without those that drop_last omits."""
        end = len(order)
        if self.drop_last and self.batch_size is not None:
            end -= end % self.batch_size
        return requested(order[start:end], self._files, self.batch_size)

    def __len__(self) -> int:
        """Elements that an epoch yields. Raises TypeError if the source is a stream."""
        self._require_list()
        self._find_rank_again()
        count = len(self._drawing)
        if self.batch_size is None:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def _end(self, shards: int) -> int:
        """Where an epoch ends for a rank, as a position, with this number of shards."""
        if self.sampler is not None:
            return len(self._drawing)
        size = Shards(shards, 0, self.shards.static, self.drop_last).size(self._files.samples)
        return size - size % self.batch_size if self.drop_last and self.batch_size else size

    def _identity(self) -> dict[str, Any]:
        """The part of a state by which a lister recognises its own order and files."""
        sizes = 0 if self._buckets is None else self._buckets.checksum
        return {
            "order": self._order_name,
            "shards": self.shards.count,
            "files": self._files.samples,
            "fingerprint": self._require_list().fingerprint(sizes),
        }


_NONE = PathList([])
