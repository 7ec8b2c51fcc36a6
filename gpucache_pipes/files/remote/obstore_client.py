"""Requests by obstore: S3 and what speaks its protocol, Google Cloud Storage, Azure, HTTP."""

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from gpucache_pipes.files.remote.clients import (
    ATTEMPTS,
    RETRY_SECONDS,
    Found,
    Got,
    Options,
    Retries,
)
from gpucache_pipes.files.remote.errors import ForkedError, forked, translate
from gpucache_pipes.files.remote.urls import HTTP, Location, redacted
from gpucache_pipes.files.remote.versions import ObjectVersion, md5_of
from gpucache_pipes.files.remote.workers import Turns

_END = object()


class ObstoreClient:
    """A `Client` by obstore, which releases the interpreter lock while it waits.

    obstore itself retries requests that have no answer yet, or one that says that the server is
    busy. Answers that break off are asked for again here.

    Args:
        location: has the root.
        options: arguments of `obstore.store.from_url`.

    Attributes:
        root: see Client.
    """

    def __init__(self, location: Location, options: Options) -> None:
        try:
            import obstore
            from obstore.store import HTTPStore, from_url
        except ImportError:
            raise ImportError(
                f"{location.root!r} needs obstore: pip install 'gpucache-pipes[remote]'"
            ) from None
        _require_process(location.root, location.name)
        if not _first_process:
            _first_process.append(os.getpid())
        self.root = location.root
        self._is_http = location.scheme in HTTP
        self._obstore = obstore
        given = dict(options)
        endpoint = given.get("endpoint")
        if isinstance(endpoint, str) and "://" not in endpoint:
            raise ValueError(
                "storage_options: the endpoint needs a scheme, such as https:// in front of "
                f"{redacted('s3://' + endpoint).removeprefix('s3://')!r}"
            )
        retrying = _retry_config(given.pop("retry_config", None))
        self._retries = Retries(
            retrying["retry_timeout"].total_seconds(), retrying["max_retries"] + 1
        )
        make: Any = HTTPStore.from_url if self._is_http else from_url
        failure = None
        try:
            self._store: Any = make(location.root, retry_config=retrying, **given)
        except Exception as error:
            failure = translate(error, location.root).error
        if failure is not None:
            raise failure

    def get(self, name: str, most: int | None) -> Got:
        """See Client."""
        return self._get(name, most, 0)

    def get_again(self, name: str, most: int | None) -> Got:
        """See Client."""
        return self._get(name, most, 1)

    def _get(self, name: str, most: int | None, before: int) -> Got:
        def request() -> tuple[Any, Any]:
            answer = self._obstore.get(self._store, name)
            meta = answer.meta
            if most is not None and meta["size"] > most:
                return meta, None
            data = answer.bytes()
            if len(data) != meta["size"]:
                raise ConnectionError("the answer is shorter or longer than it says")
            return meta, data

        return self._got(*self._call(request, name, before))

    def get_turns(
        self, names: Sequence[str], turns: Turns, found: dict[int, Any], most: int
    ) -> None:
        """See Client.

        What Python has to do with answers is done later, for many at once: between two waits for
        the network it takes three times as long, since the processor has forgotten it meanwhile.
        """
        get, store = self._obstore.get, self._store
        while (at := turns.take()) >= 0:
            nbytes = 0
            try:
                _require_process(self.root, names[at])
                answer = get(store, names[at])
                meta = answer.meta
                data = answer.bytes() if meta["size"] <= most else None
                nbytes = 0 if data is None else len(data)
                found[at] = meta, data
            except BaseException as error:
                found[at] = error
            finally:
                turns.done(at, nbytes)

    def finish(self, name: str, held: Any) -> Got | None:
        """See Client."""
        if isinstance(held, ForkedError):
            raise held
        if isinstance(held, BaseException):
            self._retries.require_again(held, self.root, name)
            return None
        meta, data = held
        return self._got(meta, data) if data is None or len(data) == meta["size"] else None

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """See Client."""

        def request() -> tuple[Any, ObjectVersion]:
            answer = self._obstore.get(self._store, name, options={"range": (start, end)})
            data, version = answer.bytes(), self._version(answer.meta)
            if len(data) != end - start and version.size >= end:
                raise ConnectionError("the answer is shorter or longer than was asked for")
            return data, version

        got: tuple[Any, ObjectVersion] = self._call(request, name)
        return got

    def head(self, name: str) -> ObjectVersion:
        """See Client."""
        version: ObjectVersion = self._call(
            lambda: self._version(self._obstore.head(self._store, name)), name
        )
        return version

    def list(self, prefix: str) -> Iterator[Found]:
        """See Client."""
        pages = self._call(lambda: self._obstore.list(self._store, prefix or None), prefix)
        while True:
            page: Any = self._call(lambda: next(pages, _END), prefix)
            if page is _END:
                return
            yield [(meta["path"], self._version(meta)) for meta in page]

    def list_directly(self, prefix: str) -> Found:
        """See Client."""
        found: Any = self._call(
            lambda: self._obstore.list_with_delimiter(self._store, prefix or None), prefix
        )
        return [(meta["path"], self._version(meta)) for meta in found["objects"]]

    def _call(self, request: Any, name: str, before: int = 0) -> Any:
        _require_process(self.root, name)
        return self._retries.call(request, self.root, name, before)

    def _got(self, meta: Any, data: Any) -> Got:
        return Got(data, self._version(meta), None if data is None else md5_of(meta["e_tag"]))

    def _version(self, meta: Any) -> ObjectVersion:
        modified, etag = meta["last_modified"], meta["e_tag"]
        if self._is_http and modified is not None and modified.timestamp() > 0:
            etag = None  # servers of files make it of the size and of whole seconds
        return ObjectVersion.of(
            meta["size"], etag, None if modified is None else modified.timestamp()
        )


def _require_process(root: str, name: str) -> None:
    """Raise ForkedError in a process that was forked from the one that has used obstore first.

    obstore would panic, or wait for ever.
    """
    if _first_process and os.getpid() != _first_process[0]:
        raise forked(f"{root}/{name}")


def _retry_config(given: Any) -> dict[str, Any]:
    """The retry_config of storage_options, with what it does not say."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError("storage_options: retry_config must be a dict, as in obstore")
    config = {
        "max_retries": ATTEMPTS - 1,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        **(given or {}),
    }
    if not isinstance(config["max_retries"], int) or config["max_retries"] < 0:
        raise ValueError("storage_options: max_retries of retry_config must be a whole number")
    if not isinstance(config["retry_timeout"], timedelta):
        raise ValueError("storage_options: retry_timeout of retry_config must be a timedelta")
    return config


_first_process: list[int] = []
"""The process that has used obstore first in this program, once there is one."""
