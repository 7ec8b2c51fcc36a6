"""The files of a PathLister: their list, their labels, and what a state knows them by."""

from collections.abc import Sequence
from typing import Any

from gpucache_pipes.files import (
    PathList,
    Paths,
    RemoteOptions,
    Samples,
    files_of,
    from_plain_data,
)
from gpucache_pipes.files.listing import GivenPaths
from gpucache_pipes.files.sample_listing import list_samples
from gpucache_pipes.nodes.labels import Labels
from gpucache_pipes.nodes.resuming import fingerprint
from gpucache_pipes.nodes.sharding import Shards
from gpucache_pipes.store.progress import progress_bar


class ListedFiles:
    """A list of files that was made once. May be pickled.

    Args:
        source: a directory, a glob, a sequence of paths, or a dict of these: see PathLister.
        pattern, recursive, labels, remote: see PathLister.

    Raises:
        Exception: what `list_samples` and `Labels.of` raise.
    """

    def __init__(
        self, source: Any, pattern: str, recursive: bool, labels: Any, remote: RemoteOptions
    ) -> None:
        with progress_bar(desc="listing", unit=" objects", delay=1) as bar:
            remote = remote._replace(progress=bar.update)
            found = list_samples(source, pattern, recursive, remote)
        self._lists = found.lists  # they know the sizes of objects
        self._given = GivenPaths(found.paths, found.parts)
        # What a state knows the list by. Files of parts that were listed have the names of those of
        # the first part.
        first = found.paths[: self.files.samples]
        self._named = found.paths if found.given else first, found.root
        self._fingerprint: int | None = None
        if labels is not None:
            self._given.label(Labels.of(labels, first, found.root, found.given))

    @property
    def files(self) -> PathList:
        """The list, as it is now: relative paths become absolute with a change of directory."""
        return self._given.files()

    def everything(self) -> Sequence[Any]:
        """All paths, or all samples."""
        files = self.files
        return Samples(files.parts, files.paths) if files.parts else files.paths

    def own(self, shards: Shards) -> list[str]:
        """The paths of which the epochs of a shard are made."""
        files = self.files
        return list(Paths(files, files_of(shards.pool(files.samples), files)))

    def numbered(self, element: Any) -> Any:
        """What the lister has yielded, of what a state holds of it."""
        return from_plain_data(element, self.files, self._given.given)

    def fingerprint(self, sizes: int) -> int:
        """By what a state recognises the list, and a checksum of the sizes of its files."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(*self._named, sizes)
        return self._fingerprint
