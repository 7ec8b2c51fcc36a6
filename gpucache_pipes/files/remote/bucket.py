"""Bucket: what is known of the objects of one bucket, container or host, and how they are got."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import md5
from typing import Any, NamedTuple

from gpucache_pipes.files.remote.clients import Client, Got, NoRangesError, Options, open_client
from gpucache_pipes.files.remote.errors import ERRORS, as_exception
from gpucache_pipes.files.remote.object_list import LISTS, lists_key
from gpucache_pipes.files.remote.urls import HTTP, Location, locate
from gpucache_pipes.files.remote.versions import UNKNOWN_VERSION, ObjectVersion
from gpucache_pipes.files.remote.workers import SMALL_AT_ONCE, Turns, Workers

_log = logging.getLogger("gpucache_pipes")

_PLAIN = re.compile(r"(?:\w[^/?@:]*/)*\w[^/?@:]*")

_ENOUGH = 8
"""Objects whose etags are no MD5, from which on those of the bucket are taken for none."""

WHOLE_BYTES = 1 << 20
"""Objects of up to this size are asked for whole."""


class Answer(NamedTuple):
    """What asking for an object has given.

    Attributes:
        data: its bytes; None if it is large, or there was an error.
        version: of the bytes.
        error: what was raised.
    """

    data: Any
    version: ObjectVersion
    error: Exception | None = None


class Bucket:
    """Gets objects, and compares small ones with their checksum.

    S3 and most of what speaks its protocol give the MD5 of an object as its etag, unless it was
    uploaded in parts, or is encrypted with a key of its own. The latter looks the same. So as long
    as no object has matched, one that is got twice with the same bytes is taken for such a one; and
    after some of these nothing is compared any more.

    Args:
        location: has the root.
        options: of the client library.
        verify: whether to compare with checksums.
        workers: make requests.

    Attributes:
        names_are_plain: whether URLs have the names of objects as they are.
    """

    def __init__(
        self, location: Location, options: Options, verify: bool, workers: Workers
    ) -> None:
        self._client: Client = open_client(location, options)
        self.names_are_plain = location.scheme not in HTTP
        self._lists_key = lists_key(options)
        self._sends_ranges = True
        self._verify = verify
        self._workers = workers
        self._matched = False
        self._unlike: set[str] = set()

    # What is known

    def listed(self, url: str) -> ObjectVersion | None:
        """What the latest listing says of an object, of those that listers of this process hold."""
        for objects in LISTS.of(self._lists_key):
            found = objects.find(url)
            if found is not None:
                return found
        return None

    def is_large(self, version: ObjectVersion) -> bool:
        """Whether an object is read by its ranges."""
        return version.size > WHOLE_BYTES and self.takes_ranges(version)

    def takes_ranges(self, version: ObjectVersion) -> bool:
        """Whether ranges can be got, and told to be of one version."""
        return self._sends_ranges and version.stored is not None

    # Requests

    def get(self, name: str) -> Answer:
        """An object, unless it is large. Raises as Client."""
        return self._get_checked(name, WHOLE_BYTES if self._sends_ranges else None)

    def get_whole(self, name: str) -> Answer:
        """An object of any size. Raises as Client."""
        return self._get_checked(name, None)

    def _get_checked(self, name: str, most: int | None) -> Answer:
        got = self._client.get(name, most)
        if self._is_right(got):
            return Answer(got.data, got.version)
        return self._checked(name, self._client.get(name, most), got)

    def get_many(
        self, names: Sequence[str], room: int, begin: Callable[[int, int], bool]
    ) -> dict[int, Answer]:
        """Some of these objects, several at once, with what `get` raises as their `error`.

        Args:
            names: of the objects.
            room: bytes that they may have together, but for what is under way by then.
            begin: see Turns.

        Returns:
            By position; the first ones.
        """
        most = WHOLE_BYTES if self._sends_ranges else 1 << 62
        found: dict[int, Any] = {}
        self._in_turns(
            names, range(len(names)), room, begin, partial(self._client.get_turns, most=most), found
        )
        answers: dict[int, Answer] = {}
        again: list[int] = []
        for at, held in found.items():
            try:
                got = self._client.finish(names[at], held)
                if got is not None and self._is_right(got):
                    answers[at] = Answer(got.data, got.version)
                else:
                    found[at] = got
                    again.append(at)
            except ERRORS as error:
                answers[at] = Answer(None, UNKNOWN_VERSION, error)
        if again:
            repeated: dict[int, Any] = {}
            get_again = partial(self._get_turns, most=most, before=found)
            self._in_turns(names, sorted(again), 1 << 62, begin, get_again, repeated)
            answers.update(repeated)
        return answers

    def _in_turns(
        self,
        names: Sequence[str],
        positions: Sequence[int],
        room: int,
        begin: Callable[[int, int], bool],
        get: Callable[..., None],
        found: dict[int, Any],
    ) -> None:
        """Have several threads get some of the objects."""
        turns = Turns(positions, room, begin, time.monotonic_ns)
        at_once = SMALL_AT_ONCE if self._sends_ranges else 1
        try:
            for _ in range(min(len(positions), at_once)):
                self._workers.submit(partial(get, names=names, turns=turns, found=found))
            turns.wait()
        finally:  # also for an interrupt
            turns.end()

    def _get_turns(
        self,
        names: Sequence[str],
        turns: Turns,
        found: dict[int, Any],
        most: int,
        before: dict[int, Any],
    ) -> None:
        """Get objects again whose answers broke off, or are not right."""
        while (at := turns.take()) >= 0:
            try:
                found[at] = self._checked(
                    names[at], self._client.get_again(names[at], most), before[at]
                )
            except BaseException as error:
                found[at] = Answer(None, UNKNOWN_VERSION, as_exception(error))
            finally:
                turns.done(at, 0)

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """A range of an object. If the server sends none, it is cut out of the whole object."""
        if self._sends_ranges:
            try:
                return self._client.get_range(name, start, end)
            except NoRangesError:
                self._sends_ranges = False
                _log.info("%s sends no ranges: large objects are read whole", self._client.root)
        got = self._client.get(name, None)
        return memoryview(got.data)[start:end], got.version

    def head(self, name: str) -> ObjectVersion:
        """The version of an object. Raises as Client."""
        return self._client.head(name)

    def _is_right(self, got: Got) -> bool:
        """Whether the bytes of an answer are those that its etag names, as far as that is known."""
        if not self._verify or got.md5 is None or got.data is None or len(got.data) > WHOLE_BYTES:
            return True
        right = md5(got.data, usedforsecurity=False).digest() == got.md5
        self._matched = self._matched or right
        return right

    def _checked(self, name: str, got: Got, before: Any) -> Answer:
        """The second answer for an object, after one that broke off or was not right.

        Raises OSError if it is not right either.
        """
        if self._is_right(got):
            return Answer(got.data, got.version)
        if not self._matched and isinstance(before, Got) and bytes(before.data) == bytes(got.data):
            self._unlike.add(name)
            if len(self._unlike) == _ENOUGH:
                self._verify = False
                _log.warning(
                    "the etags of %s are no MD5 (objects may be encrypted by keys of a service): "
                    "only the lengths of objects are checked", self._client.root,
                )  # fmt: skip
            return Answer(got.data, got.version)
        raise OSError(
            f"the bytes of '{self._client.root}/{name}' do not have the MD5 that is their etag, "
            "twice: they are damaged on their way or in the store. If the etags of some objects "
            "are no MD5, pass source=RemoteFiles(..., verify=False)"
        )


class Buckets:
    """The buckets of a source, made when they are first needed. For any number of threads.

    Args:
        options, verify, workers: see Bucket.
    """

    def __init__(self, options: Options, verify: bool, workers: Workers) -> None:
        self._options = options
        self._verify = verify
        self._workers = workers
        # Single operations of a dict are atomic; of two buckets that threads make, one stays.
        self._known: dict[str, Bucket] = {}

    def place(self, url: str) -> tuple[Bucket, str]:
        """The bucket of an object, and its name there. Raises as `locate` and `open_client`."""
        # Most URLs have nothing that `locate` would look at in more detail. Their root ends at the
        # first slash behind "://", which is within the first 8 characters of "s3://b..." as of
        # "gs://b..."; a URL with a shorter bucket is left to `locate`.
        root, _, name = url[8:].partition("/")
        bucket = self._known.get(url[:8] + root)
        if bucket is not None and bucket.names_are_plain and _PLAIN.fullmatch(name):
            return bucket, name
        location = locate(url)
        if not location.name or location.name.endswith("/"):
            raise ValueError(f"the URL {url!r} names no object")
        bucket = self._known.get(location.root)
        if bucket is None:
            bucket = Bucket(location, self._options, self._verify, self._workers)
            bucket = self._known.setdefault(location.root, bucket)
        return bucket, location.name
