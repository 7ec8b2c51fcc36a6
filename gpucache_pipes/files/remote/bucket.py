"""Bucket: what is known of the objects of one bucket, container or host, and how they are got."""

import logging
import operator
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import md5
from typing import Any, NamedTuple

from gpucache_pipes.files.remote.clients import Client, Got, NoRangesError, Options, open_client
from gpucache_pipes.files.remote.object_list import LISTS, ObjectList
from gpucache_pipes.files.remote.urls import HTTP, Location, locate
from gpucache_pipes.files.remote.versions import UNKNOWN_VERSION, ObjectVersion
from gpucache_pipes.files.remote.workers import SMALL_AT_ONCE, Turns, Workers

_log = logging.getLogger("gpucache_pipes")

_PLAIN = re.compile(r"(?:\w[^/?@:]*/)*\w[^/?@:]*")

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
    uploaded in parts, or is encrypted with a key of its own. The latter looks the same. So etags
    are taken for no MD5 if the first object that does not match is got twice with the same bytes,
    and none has matched before.

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
        self._options = options
        self._lists: Sequence[ObjectList] = ()
        self._sends_ranges = True
        self._verify = verify
        self._workers = workers
        self._matched = False

    # What is known

    def listed(self, url: str) -> ObjectVersion | None:
        """What a listing of this process says of an object, the latest one if there are several."""
        for objects in self._lists:
            found = objects.find(url)
            if found is not None:
                return found
        lists = LISTS.of(self._options)
        if len(lists) == len(self._lists) and all(map(operator.is_, lists, self._lists)):
            return None
        self._lists = lists  # they are kept from now on
        for objects in lists:
            found = objects.find(url)
            if found is not None:
                return found
        return None

    def is_large(self, version: ObjectVersion) -> bool:
        """Whether an object is read by its ranges."""
        return version.size > WHOLE_BYTES and self.takes_ranges(version)

    def takes_ranges(self, version: ObjectVersion) -> bool:
        """Whether ranges can be got, and told to be of one version."""
        return self._sends_ranges and (version.etag >= 0 or version.modified >= 0)

    # Requests

    def get(self, name: str) -> Answer:
        """An object, unless it is large. Raises as Client."""
        return self._checked(
            name, self._client.get(name, WHOLE_BYTES if self._sends_ranges else None)
        )

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
        at_once = SMALL_AT_ONCE if self._sends_ranges else 1
        turns = Turns(len(names), room, begin, time.monotonic_ns)
        found: list[Any] = [None] * len(names)
        for _ in range(min(len(names), at_once)):
            self._workers.submit(partial(self._client.get_turns, names, most, turns, found))
        turns.wait()
        answers = {}
        for at, held in enumerate(found):
            if held is None:
                continue
            try:
                answers[at] = self._checked(names[at], self._client.finish(names[at], most, held))
            except (OSError, ValueError, RuntimeError) as error:
                answers[at] = Answer(None, UNKNOWN_VERSION, error)
        return answers

    def get_whole(self, name: str) -> Answer:
        """An object of any size. Raises as Client."""
        return self._checked(name, self._client.get(name, None))

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

    def _checked(self, name: str, got: Got) -> Answer:
        if not self._verify or not _can_check(got):
            return Answer(got.data, got.version)
        digest = _digest(got)
        if digest == got.md5:
            self._matched = True
            return Answer(got.data, got.version)
        again = self._client.get(name, None)
        same = _digest(again) == digest
        if not _can_check(again) or _digest(again) == again.md5:
            return Answer(again.data, again.version)
        if same and not self._matched:
            self._verify = False
            _log.info(
                "the etags of %s are no MD5 (objects may be encrypted by keys of a service): only "
                "the lengths of objects are checked", self._client.root,
            )  # fmt: skip
            return Answer(again.data, again.version)
        raise OSError(
            f"the bytes of '{self._client.root}/{name}' do not have the MD5 that is their etag, "
            "twice: they are damaged on their way or in the store. If the etags of some objects "
            "are no MD5, pass source=RemoteFiles(..., verify=False)"
        )


def _can_check(got: Got) -> bool:
    return got.md5 is not None and got.data is not None and len(got.data) <= WHOLE_BYTES


def _digest(got: Got) -> bytes:
    return md5(got.data, usedforsecurity=False).digest()


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
        # Most URLs have nothing that `locate` would look at in more detail.
        root, _, name = url[8:].partition("/")
        bucket = self._known.get(url[:8] + root)
        if bucket is not None and bucket.names_are_plain and _PLAIN.fullmatch(name):
            return bucket, name
        location = locate(url)
        if not location.name:
            raise ValueError(f"the URL {url!r} names no object")
        bucket = self._known.get(location.root)
        if bucket is None:
            bucket = Bucket(location, self._options, self._verify, self._workers)
            bucket = self._known.setdefault(location.root, bucket)
        return bucket, location.name
