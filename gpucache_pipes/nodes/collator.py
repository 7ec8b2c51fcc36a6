"""GPUCollator: features in, tensors [B, ...] out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import default_collate
from torchdata.nodes import BaseNode

from gpucache_pipes.batches import FeatureBatch, first_device, to_device
from gpucache_pipes.nodes.callbacks import call
from gpucache_pipes.nodes.consumer import ConsumerStream
from gpucache_pipes.nodes.options import CollateOptions
from gpucache_pipes.nodes.prefetcher import GPUPrefetcher
from gpucache_pipes.nodes.upstream import as_node, upstream_nodes


class GPUCollator(BaseNode[Any]):
    """Makes a batch of each FeatureBatch, or of every `batch_size` features.

    Without collate_fn the batch is what `torch.utils.data.default_collate` gives, on the
    device: tensors [B, *shape], contiguous; numbers become device tensors [B]; strings stay
    lists. In a tuple (FeatureBatch, element), as a GPUPrefetcher with path_fn gives it, the
    FeatureBatch is collated and the rest left as it is.

    Args:
        source: a node or iterable of FeatureBatches, of sequences of features, or, with
            batch_size, of single features.
        collate_fn: list of features -> batch.
        batch_size: collate so many single features. Behind a GPUPrefetcher they are still
            gathered at once.
        drop_last: leave out a last batch that is smaller than batch_size.
        ragged: how to join tensors whose first dimension may differ from feature to feature:
            "error", to raise; "pad", a Padded of values [B, T, ...], lengths and mask; "jagged",
            a torch.nested tensor; "list", a list of tensors. One mode is for every leaf of at
            least one dimension, in every batch, even where all lengths are equal. A dict of modes
            is for the leaves that it names: as errors name them, or by the keys of a feature that
            is a dict; other leaves are stacked. Needs a GPUPrefetcher right in front.
        padding_value: what is put behind shorter sequences.
        pad_to_multiple: round the length of a padded batch up to a multiple of this.

    Raises:
        RuntimeError: in `next()`, if shapes differ; names the leaf, the shapes and the files.
        ValueError: a mode that is not known, or ragged together with a collate_fn.
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
    ) -> None:
        super().__init__()
        options = CollateOptions(
            collate_fn, batch_size, drop_last, ragged, padding_value, pad_to_multiple
        )
        self.ragged = options.ragged_options()
        self.source = as_node(source)
        self.collate_fn = collate_fn
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._stream: Callable[[], AbstractContextManager[Any]] = nullcontext

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """See BaseNode."""
        super().reset(initial_state)
        prefetcher = self._prefetcher()
        self._stream = nullcontext if prefetcher is None else ConsumerStream(prefetcher.store)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """See BaseNode."""
        return {"source": self.source.state_dict()}

    def next(self) -> Any:
        """See BaseNode."""
        with self._stream():
            if self.batch_size is None:
                source = self.source
                if self.ragged.modes == "error" or not isinstance(source, GPUPrefetcher):
                    return self._collate(next(source))
                at_once = source.path_fn is None
                return source.next_collated(self.ragged) if at_once else self._collate(next(source))
            features = self._take(self.batch_size)
            if not features or (self.drop_last and len(features) < self.batch_size):
                raise StopIteration
            return self._collate(features)

    def _take(self, count: int) -> Sequence[Any]:
        source = self.source
        if isinstance(source, GPUPrefetcher):
            return source.take(count)
        features: list[Any] = []
        for feature in source:
            if isinstance(feature, FeatureBatch):
                raise TypeError("the source yields batches already: omit batch_size")
            features.append(feature)
            if len(features) == count:
                break
        return features

    def _collate(self, element: Any) -> Any:
        if isinstance(element, FeatureBatch):
            return element.collate(self.ragged) if self.collate_fn is None else self._call(element)
        if isinstance(element, tuple) and any(isinstance(part, FeatureBatch) for part in element):
            return tuple(
                self._collate(part) if isinstance(part, FeatureBatch) else part for part in element
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
            raise TypeError("ragged= needs a GPUPrefetcher right in front of the GPUCollator")
        return to_device(default_collate(list(element)), self._device(element))

    def _call(self, features: Sequence[Any]) -> Any:
        assert self.collate_fn is not None
        return call(self.collate_fn, "collate_fn", list(features))

    def shutdown(self) -> None:
        """Let the nodes in front let go of what is on its way, if they can."""
        for prefetcher in self._prefetchers():
            prefetcher.shutdown()

    def _prefetchers(self) -> Iterator[GPUPrefetcher]:
        """The nearest ones upstream. There are several where a node mixes several sources."""
        nodes = upstream_nodes(self.source, beyond=lambda node: not isinstance(node, GPUPrefetcher))
        return (node for node in nodes if isinstance(node, GPUPrefetcher))

    def _prefetcher(self) -> GPUPrefetcher | None:
        return next(self._prefetchers(), None)

    def _device(self, features: Any) -> torch.device:
        """Where the store upstream keeps features; if there is none, where these are."""
        prefetcher = self._prefetcher()
        if prefetcher is not None:
            return prefetcher.store.device
        return first_device(features) or torch.device("cpu")
