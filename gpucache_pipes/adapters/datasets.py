"""Map-style datasets: of features, or of their paths."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from gpucache_pipes.files import AnyFiles, OpenFeature, build, copy_value, load_error
from gpucache_pipes.files.listing import GivenPaths, find_files
from gpucache_pipes.units import counted


class _Listed:
    """A dataset over a list of paths."""

    _given: GivenPaths

    @property
    def paths(self) -> Sequence[str]:
        """All paths, as given. Relative ones become absolute when the current directory changes."""
        return self._given.now()

    @paths.setter
    def paths(self, paths: Sequence[str]) -> None:
        self._given = GivenPaths(list(paths))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({counted(len(self), 'file')})"

    def __len__(self) -> int:
        return len(self.paths)


class FeaturePathDataset(_Listed, Dataset[str]):
    """The paths of feature files, by index, for a DataLoader in a GPUCachedPathDataLoader.

        loader = DataLoader(FeaturePathDataset("features/"), batch_size=256, shuffle=True)

    Args:
        files: a directory, a glob, or a sequence of paths. A directory is listed once, here.
        pattern: which names in a directory are features.
        recursive: look into subdirectories as well.

    Attributes:
        paths: of all files; those of a directory or a glob are sorted.

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
        """The paths of a batch; DataLoader calls this once per batch."""
        return list(map(self.paths.__getitem__, indices))


# A PathLister takes sequences of paths for lists of files, and other iterables for streams.
Sequence.register(FeaturePathDataset)


class FeatureFileDataset(_Listed, Dataset[Any]):
    """The features in files, read to the CPU by `dataset[i]`: plain torch, without a cache.

        loader = DataLoader(FeatureFileDataset("features/"), batch_size=256, num_workers=4)

    Args:
        files: a directory, a glob, or a sequence of paths. A directory is listed once, here.
        loader: path -> feature. By default, files are read as a GPUFeatureStore reads them: the
            result is that of `torch.load(path, weights_only=True)`, many times as fast for small
            files.
        pattern: which names in a directory are features.
        recursive: look into subdirectories as well.

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
    """Reads features to the CPU. It can be pickled, without what it has learnt about files."""

    def __init__(self) -> None:
        self._files = AnyFiles()

    def __call__(self, path: str) -> Any:
        """The feature, each of its tensors with memory of its own.

        Raises:
            FeatureLoadError: for a file that cannot be read as a feature.
            FileNotFoundError: for a missing file.
            MemoryError: for a lack of memory.
        """
        try:
            opened = self._files.probe(path)[0]
            try:
                return _read(opened)
            finally:
                opened.close()
        except Exception as error:
            raise load_error(path, error) from error

    def __reduce__(self) -> Any:
        return FeatureFile, ()


def _read(opened: OpenFeature) -> Any:
    # One buffer per leaf: a program that keeps the label of each sample must not keep its frames
    # alive as well. Alignment gaps between leaves are read into buffers that are dropped.
    tensors: list[torch.Tensor] = []
    buffers: list[memoryview] = []
    end = 0
    for leaf in opened.layout.leaves:
        if not leaf.nbytes:
            tensors.append(torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu"))
            continue
        if leaf.offset > end:
            buffers.append(memoryview(bytearray(leaf.offset - end)))
        held = bytearray(leaf.nbytes)
        buffers.append(memoryview(held))
        tensors.append(torch.frombuffer(held, dtype=leaf.dtype).view(leaf.shape))
        end = leaf.offset + leaf.nbytes
    opened.read_into(buffers)
    values = opened.values
    return build(opened.layout.tree, tensors.__getitem__, lambda number: copy_value(values[number]))
