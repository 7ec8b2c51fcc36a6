"""RemoteFiles: a source of features in object storage, named by URLs."""

import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.chunks import LEFT_TO_PYTHON, SIZE, START, STATUS, UNKNOWN, Chunk
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.formats import FileOpener
from gpucache_pipes.files.forms import KnownForms
from gpucache_pipes.files.planned import Bytes, PlanReader
from gpucache_pipes.files.plans import ReadPlan
from gpucache_pipes.files.remote.bucket import WHOLE_BYTES, Answer, Bucket
from gpucache_pipes.files.remote.clients import Options
from gpucache_pipes.files.remote.objects import (
    ChangedError,
    MemoryFeature,
    RemoteBytes,
    RemoteFeature,
)
from gpucache_pipes.files.remote.temporary import load_from_copy
from gpucache_pipes.files.remote.urls import locate
from gpucache_pipes.files.remote.versions import UNKNOWN_VERSION, ObjectVersion
from gpucache_pipes.files.remote.workers import Workers
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import OpenFeature, Progress, VersionedFeature

_ALIGNMENT = 64
_PLAIN = re.compile(r"(?:[\w][^/?@:]*/)*[\w][^/?@:]*")
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
        self._options = dict(storage_options or {})
        self._weights_only = weights_only
        self._selection = Selection.of(keys, dtype)
        self._opener = FileOpener(weights_only, self._selection)
        self._verify = verify
        # Single operations of a dict are atomic; of two buckets that threads make, one stays.
        self._buckets: dict[str, Bucket] = {}
        self._workers = Workers(_MOST_SMALL, "gpucache-request")
        self._large = Workers(_MOST_LARGE, "gpucache-range")
        # What this thread has got and not yet opened, by key.
        self._got = threading.local()

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
        got = self._answers().pop(url, None)
        for remaining in reversed(range(_TRIES)):
            try:
                return self._open(url, got)
            except ChangedError:
                got = None
                if not remaining:
                    raise
        raise AssertionError("unreachable")

    def _open(self, url: str, got: Answer | None) -> tuple[OpenFeature, str | None]:
        bucket, name = self._place(url)
        reader, _ = self._opener.readers(url)
        listed = bucket.listed(url)
        if got is None and listed is not None and bucket.is_large(listed):
            got = Answer(None, listed)
        if got is None:
            got = bucket.get(name)
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
        version = got.version.packed
        plan = None if version is None else reader.remembered(version)
        if plan is None:
            plan = reader.selected(reader.plan(Bytes(bytes(got.data))))
            self._remember(reader, version, plan)
        return MemoryFeature(plan, got.data, got.version)

    def _open_large(
        self, url: str, bucket: Bucket, name: str, version: ObjectVersion, reader: PlanReader
    ) -> RemoteFeature | None:
        """Open an object by its ranges; None if the server sends none."""

        def read(start: int, end: int) -> tuple[Any, ObjectVersion]:
            return bucket.get_range(name, start, end)

        packed = version.packed
        plan = None if packed is None else reader.remembered(packed)
        if plan is not None:
            feature = RemoteFeature(url, plan, version, read, self._large)
            try:
                feature.require_current()
                if bucket.takes_ranges(version):
                    return feature
            except BaseException:
                feature.close()
                raise
            feature.close()
            return None
        file = RemoteBytes(url, version, read, self._large)
        plan = reader.selected(reader.plan(file))
        self._remember(reader, packed, plan)
        if not bucket.takes_ranges(version):  # as has turned out now
            return None
        return RemoteFeature(url, plan, version, read, self._large)

    def _remember(self, reader: PlanReader, version: bytes | None, plan: ReadPlan) -> None:
        if version is not None:
            reader.remember(version, plan)

    def open_many(
        self, keys: list[str], paths: Sequence[str], progress: Progress
    ) -> "list[VersionedFeature | None]":
        """See Source. Small objects, whose bytes are asked for one after the other.

        What it cannot open is kept for `open`, so that nothing is asked for twice.
        """
        _, batch_reader = self._opener.readers(keys[0])
        others = (
            n for n, key in enumerate(keys) if self._opener.readers(key)[1] is not batch_reader
        )
        keys = keys[: next(others, len(keys))]
        answers = self._answers()
        for key in answers.keys() - set(keys):  # of an earlier task
            answers.pop(key, None)
        chunks: list[_ObjectChunk] = []

        def make(native: Any, known: KnownForms, files: int) -> Chunk:
            chunk = _ObjectChunk(native, known, files)
            chunks.append(chunk)
            self._fill(chunk, keys[:files], answers, progress)
            return chunk

        features = batch_reader.open_read(make, len(keys), progress)
        for n, feature in enumerate(features):
            if feature is None and keys[n] not in answers:
                data = bytes(chunks[0].data(n))
                answers[keys[n]] = Answer(data, chunks[0].versions[n])
        return features

    def _fill(
        self, chunk: "_ObjectChunk", keys: list[str], answers: dict[str, Answer], progress: Progress
    ) -> None:
        """Get objects into scratch memory, until that is full or `progress` says to stop."""
        memory = chunk.memory.data
        used, sizes = 0, []
        full = False
        for n, got in enumerate(self._get_many(keys, answers, len(memory), progress)):
            size = 0 if got.data is None or len(got.data) > WHOLE_BYTES else len(got.data)
            full = full or size > len(memory) - used
            if not size or full:
                answers[keys[n]] = got
                if full:
                    continue  # it is there for the next call
            chunk.starts.append(used)
            chunk.versions.append(got.version)
            sizes.append(size)
            if size:
                memory[used : used + size] = memoryview(got.data)
                used += -(-size // _ALIGNMENT) * _ALIGNMENT
        rows = chunk.rows[: len(sizes)]
        rows[:, START], rows[:, SIZE] = chunk.starts, sizes
        rows[:, STATUS] = np.where(rows[:, SIZE] > 0, UNKNOWN, LEFT_TO_PYTHON)

    def _get_many(
        self, keys: Sequence[str], answers: dict[str, Answer], room: int, progress: Progress
    ) -> list[Answer]:
        """Get the first of these objects, but those that are large, or were got before.

        A large one in memory, since its server sends no ranges, is the last one.
        """
        found: dict[int, Answer] = {}
        asked: list[int] = []
        names: list[str] = []
        first: Bucket | None = None
        for n, key in enumerate(keys):
            got = answers.pop(key, None)
            if got is None:
                try:
                    bucket, name = self._place(key)
                except (OSError, ValueError, ImportError) as error:
                    found[n] = Answer(None, UNKNOWN_VERSION, error)
                    continue
                listed = bucket.listed(key)
                if listed is None or not bucket.is_large(listed):
                    if first not in (None, bucket):
                        break
                    first = bucket
                    asked.append(n)
                    names.append(name)
                    continue
                got = Answer(None, listed)
            found[n] = got
        if first is not None:
            begin = time.monotonic_ns()

            def begins(at: int, moment: int) -> bool:
                progress.begin(asked[at], moment - begin)
                return not progress.stopped

            got_many = first.get_many(names, room - _ALIGNMENT * len(asked), begins)
            found.update((asked[at], answer) for at, answer in got_many.items())
        result = []
        for n in range(len(keys)):
            if n not in found:
                break
            result.append(found[n])
        for n, key in enumerate(keys[len(result) :], len(result)):
            if n in found:
                answers[key] = found[n]  # for the next call
        return result

    def _answers(self) -> dict[str, Answer]:
        answers: dict[str, Answer] = self._got.__dict__.setdefault("answers", {})
        return answers

    def _place(self, url: str) -> tuple[Bucket, str]:
        # Most URLs have nothing that `locate` would look at in more detail.
        root, _, name = url[8:].partition("/")
        root = url[:8] + root
        bucket = self._buckets.get(root)
        if bucket is not None and bucket.names_are_plain and _PLAIN.fullmatch(name):
            return bucket, name
        location = locate(url)
        bucket = self._buckets.get(location.root)
        if bucket is None:
            bucket = Bucket(location, self._options, self._verify, self._workers)
            bucket = self._buckets.setdefault(location.root, bucket)
        return bucket, location.name

    # Versions and sizes

    def _look(self, url: str) -> ObjectVersion:
        """What is known of an object, or else what the server says. Raises OSError, ValueError."""
        bucket, name = self._place(url)
        return bucket.listed(url) or bucket.head(name)

    def version(self, key: str) -> bytes | None:
        """See Source. Asks the server, unless the object was just got."""
        got = self._answers().get(key)
        if got is not None and got.error is None and got.version.size >= 0:
            return got.version.packed
        return self._packed_now(key)

    def is_current(self, path: str, version: bytes | None) -> bool:
        """See Source. Asks the server."""
        return version is not None and self._packed_now(path) == version

    def _packed_now(self, url: str) -> bytes | None:
        try:
            bucket, name = self._place(url)
            return bucket.head(name).packed
        except (OSError, ValueError, ImportError, RuntimeError):
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
            except (OSError, ValueError, ImportError, RuntimeError):
                return None  # opening it says what is wrong

        for n, stored in enumerate(self._workers.each(look, keys, _HEADS_AT_ONCE) if keys else ()):
            progress.begin(n, time.monotonic_ns() - begin)
            if stored is not None:
                found[n] = stored
            if progress.stopped:
                return found[: n + 1]
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
                listed = self._place(path)[0].listed(path)
            except (OSError, ValueError, ImportError, RuntimeError):
                continue
            if listed is not None and listed.size >= 0:
                sizes.append(listed.size)
        return sizes


class _ObjectChunk(Chunk):
    """Objects in scratch memory."""

    def __init__(self, native: Any, known: KnownForms, files: int) -> None:
        super().__init__(native, known, files)
        self.versions: list[ObjectVersion] = []

    def version(self, number: int) -> bytes | None:
        """See Scratch."""
        return self.versions[number].packed

    def file_version(self, number: int) -> tuple[int, int] | None:
        """See Scratch."""
        return self.versions[number].stored
