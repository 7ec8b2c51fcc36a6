"""ObjectList: what a listing has found, and the lists of this process that are in use."""

import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.remote.clients import Options
from gpucache_pipes.files.remote.versions import ObjectVersion


class ObjectList(list[str]):
    """The URLs of the objects that a listing has found, sorted. It does not change.

    A list, so that the files of a PathLister take no memory twice.

    Args:
        urls: sorted.
        below: what all of them begin with.
        versions: see below.

    Attributes:
        below: see above.
        versions: int64 [n, 3]: see ObjectVersion.
    """

    __slots__ = ("__weakref__", "below", "versions")

    def __init__(self, urls: Iterable[str], below: str, versions: npt.NDArray[np.int64]) -> None:
        super().__init__(urls)
        self.below = below
        self.versions = versions

    def find(self, url: str) -> ObjectVersion | None:
        """What the listing says of an object; None if it has not listed it."""
        if not url.startswith(self.below):
            return None
        at = bisect_left(self, url)
        if at == len(self) or self[at] != url:
            return None
        return ObjectVersion(*self.versions[at].tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectList, (list(self), self.below, self.versions)


class _Lists:
    """The lists that are in use in this process, so that stores know what listers have found.

    By the options of the client: two stores of objects may have buckets of one name.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced as a whole, so that readers take no lock.
        self._held: dict[bytes, tuple[weakref.ref[ObjectList], ...]] = {}

    def add(self, objects: ObjectList, options: Options) -> None:
        key = lists_key(options)
        with self._lock:
            alive = [held for held in self._held.get(key, ()) if held() is not None]
            self._held[key] = (weakref.ref(objects), *alive)  # the latest one first

    def of(self, key: bytes) -> Iterator[ObjectList]:
        """Those that were added with options of this key, the latest one first."""
        for held in self._held.get(key, ()):
            objects = held()
            if objects is not None:
                yield objects


def lists_key(options: Options) -> bytes:
    """A hash, so that credentials are not kept."""
    text = repr(sorted((name, repr(value)) for name, value in options.items()))
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()


LISTS = _Lists()
