"""RemoteFiles: a source of features in object storage, named by URLs."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.chunks import Chunk
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.formats import FileOpener, alike
from gpucache_pipes.files.forms import KnownForms
from gpucache_pipes.files.planned import Bytes, PlanReader
from gpucache_pipes.files.plans import ReadPlan
from gpucache_pipes.files.remote.bucket import Answer, Bucket, Buckets
from gpucache_pipes.files.remote.clients import Options
from gpucache_pipes.files.remote.errors import ERRORS, ChangedError, changed
from gpucache_pipes.files.remote.objects import MemoryFeature, RemoteBytes, RemoteFeature
from gpucache_pipes.files.remote.small_objects import SmallObjects
from gpucache_pipes.files.remote.temporary import load_from_copy
from gpucache_pipes.files.remote.versions import ObjectVersion
from gpucache_pipes.files.remote.workers import Workers
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature

_SAMPLED = 64
_MOST_SMALL = 128
"""Requests for small objects in flight."""

_MOST_LARGE = 16
"""Requests for ranges in flight, each of up to 8 MiB."""

_HEADS_AT_ONCE = 32
_TRIES = 3
"""How often an object is opened that changes meanwhile."""


class RemoteFiles:
    """A `Source` of objects in object storage: s3://, gs://, az://, https://, what fsspec knows.

    An object is asked for once: small ones whole, which tells their version as well; of large ones
    the ranges that the leaves span, several at a time. The parsers are those of local files.

    All methods may be called by any number of threads. Each makes its own requests, and waits for
    them without the interpreter lock, so as many requests are in flight as there are readers.

    Args:
        storage_options: passed unchanged to `obstore.store.from_url` for S3, Google Cloud Storage,
            Azure and HTTP, and to `fsspec.filesystem` for anything else.
        weights_only: as in `torch.load`.
        keys, dtype: what is kept of each feature: see GPUFeatureStore.
        verify: compare small objects with their MD5 where the etag is one.
    """

    def __init__(
        self,
        storage_options: Options | None = None,
        weights_only: bool = True,
        keys: Any = None,
        dtype: Any = None,
        verify: bool = True,
    ) -> None:
        self._weights_only = weights_only
        self._selection = Selection.of(keys, dtype)
        self._opener = FileOpener(weights_only, self._selection)
        self._large = Workers(_MOST_LARGE, "gpucache-range")
        self._workers = Workers(_MOST_SMALL, "gpucache-request")
        self._buckets = Buckets(dict(storage_options or {}), verify, self._workers)
        self._small = SmallObjects(self._buckets)

    def end(self) -> None:
        """Have the threads that make requests end. Later requests start new ones."""
        self._workers.end()
        self._large.end()

    # Identity

    def absolute(self, path: str, cwd: str) -> str:
        """See Source. A URL is absolute."""
        return path

    def key(self, path: str) -> str:
        """See Source. A URL is its own key."""
        return path

    def are_keys(self, directory: str, names_end: str, files: int) -> bool:
        """See Source."""
        return True

    def is_link(self, path: str) -> bool:
        """See Source."""
        return False

    # Contents

    def open(self, key: str, path: str) -> OpenFeature:
        """See Source."""
        return self.probe(key)[0]

    def probe(self, url: str) -> tuple[OpenFeature, str | None]:
        """The feature, and why `torch.load` read it, or None. Raises OSError, ValueError."""
        bucket, name = self._buckets.place(url)
        got = self._small.take(url)
        listed = bucket.listed(url)
        if got is None and listed is not None and bucket.is_large(listed):
            got = Answer(None, listed)
        for remaining in reversed(range(_TRIES)):
            try:
                return self._open(url, bucket, name, bucket.get(name) if got is None else got)
            except ChangedError:
                got = None  # what was listed or got before holds no more
                if not remaining:
                    raise
        raise AssertionError("unreachable")

    def _open(
        self, url: str, bucket: Bucket, name: str, got: Answer
    ) -> tuple[OpenFeature, str | None]:
        reader, _ = self._opener.readers(url)
        if got.error is not None:
            raise got.error
        try:
            if got.data is None and bucket.takes_ranges(got.version):
                feature = self._open_large(url, bucket, name, got.version, reader)
                if feature is not None:
                    return feature, None
                got = Answer(None, got.version)
            if got.data is None:
                got = bucket.get_whole(name)
            return self._open_small(url, got, reader), None
        except Unsupported as error:
            if not self._opener.is_pt(url):
                raise ValueError(f"{error}; load_fn reads what this package does not") from error
            reason = str(error)
        if got.data is None:
            got = bucket.get_whole(name)
        copied = load_from_copy(got.data, name, self._weights_only, self._selection, got.version)
        return copied, reason

    def _open_small(self, url: str, got: Answer, reader: PlanReader) -> OpenFeature:
        key = got.version.plan_key(url)
        plan = None if key is None else reader.remembered(key)
        if plan is None:
            plan = reader.selected(reader.plan(Bytes(bytes(got.data))))
            self._remember(reader, key, plan)
        return MemoryFeature(plan, got.data, got.version)

    def _open_large(
        self, url: str, bucket: Bucket, name: str, version: ObjectVersion, reader: PlanReader
    ) -> RemoteFeature | None:
        """Open an object by its ranges; None if the server sends none."""

        def read(start: int, end: int) -> Any:
            data, found = bucket.get_range(name, start, end)
            if not found.is_same(version):
                raise changed(url)
            return data

        key = version.plan_key(url)
        plan = None if key is None else reader.remembered(key)
        if plan is not None:
            feature = RemoteFeature(plan, version, read, self._large)
            try:
                feature.require_current()
                if bucket.takes_ranges(version):
                    return feature
            except BaseException:
                feature.close()
                raise
            feature.close()
            return None
        file = RemoteBytes(version.size, read, self._large)
        plan = reader.selected(reader.plan(file))
        self._remember(reader, key, plan)
        if not bucket.takes_ranges(version):  # as has turned out now
            return None
        return RemoteFeature(plan, version, read, self._large)

    def _remember(self, reader: PlanReader, key: bytes | None, plan: ReadPlan) -> None:
        if key is not None:
            reader.remember(key, plan)

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source. Small objects, several of which are asked for at the same time.

        What it cannot open is kept for `open`, so that nothing is asked for twice.
        """
        _, batch_reader = self._opener.readers(keys[0])
        some = keys[: alike(self._opener.readers(key)[1] for key in keys)]
        self._small.begin(keys)

        def make(native: Any, known: KnownForms, files: int) -> Chunk:
            return self._small.chunk(native, known, some[:files], progress)

        try:
            features = batch_reader.open_read(make, len(some), progress)
        except BaseException:  # an interrupt: what is here may be old when it is asked for again
            self._small.drop()
            raise
        for key, feature in zip(some, features, strict=False):
            if feature is not None:
                self._small.take(key)
        self._small.end(keys[len(features) :])
        return features

    # Versions and sizes

    def _look(self, url: str) -> ObjectVersion:
        """What is known of an object, or else what the server says. Raises OSError, ValueError."""
        bucket, name = self._buckets.place(url)
        return bucket.listed(url) or bucket.head(name)

    def version(self, key: str) -> bytes | None:
        """See Source. Asks the server, unless the object was just got."""
        got = self._small.peek(key)
        if got is not None and got.error is None and got.version.size >= 0:
            return got.version.packed
        return self._packed_now(key)

    def is_current(self, path: str, version: bytes | None) -> bool:
        """See Source. Asks the server."""
        return version is not None and self._packed_now(path) == version

    def _packed_now(self, url: str) -> bytes | None:
        try:
            bucket, name = self._buckets.place(url)
            return bucket.head(name).packed
        except ERRORS:
            return None

    @property
    def fingerprint(self) -> str | None:
        """See Source."""
        return "" if self._selection is None else self._selection.text

    def tell_versions(self, keys: Sequence[str]) -> list[bool]:
        """See Source. The answer with the bytes says of which version they are."""
        return [True] * len(keys)

    def file_versions(self, keys: Sequence[str], progress: Progress) -> npt.NDArray[np.int64]:
        """See Source. Hashes of etags, or times of modification. Asks for what was not listed."""
        found = np.full((len(keys), 2), -1, np.int64)
        begin = time.monotonic_ns()

        def look(key: str) -> tuple[int, int] | None:
            try:
                return self._look(key).stored
            except ERRORS:
                return None  # opening it says what is wrong

        for n, stored in enumerate(self._workers.each(look, keys, _HEADS_AT_ONCE) if keys else ()):
            if stored is not None:
                found[n] = stored
            if progress.stopped:
                return found[: n + 1]
            if n + 1 < len(keys):  # the earliest one that has no answer
                progress.begin(n + 1, time.monotonic_ns() - begin)
        return found

    def size(self, path: str) -> int:
        """See Source. Asks for what was not listed."""
        size = self._look(path).size
        if size < 0:
            raise ValueError(f"the server does not say how large {path!r} is")
        return size

    def sample_sizes(self, paths: Sequence[str]) -> list[int]:
        """See Source. Of those that were listed."""
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLED)]:
            try:
                listed = self._buckets.place(path)[0].listed(path)
            except ERRORS:
                continue
            if listed is not None and listed.size >= 0:
                sizes.append(listed.size)
        return sizes
