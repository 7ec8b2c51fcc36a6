"""Whether files are still there, by listings of their directories."""

import os

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.packed.packed_directory import known_packed
from gpucache_pipes.files.packed.segment import name_hashes


class Listings:
    """Lists each directory once, and remembers the names in 8 bytes each. For several threads."""

    def __init__(self) -> None:
        # Single operations on it are atomic; what two threads list at once is listed twice.
        self._listed: dict[str, npt.NDArray[np.uint64]] = {}

    def lists(self, path: str) -> bool:
        """Whether the directory of a file listed it. False if it cannot be listed."""
        if known_packed(path) is not None:
            return True
        directory, name = os.path.split(path)
        hashes = self._listed.get(directory)
        if hashes is None:
            try:
                names = os.listdir(directory)
            except (OSError, ValueError):
                names = []
            hashes = self._listed[directory] = np.sort(name_hashes(names)[:, 0])
        if not len(hashes):
            return False
        wanted = name_hashes([name])[0, 0]
        return bool(hashes[np.searchsorted(hashes, wanted) % len(hashes)] == wanted)
