"""Directories that hold no symbolic links."""

import os

from gpucache_pipes.files.versions import is_racy, version_of

_MANY = 250
"""From this many files of a directory on, listing it is faster than an `islink` for each."""


class LinkFinder:
    """Lists a directory instead of looking at each of its files, and remembers the result.

    A directory that has changed since is listed again: replacing a file by a link changes the
    modification time of the directory. A directory is listed no further than four times the number
    of files that were asked about, so a few files of a large directory do not cost a long listing.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Directory] = {}

    def may_find(self, directory: str, files: int) -> bool:
        """Whether the directory may hold links; `files` more of its files are asked about."""
        try:
            status = os.stat(directory or "/")
            seen = self._seen.get(directory)
            # With the time of the last change of any kind, which no program can set.
            changed = (version_of(status), status.st_ctime_ns)
            if seen is None or seen.changed != changed or is_racy(status):
                seen = self._seen[directory] = _Directory(changed)
            if seen.links is None:
                seen.files += files
                if seen.files >= seen.enough:
                    seen.links = _has_links(directory, 4 * seen.files)
                    seen.enough = 2 * seen.files
        except (OSError, ValueError):  # ValueError: a name that no directory can have
            return True
        return seen.links is not False


class _Directory:
    """What is known of a directory. `links` is None until it has been listed to its end."""

    __slots__ = ("changed", "enough", "files", "links")

    def __init__(self, changed: tuple[bytes, int]) -> None:
        self.changed = changed
        self.files = 0
        self.enough = _MANY
        self.links: bool | None = None


def _has_links(directory: str, most: int) -> bool | None:
    """Whether there are links in the directory; None if it has more than `most` entries."""
    with os.scandir(directory or "/") as entries:
        for number, entry in enumerate(entries):
            if entry.is_symlink():
                return True
            if number > most:
                return None
    return False
