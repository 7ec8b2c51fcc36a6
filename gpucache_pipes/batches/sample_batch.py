"""A batch of samples of several files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from gpucache_pipes.batches.feature_batch import FeatureBatch
from gpucache_pipes.batches.ragged_options import RaggedOptions
from gpucache_pipes.files import Parts, joined


class SampleBatch(Sequence[Any]):
    """A sequence of samples that have a feature of every part: dicts, or tuples, of features.

    Each part was gathered by itself, as a FeatureBatch of its own. Made by `GPUFeatureStore` and
    `GPUPrefetcher` for what a PathLister over several columns of paths yields.

    Attributes:
        parts: the names of the parts; 0, 1, ... where samples are tuples.
        batches: the FeatureBatch of each part. All have one length.
    """

    def __init__(self, parts: Parts, batches: Sequence[FeatureBatch]) -> None:
        self.parts = parts
        self.batches = batches

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.batches[0].device

    @property
    def paths(self) -> list[Any]:
        """The files of each sample: as they were requested, made absolute."""
        rows = zip(*(batch.paths for batch in self.batches), strict=True)
        return [joined(self.parts, row) for row in rows]

    def __len__(self) -> int:
        return len(self.batches[0])

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return joined(self.parts, [batch[index] for batch in self.batches])

    def __iter__(self) -> Iterator[Any]:
        return (joined(self.parts, row) for row in zip(*self.batches, strict=True))

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.parts))
        return f"SampleBatch({len(self)} samples of {names} on {self.device})"

    def collate(self, ragged: RaggedOptions | str | Mapping[str, str] | None = None) -> Any:
        """The collated batch of each part, as a dict or a tuple of them.

        `ragged` as in GPUCollator. Raises as `FeatureBatch.collate`.
        """
        options = RaggedOptions.of("error" if ragged is None else ragged)
        collate = [batch.collate for batch in self.batches]
        return collate_parts(self.parts, collate, options.drawn(len(self)))


def collate_parts(
    parts: Parts, collate: Sequence[Callable[[RaggedOptions], Any]], options: RaggedOptions
) -> Any:
    """What each function makes of the options for its part, as a dict or a tuple.

    Raises what they raise; messages name the part.
    """
    made = []
    for name, function in zip(parts, collate, strict=True):
        try:
            made.append(function(options.of_part(name, parts)))
        except (RuntimeError, TypeError) as error:
            if type(error) not in (RuntimeError, TypeError):  # such as a failure of the device
                raise
            raise type(error)(f"part {name!r} of samples: {error}") from error
    return joined(parts, made)
