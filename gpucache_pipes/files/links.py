"""Which directories have no symbolic links among their files."""

import os

from gpucache_pipes.files.versions import is_racy, version_of

_MANY = 250
"""Files of a directory, from which on it is faster to list it than to look at each of them."""


class LinkFinder:
    """Lists a directory instead of looking at each of its files, and remembers what it found.

    A directory that has changed since is listed anew: a file that becomes a link changes the
    modification time of its directory. How far it is listed is in proportion to the number of
    files that were asked for, so that a few files of a large directory do not cost a long list.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def may_find(self, directory: str, files: int) -> bool:
        """Whether there may be links in a directory; of it, so many more files are asked for."""
        try:
            status = os.stat(directory or "/")
            seen = self._seen.get(directory)
            # The time of the last change of any kind is nobody's to set.
            changed = (version_of(status), status.st_ctime_ns)
            if seen is None or seen.changed != changed or is_racy(status):
                seen = self._seen[directory] = _Seen(changed)
            if seen.links is None:
                seen.files += files
                if seen.files >= seen.enough:
                    seen.links = _find(directory, 4 * seen.files)
                    seen.enough = 2 * seen.files
        except (OSError, ValueError):  # ValueError: no name that the system could have
            return True
        return seen.links is not False


class _Seen:
    """What is known of a directory. `links` is None until it has been listed to its end."""

    __slots__ = ("changed", "enough", "files", "links")

    def __init__(self, changed: tuple[bytes, int]) -> None:
        self.changed = changed
        self.files = 0
        self.enough = _MANY
        self.links: bool | None = None


def _find(directory: str, most: int) -> bool | None:
    """Whether there are links in a directory; None if it has more entries than one may look at."""
    with os.scandir(directory or "/") as entries:
        for number, entry in enumerate(entries):
            if entry.is_symlink():
                return True
            if number > most:
                return None
    return False
