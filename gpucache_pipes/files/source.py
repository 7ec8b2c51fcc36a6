"""What the store asks of files: `Source` opens them, `OpenFeature` gives their bytes."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gpucache_pipes.files.layout import Layout, flatten


class OpenFeature(Protocol):
    """A feature whose layout is known and whose bytes can be read once.

    Attributes:
        layout: where the bytes of each leaf go.
        values: the plain values of the feature, in the order of the layout's tree.
    """

    layout: Layout
    values: tuple[Any, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes that were or will be read from storage for this feature."""

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, which together hold at least `layout.span` writable bytes.

        Called at most once, by the thread that opened the feature, with no lock held. May raise
        whatever reading raises; the contents of the buffers are then undefined.
        """

    def close(self) -> None:
        """Release what opening took. Always called, by the same thread."""


class VersionedFeature(OpenFeature, Protocol):
    """What `Source.open_many` opens. It holds nothing but memory, and need not be closed.

    Attributes:
        version: of the file, as `Source.version` gives it, looked up before its bytes were read.
    """

    @property
    def version(self) -> bytes | None:
        """See above."""


class Progress:
    """How far a source is in opening many files, for the thread that watches readers.

    Attributes:
        shared: int64 [3], which native code changes while it runs: the position of the file at
            hand, nanoseconds from the beginning of the call until it began with that file, and
            whether to stop, if not 0.
    """

    __slots__ = ("_base", "_begun", "_positions", "_within", "shared")

    def __init__(self) -> None:
        self.shared = np.zeros(3, np.int64)
        self._begun = time.monotonic_ns()
        self._base = 0
        self._positions: Sequence[int] = ()
        self._within: Sequence[int] = ()

    def restart(self, positions: Sequence[int] = ()) -> None:
        """The source begins with another call, for the files at these positions; () is all."""
        self._base = time.monotonic_ns() - self._begun
        self.begin(0, 0)
        within = self._within
        if len(within):
            positions = [within[n] for n in positions] if len(positions) else within
        self._positions = positions

    def enter(self, positions: Sequence[int]) -> None:
        """The source calls another one for the files at these positions."""
        self._within = positions
        self.restart()

    @property
    def current(self) -> int:
        """The position of the file at hand."""
        at, positions = int(self.shared[0]), self._positions
        return positions[min(at, len(positions) - 1)] if len(positions) else at

    @property
    def since(self) -> float:
        """Seconds from the beginning until it began with the file at hand."""
        return (self._base + float(self.shared[1])) / 1e9

    @property
    def stopped(self) -> bool:
        """Whether the call should return after the file at hand."""
        return bool(self.shared[2])

    def begin(self, position: int, since: int) -> None:
        """The call begins with another file."""
        self.shared[1] = since  # first: see ReadTask.overdue
        self.shared[0] = position

    def stop(self) -> None:
        """Have the call return after the file at hand."""
        self.shared[2] = 1


OPTIONAL = ("open_many", "file_versions", "tell_versions", "fingerprint")
"""Members of `Source` that a source may lack."""


class Source(Protocol):
    """Where features come from. `LocalFiles` is the one for local files.

    A file has a key, which is equal for all spellings of its path, and a path: its first spelling,
    made absolute, for messages and for a `load_fn`. All methods are called by any number of
    threads, without a lock of the store. To add a source, see CONTRIBUTING.md.
    """

    def absolute(self, path: str, cwd: str) -> str:
        """A path that means the same wherever the current directory is later. Raises nothing."""

    def key(self, path: str) -> str:
        """The key of an absolute path. Raises nothing: a bad path is its own key."""

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        """Whether paths in `directory` are their own keys; False if finding out costs too much.

        See LocalFiles. A source without links says True.
        """

    def is_link(self, path: str) -> bool:
        """Whether the key of this path may change while the store lives."""

    def open(self, key: str, path: str) -> OpenFeature:
        """Open one file. Called by reader threads; what it raises is an error of this file."""

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """Open the first of these files in one go, without the interpreter lock if possible.

        Called as `open` is. The features are read before the next call of the same thread.

        Args:
            keys: of the files; not changed.
            paths: of the files.
            progress: to be kept up to date.

        Returns:
            What was opened, in order; None for what `open` has to open, since it takes other means
            or is an error. Empty if `open` has to open all of them, or if `progress` says to stop.
        """
        return []

    def version(self, key: str) -> bytes | None:
        """A value that changes when the file changes, read before `open`. None if unknown."""

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """Two numbers for each of these files that change when it does, int64 [n, 2].

        For a disk cache: unlike `version` they hold in other processes, and after the machine was
        started again; size and modification time of files. -1 if unknown, or if the file has
        changed so lately that it may change again and keep them. Called as `open` is. Fewer than
        all, if `progress` says to stop.
        """
        return np.full((len(keys), 2), -1, np.int64)

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """For a disk cache: of which of these files the features tell the version when opened.

        As an attribute `file_version`: a pair as `file_versions` has it, or None. That is not asked
        for before such files are opened, since it takes a request each.
        """
        return [False] * len(keys)

    @property
    def fingerprint(self) -> str | None:
        """For a disk cache: a text that differs for sources that make other features of a file.

        None if there is none, as of a source with a function of the user's.
        """
        return None

    def is_current(self, path: str, version: bytes | None) -> bool:
        """Whether the file is certainly unchanged since it had this version. Raises nothing."""

    def size(self, path: str) -> int:
        """Bytes in storage. Raises OSError or ValueError if that is unknown."""

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        """The sizes of about 64 of these files, those that are known. Raises nothing."""


class LoadedFeature:
    """An `OpenFeature` over a feature that is in host memory already, as a `load_fn` returns it.

    Attributes:
        version: of the file, see VersionedFeature; None if unknown.
        file_version: see Source.tell_versions.
    """

    version: bytes | None = None
    file_version: tuple[int, int] | None = None

    def __init__(self, feature: Any, bytes_read: int | None = None) -> None:
        tree, tensors, values = flatten(feature)
        self._tensors = tensors
        self.layout = Layout.of(tree, [(t.dtype, tuple(t.shape)) for t in tensors])
        self.values = tuple(values)
        self.bytes_read = self.layout.nbytes if bytes_read is None else bytes_read

    def read_into(self, buffers: Sequence[memoryview]) -> None:
        """See OpenFeature."""
        for tensor, leaf in zip(self._tensors, self.layout.leaves, strict=True):
            if leaf.nbytes:
                dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                # Not reshape: a tensor of one element is contiguous whatever its stride.
                flat = dense.as_strided((dense.numel(),), (1,))
                spread(flat.view(torch.uint8), leaf.offset, buffers)

    def close(self) -> None:
        """See OpenFeature."""
        self._tensors = []


def spread(source: torch.Tensor, offset: int, buffers: Sequence[memoryview]) -> None:
    """Copy the bytes of `source` (uint8) to `offset` of the concatenated buffers."""
    done, total = 0, source.numel()
    for buffer in buffers:
        size = len(buffer)
        if offset < size:
            count = min(size - offset, total - done)
            target = torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=offset)
            target.copy_(source[done : done + count])
            done += count
            if done == total:
                return
            offset = size
        offset -= size
