"""Which reader opens a file: chosen by the end of its name."""

import os
from collections.abc import Callable, Iterable
from itertools import groupby

from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.npy import NpyReader
from gpucache_pipes.files.packed.packed_directory import PackedPaths, find_packed, known_packed
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.planned import PlannedFeature, PlanReader
from gpucache_pipes.files.pt.fallback import by_torch_load
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.files.safetensors import SafetensorsReader
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature

FORMATS: dict[str, Callable[[], PlanReader]] = {
    ".npy": NpyReader,
    ".safetensors": SafetensorsReader,
}
"""Readers by the end of a file's name. Files of all other names are read as `.pt` files."""


def alike(kinds: Iterable[object]) -> int:
    """How many there are from the first one on until another kind comes.

    >>> alike(["a", "a", "b", "a"])
    2
    """
    return len(list(next(groupby(kinds))[1]))


class FileOpener:
    """Opens feature files by the ends of their names. For any number of threads."""

    def __init__(self, weights_only: bool, selection: Selection | None = None) -> None:
        self._weights_only = weights_only
        self._selection = selection
        self._readers = {suffix: make() for suffix, make in FORMATS.items()}
        self._suffixes = tuple(self._readers)
        self._pt = PtReader()
        self._packed = PackedPaths(selection)
        readers: dict[str, PlanReader] = {**self._readers, "": self._pt}
        for reader in readers.values():
            reader.selection = selection
        self._batch_readers = {suffix: BatchReader(reader) for suffix, reader in readers.items()}

    def open(self, path: str) -> OpenFeature:
        """The feature in a file. Raises OSError, or ValueError with the reason."""
        return self.probe(path)[0]

    def open_many(self, paths: list[str], progress: Progress) -> "list[VersionedFeature | None]":
        """See Source. The first of these files and those after it that have its format."""
        packed = known_packed(paths[0])
        if packed is not None:
            inside = packed.root + "/"
            paths = paths[: alike(path.startswith(inside) for path in paths)]
            return self._packed.open_many(packed, paths, progress)
        suffix = ""
        if any(path.endswith(self._suffixes) for path in paths):
            suffix = self._suffix(paths[0])
            paths = paths[: alike(map(self._suffix, paths))]
        return self._batch_readers[suffix].open(paths, progress)

    def open_group(self, paths: list[str]) -> PackedGroup | None:
        """See Source. Those of the packed directory of the first one."""
        packed = known_packed(paths[0])
        return None if packed is None else self._packed.open_group(packed, paths)

    def readers(self, path: str) -> tuple[PlanReader, BatchReader]:
        """What reads the bytes of a file of this name, wherever they come from."""
        suffix = self._suffix(path)
        return self._readers.get(suffix, self._pt), self._batch_readers[suffix]

    def is_pt(self, path: str) -> bool:
        """Whether `torch.load` is asked about a file of this name that no reader knows."""
        return not self._suffix(path)

    def _suffix(self, path: str) -> str:
        if not path.endswith(self._suffixes):
            return ""
        return next(suffix for suffix in self._suffixes if path.endswith(suffix))

    def open_planned(self, path: str) -> PlannedFeature:
        """The feature in a file, by its read plan. Raises OSError, or ValueError if there is none.

        That is so for what torch.load would have to read.
        """
        try:
            return self._readers.get(self._suffix(path), self._pt).open(path)
        except Unsupported as error:
            raise ValueError(
                f"{path!r} cannot be read by its bytes: {error}; if torch.load can read it, save "
                "it again"
            ) from error

    def probe(self, path: str) -> tuple[OpenFeature, str | None]:
        """The feature, and why `torch.load` read it, or None. Raises as `open` does."""
        packed = known_packed(path)
        if packed is None:
            try:
                return self._open(path)
            except (FileNotFoundError, NotADirectoryError):
                packed = find_packed(path)
                if packed is None:
                    raise
        return self._packed.open(packed, os.path.realpath(path)), None

    def _open(self, path: str) -> tuple[OpenFeature, str | None]:
        if suffix := self._suffix(path):
            reader = self._readers[suffix]
            try:
                return reader.open(path), None
            except Unsupported as error:
                raise ValueError(f"{error}; load_fn reads what this package does not") from error
        try:
            return self._pt.open(path), None
        except Unsupported as error:
            feature = by_torch_load(path, self._weights_only, self._selection)
            return feature, str(error)
