"""What a process has said that it writes, so that no other one does."""

import contextlib
import os

import numpy as np
import numpy.typing as npt

_LATEST = 1 << 16


class Claims:
    """What another process has claimed: 8 bytes of host memory each."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._latest: set[int] = set()

    def read(self, path: str) -> None:
        """Add what has come to its file."""
        known = len(self._sorted) + len(self._latest)
        with contextlib.suppress(FileNotFoundError):
            self._latest.update(np.fromfile(path, "<u8", offset=8 * known).tolist())
        if len(self._latest) > _LATEST:
            self._sorted = np.sort(np.append(self._sorted, np.array([*self._latest], np.uint64)))
            self._latest.clear()

    def have(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of these are claimed."""
        claimed = np.array([number in self._latest for number in hashes.tolist()], np.bool_)
        if len(self._sorted):
            at = np.searchsorted(self._sorted, hashes) % len(self._sorted)
            claimed |= self._sorted[at] == hashes
        return claimed


def write_claims(fd: int, hashes: npt.NDArray[np.uint64]) -> None:
    """Add to a file of claims. Raises OSError."""
    data = memoryview(hashes.astype("<u8").tobytes())
    while data:
        data = data[os.write(fd, data) :]
