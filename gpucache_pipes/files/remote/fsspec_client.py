"""Requests by fsspec: any file system that it knows, which depends on what is installed."""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

from gpucache_pipes.files.remote.clients import Found, Got, Options, Retries
from gpucache_pipes.files.remote.errors import translate
from gpucache_pipes.files.remote.urls import Location
from gpucache_pipes.files.remote.versions import ObjectVersion, md5_of
from gpucache_pipes.files.remote.workers import Turns

_PAGE = 1000
_ETAGS = ("ETag", "etag", "e_tag", "sha256", "sha1", "md5", "checksum")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


class FsspecClient:
    """A `Client` by fsspec.

    Args:
        location: has the scheme and the root.
        options: arguments of the file system.

    Attributes:
        root: see Client.
    """

    def __init__(self, location: Location, options: Options) -> None:
        import fsspec

        self.root = location.root
        self._retries = Retries()
        failure: Exception | None = None
        try:
            self._files = fsspec.filesystem(location.scheme, **options)
        except ImportError as error:
            failure = ImportError(f"{location.root!r} needs another package: {error}")
        except ValueError as error:
            if "not known" in str(error):
                failure = ValueError(
                    f"neither obstore nor fsspec knows {location.scheme!r}:// ({location.root!r})"
                )
            else:
                failure = translate(error, location.root).error
        except Exception as error:
            failure = translate(error, location.root).error
        if failure is not None:
            raise failure

    def get(self, name: str, most: int | None) -> Got:
        """See Client. What fsspec gives with the bytes are no versions: it is asked before."""

        def request() -> Got:
            info = self._info(name)
            version = _version(info)
            if most is not None and version.size > most:
                return Got(None, version, None)
            data = self._files.cat_file(self._path(name))
            if version.size not in (-1, len(data)):
                self._files.invalidate_cache()
                raise ConnectionError("the answer is shorter or longer than it should be")
            return Got(data, version._replace(size=len(data)), md5_of(info.get("ETag")))

        got: Got = self._call(request, name)
        return got

    def get_turns(self, names: Sequence[str], most: int, turns: Turns, found: list[Any]) -> None:
        """See Client."""
        while (at := turns.take()) >= 0:
            got = None
            try:
                got = found[at] = self.get(names[at], most)
            except Exception as error:
                found[at] = error
            finally:
                turns.done(at, 0 if got is None or got.data is None else len(got.data))

    def finish(self, name: str, most: int, held: Any) -> Got:
        """See Client."""
        if isinstance(held, Exception):
            raise held
        got: Got = held
        return got

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """See Client. The version is asked for after the bytes."""

        def request() -> tuple[Any, ObjectVersion]:
            data = self._files.cat_file(self._path(name), start=start, end=end)
            if len(data) != end - start:
                raise ConnectionError("the answer is shorter or longer than was asked for")
            return data, _version(self._info(name))

        got: tuple[Any, ObjectVersion] = self._call(request, name)
        return got

    def head(self, name: str) -> ObjectVersion:
        """See Client."""
        version: ObjectVersion = self._call(lambda: _version(self._info(name)), name)
        return version

    def list(self, prefix: str, after: str) -> Iterator[Found]:
        """See Client. fsspec finds all at once, and gives them in pages."""

        def request() -> Found:
            self._files.invalidate_cache()
            found = self._files.find(self._path(prefix), detail=True)
            base = self._files._strip_protocol(self.root).rstrip("/") + "/"
            return [
                (path.removeprefix(base) if path.startswith(base) else path, _version(info))
                for path, info in found.items()
            ]

        found: Found = self._call(request, prefix)
        for at in range(0, len(found), _PAGE):
            yield found[at : at + _PAGE]

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _info(self, name: str) -> dict[str, Any]:
        info: dict[str, Any] = self._files.info(self._path(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        return info

    def _call(self, request: Any, name: str) -> Any:
        return self._retries.call(request, self.root, name)


def _version(info: dict[str, Any]) -> ObjectVersion:
    etag = next((info[key] for key in _ETAGS if isinstance(info.get(key), str)), None)
    moment = next((info[key] for key in _TIMES if info.get(key) is not None), None)
    if isinstance(moment, dt.datetime):
        moment = moment.timestamp()
    if not isinstance(moment, (int, float)):
        moment = None
    return ObjectVersion.of(info.get("size"), etag, moment)
