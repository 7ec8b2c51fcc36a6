"""GPUCollator: features in, batches of device tensors [B, ...] out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torchdata.nodes import BaseNode

from gpucache_pipes.batches import (
    FeatureBatch,
    SampleBatch,
    collate_on_host,
    first_device,
    to_device,
)
from gpucache_pipes.nodes.batch_type import Batch
from gpucache_pipes.nodes.callbacks import call
from gpucache_pipes.nodes.consumer import ConsumerStream
from gpucache_pipes.nodes.labels import Labelled
from gpucache_pipes.nodes.options import CollateOptions
from gpucache_pipes.nodes.prefetcher import GPUPrefetcher
from gpucache_pipes.nodes.upstream import as_node, length_of, shown, upstream_nodes

_GATHERED = (FeatureBatch, SampleBatch)
_BATCHES = (*_GATHERED, Labelled)


class GPUCollator(BaseNode[Batch]):
    """Collates each FeatureBatch, or every `batch_size` single features.

    Without collate_fn, a batch is what `torch.utils.data.default_collate` makes of the features,
    on the device of the store: tensors are stacked to [B, *shape] and contiguous, numbers become
    tensors [B], strings stay lists. In a tuple (FeatureBatch, element), as a GPUPrefetcher with
    path_fn yields it, the FeatureBatch is collated and the rest stays as it is. Of samples of
    several files each part is collated by itself: {"video": batch, "audio": batch}. Batches are
    the consumer's: the cache shares no memory with them.

    Device operations are issued on the stream that GPUPrefetcher describes.

    Args:
        source: a node or iterable of FeatureBatches or other sequences of features; with
            batch_size, of single features.
        collate_fn: list of features -> batch. It replaces the default collation, is called in the
            thread that calls `next()`, and must not return None.
        batch_size: number of single features per batch, at least 1. Directly behind a
            GPUPrefetcher, these are gathered at once.
        drop_last: omit the last batch if it has fewer than batch_size features.
        ragged: how to join tensors whose first dimension may differ from feature to feature:
            "error", to raise; "pad", a Padded of values [B, T, ...], lengths and mask; "jagged",
            a torch.nested tensor; "list", a list of tensors. One mode is for every leaf of at
            least one dimension, in every batch, even where all lengths are equal. A dict of modes
            is for the leaves that it names: as errors name them, or by the keys of a feature that
            is a dict; other leaves are stacked. So the types of a batch follow from this option,
            and not from the lengths in it. Needs a GPUPrefetcher directly upstream.
        padding_value: fills padded sequences after their end.
        pad_to_multiple: round the length T of a padded batch up to a multiple of this.
        max_length: of sequences that are longer, so much is taken, before they are joined.
        crop: which part of these: "start", "center", or "random", drawn for each feature and batch
            from torch's random numbers, which are not in the state of the node. Sequences of one
            length in a feature are cut at one place.
        transform: batch -> what to yield, such as augmentation on the device. It is called in the
            thread that calls `next()`, on the same stream, with all that would be yielded without
            it, labels included, and must not return None. Random numbers that it draws are not in
            the state of the node.

    Raises:
        ValueError: an unknown mode; ragged together with a collate_fn; drop_last without a
            batch_size; batch_size, pad_to_multiple or max_length below 1.
        RuntimeError: in `next()`, if shapes differ that `ragged` does not allow to; names the
            leaf, the shapes and the files.
        TypeError: in `next()`, for elements that are no sequences of features, such as paths.
    """

    def __init__(
        self,
        source: BaseNode[Any] | Iterable[Any],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size: int | None = None,
        drop_last: bool = False,
        ragged: str | Mapping[str, str] = "error",
        padding_value: float = 0.0,
        pad_to_multiple: int = 1,
        max_length: int | None = None,
        crop: str = "start",
        transform: Callable[[Any], Batch] | None = None,
    ) -> None:
        super().__init__()
        options = CollateOptions(
            collate_fn, batch_size, drop_last, ragged, padding_value, pad_to_multiple, max_length,
            crop, transform,
        )  # fmt: skip
        self.ragged = options.ragged_options()
        self.source = as_node(source)
        self.collate_fn = collate_fn
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.transform = transform
        self._stream: Callable[[], AbstractContextManager[Any]] = nullcontext

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Reset the source: begin the next epoch, or go on where a state was taken."""
        super().reset(initial_state)
        prefetcher = self._prefetcher()
        self._stream = nullcontext if prefetcher is None else ConsumerStream(prefetcher.store)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """{"source": the state of the source}."""
        return {"source": self.source.state_dict()}

    def next(self) -> Batch:
        """The next batch; see the class."""
        with self._stream():
            batch: Batch = self._next()
            return batch if self.transform is None else call(self.transform, "transform", batch)

    def _next(self) -> Any:
        if self.batch_size is None:
            source = self.source
            if self.ragged.modes == "error" or not isinstance(source, GPUPrefetcher):
                return self._collate(next(source))
            at_once = source.path_fn is None
            return source.next_collated(self.ragged) if at_once else self._collate(next(source))
        features = self._take(self.batch_size)
        count = len(features.features if isinstance(features, Labelled) else features)
        if not count or (self.drop_last and count < self.batch_size):
            raise StopIteration
        return self._collate(features)

    def __len__(self) -> int:
        """Batches of an epoch. Raises TypeError if the source has no length."""
        count = length_of(self.source)
        if self.batch_size is None:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __bool__(self) -> bool:
        """True, also for a source without a length."""
        return True

    def __repr__(self) -> str:
        options = "" if self.batch_size is None else f", batch_size={self.batch_size}"
        if self.ragged.modes != "error":
            options += f", ragged={self.ragged.modes!r}"
        return f"GPUCollator({shown(self.source)}{options})"

    def shutdown(self) -> None:
        """Shut down the GPUPrefetchers upstream. The node can be reset and used again."""
        for prefetcher in self._prefetchers():
            prefetcher.shutdown()

    def _take(self, count: int) -> Sequence[Any]:
        """The next `count` features, fewer at the end of the epoch."""
        source = self.source
        if isinstance(source, GPUPrefetcher):
            return source.take(count)
        features: list[Any] = []
        for feature in source:
            if isinstance(feature, _GATHERED):
                raise TypeError("the source yields batches already: omit batch_size")
            features.append(feature)
            if len(features) == count:
                break
        return features

    def _collate(self, element: Any) -> Any:
        """The batch that an element of the source, or a list of features, becomes."""
        if isinstance(element, _GATHERED):
            return element.collate(self.ragged) if self.collate_fn is None else self._call(element)
        if isinstance(element, Labelled):
            return self._collate(element.features), element.labels
        if isinstance(element, tuple) and any(isinstance(part, _BATCHES) for part in element):
            return tuple(
                self._collate(part) if isinstance(part, _BATCHES) else part for part in element
            )
        source = self.source
        single = (
            isinstance(source, GPUPrefetcher) and source.path_fn is None and not self.batch_size
        )
        if not isinstance(element, Sequence) or isinstance(element, (str, bytes)) or single:
            raise TypeError(
                f"a GPUCollator collates sequences of features, not {type(element).__name__}; "
                "with batch_size it makes batches of single features itself"
            )
        if element and all(isinstance(item, (str, os.PathLike)) for item in element):
            raise TypeError("these are paths, not features: put a GPUPrefetcher in front")
        if self.collate_fn is not None:
            return self._call(element)
        if self.ragged.modes != "error":
            raise TypeError("ragged= needs a GPUPrefetcher directly in front of the GPUCollator")
        return to_device(collate_on_host(list(element)), self._device(element))

    def _call(self, features: Sequence[Any]) -> Any:
        assert self.collate_fn is not None
        return call(self.collate_fn, "collate_fn", list(features))

    def _prefetchers(self) -> Iterator[GPUPrefetcher]:
        """The nearest ones upstream. There are several where a node mixes several sources."""
        nodes = upstream_nodes(self.source, beyond=lambda node: not isinstance(node, GPUPrefetcher))
        return (node for node in nodes if isinstance(node, GPUPrefetcher))

    def _prefetcher(self) -> GPUPrefetcher | None:
        return next(self._prefetchers(), None)

    def _device(self, features: Any) -> torch.device:
        """The device of the store upstream. Without one, that of the features."""
        prefetcher = self._prefetcher()
        if prefetcher is not None:
            return prefetcher.store.device
        return first_device(features) or torch.device("cpu")
