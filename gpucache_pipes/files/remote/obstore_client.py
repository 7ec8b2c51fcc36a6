"""Requests by obstore: S3 and what speaks its protocol, Google Cloud Storage, Azure, HTTP."""

import os
from collections.abc import Iterator, Sequence
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
from gpucache_pipes.files.remote.errors import forked, translate
from gpucache_pipes.files.remote.urls import HTTP, Location
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
        self.root = location.root
        self._obstore = obstore
        self._process = os.getpid()
        given = dict(options)
        retrying = {
            "max_retries": ATTEMPTS - 1,
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            **(given.pop("retry_config", None) or {}),
        }
        seconds = retrying["retry_timeout"]
        self._retries = Retries(
            seconds.total_seconds() if isinstance(seconds, timedelta) else RETRY_SECONDS,
            retrying["max_retries"] + 1,
        )
        make: Any = HTTPStore.from_url if location.scheme in HTTP else from_url
        failure = None
        try:
            self._store: Any = make(location.root, retry_config=retrying, **given)
        except Exception as error:
            failure = translate(error, location.root).error
        if failure is not None:
            raise failure

    def get(self, name: str, most: int | None) -> Got:
        """See Client."""

        def request() -> tuple[Any, Any]:
            answer = self._obstore.get(self._store, name)
            meta = answer.meta
            if most is not None and meta["size"] > most:
                return meta, None
            return meta, _complete(meta, answer.bytes())

        return _got(*self._call(request, name))

    def get_turns(self, names: Sequence[str], most: int, turns: Turns, found: list[Any]) -> None:
        """See Client.

        What Python has to do with answers is done later, for many at once: between two waits for
        the network it takes three times as long, since the processor has forgotten it meanwhile.
        """
        get, store = self._obstore.get, self._store
        while (at := turns.take()) >= 0:
            nbytes = 0
            try:
                answer = get(store, names[at])
                meta = answer.meta
                data = answer.bytes() if meta["size"] <= most else None
                nbytes = 0 if data is None else len(data)
                found[at] = meta, data
            except BaseException as error:
                found[at] = error
            finally:
                turns.done(at, nbytes)

    def finish(self, name: str, most: int, held: Any) -> Got:
        """See Client."""
        if isinstance(held, BaseException):
            self._retries.require_again(held, self.root, name)
            return self.get(name, most)
        meta, data = held
        if data is not None and len(data) != meta["size"]:
            return self.get(name, most)
        return _got(meta, data)

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """See Client."""

        def request() -> tuple[Any, ObjectVersion]:
            answer = self._obstore.get(self._store, name, options={"range": (start, end)})
            data, version = answer.bytes(), _version(answer.meta)
            if len(data) != end - start and version.size >= end:
                raise ConnectionError("the answer is shorter or longer than was asked for")
            return data, version

        got: tuple[Any, ObjectVersion] = self._call(request, name)
        return got

    def head(self, name: str) -> ObjectVersion:
        """See Client."""
        version: ObjectVersion = self._call(
            lambda: _version(self._obstore.head(self._store, name)), name
        )
        return version

    def list(self, prefix: str, after: str) -> Iterator[Found]:
        """See Client."""
        # A prefix of obstore ends where a part of a name ends: "a/b" does not find "a/bc".
        pages = self._call(
            lambda: self._obstore.list(self._store, prefix or None, offset=after or None), prefix
        )
        while True:
            page: Any = self._call(lambda: next(pages, _END), prefix)
            if page is _END:
                return
            yield [(meta["path"], _version(meta)) for meta in page]

    def _call(self, request: Any, name: str) -> Any:
        if os.getpid() != self._process:  # obstore would panic, or wait for ever
            raise forked(f"{self.root}/{name}")
        return self._retries.call(request, self.root, name)


def _complete(meta: Any, data: Any) -> Any:
    if len(data) != meta["size"]:
        raise ConnectionError("the answer is shorter or longer than it says")
    return data


def _got(meta: Any, data: Any) -> Got:
    return Got(data, _version(meta), None if data is None else md5_of(meta["e_tag"]))


def _version(meta: Any) -> ObjectVersion:
    modified = meta["last_modified"]
    return ObjectVersion.of(
        meta["size"], meta["e_tag"], None if modified is None else modified.timestamp()
    )
