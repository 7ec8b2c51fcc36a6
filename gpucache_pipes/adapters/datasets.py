"""Map-style datasets: the features themselves, or their paths."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from gpucache_pipes.files import FileOpener, OpenFeature, build, load_error, own
from gpucache_pipes.files.listing import GivenPaths, find_files


class _Listed:
    """What datasets over a list of paths have in common."""

    _given: GivenPaths

    @property
    def paths(self) -> Sequence[str]:
        """All of them, as they were given; relative ones become absolute after a chdir."""
        return self._given.now()

    @paths.setter
    def paths(self, paths: Sequence[str]) -> None:
        self._given = GivenPaths(paths)

    def __len__(self) -> int:
        return len(self.paths)


class FeaturePathDataset(_Listed, Dataset[str]):
    """The paths of feature files, by index: what a GPUCachedPathDataLoader wants to be fed with.

        loader = DataLoader(FeaturePathDataset("features/"), batch_size=256, shuffle=True)

    Args:
        files: a directory, a glob, or a sequence of paths. A directory is listed once, here.
        pattern: which names in a directory are features.
        recursive: look into subdirectories too.

    Attributes:
        paths: all of them; those of a directory or a glob are sorted.

    Raises:
        FileNotFoundError: no files; names directory and pattern.
    """

    def __init__(
        self,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        pattern: str = "*.pt",
        recursive: bool = False,
    ) -> None:
        self.paths = find_files(files, pattern, recursive)

    def __getitem__(self, index: int) -> str:
        return self.paths[index]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """The paths of a batch: DataLoader asks for them at once."""
        return list(map(self.paths.__getitem__, indices))


Sequence.register(FeaturePathDataset)  # of paths: PathLister takes it for a list


class FeatureFileDataset(_Listed, Dataset[Any]):
    """The features in files, read when they are asked for, on the CPU: plain torch, no cache.

        loader = DataLoader(FeatureFileDataset("features/"), batch_size=256, num_workers=4)

    Args:
        files: a directory, a glob, or a sequence of paths. A directory is listed once, here.
        loader: path -> feature. By default files are read as a GPUFeatureStore reads them: what
            comes out is what `torch.load(path, weights_only=True)` gives, many times as fast for
            small files.
        pattern: which names in a directory are features.
        recursive: look into subdirectories too.

    Attributes:
        paths: as in FeaturePathDataset.

    Raises:
        FileNotFoundError: no files; names directory and pattern.
        FeatureLoadError: in `dataset[i]`, for a file that the default loader cannot read.
    """

    def __init__(
        self,
        files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        loader: Callable[[str], Any] | None = None,
        *,
        pattern: str = "*.pt",
        recursive: bool = False,
    ) -> None:
        self.paths = find_files(files, pattern, recursive)
        self.loader = FeatureFile() if loader is None else loader

    def __getitem__(self, index: int) -> Any:
        return self.loader(self.paths[index])


class FeatureFile:
    """Reads features to the CPU. May be pickled: what it remembers of files stays behind."""

    def __init__(self) -> None:
        self._opener = FileOpener(weights_only=True)

    def __call__(self, path: str) -> Any:
        """The feature, each tensor with memory of its own. Raises FeatureLoadError."""
        try:
            opened = self._opener.open(path)
            try:
                return _read(opened)
            finally:
                opened.close()
        except Exception as error:
            raise load_error(path, error) from error

    def __reduce__(self) -> Any:
        return FeatureFile, ()


def _read(opened: OpenFeature) -> Any:
    # A buffer for each leaf, and what lies between two leaves is thrown away: who keeps the label
    # of each sample must not keep its frames alive.
    tensors: list[torch.Tensor] = []
    buffers: list[memoryview] = []
    end = 0
    for leaf in opened.layout.leaves:
        if not leaf.nbytes:
            tensors.append(torch.empty(leaf.shape, dtype=leaf.dtype))
            continue
        if leaf.offset > end:
            buffers.append(memoryview(bytearray(leaf.offset - end)))
        held = bytearray(leaf.nbytes)
        buffers.append(memoryview(held))
        tensors.append(torch.frombuffer(held, dtype=leaf.dtype).view(leaf.shape))
        end = leaf.offset + leaf.nbytes
    opened.read_into(buffers)
    values = opened.values
    return build(opened.layout.tree, tensors.__getitem__, lambda number: own(values[number]))
