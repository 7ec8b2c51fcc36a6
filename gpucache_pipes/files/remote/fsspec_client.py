"""Requests by fsspec: any file system that it knows, which depends on what is installed."""

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

from gpucache_pipes.files.remote.clients import Found, Got, Options, Retries
from gpucache_pipes.files.remote.errors import as_exception, translate
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
            # What the URL itself says, such as a host and a port.
            of_url = fsspec.get_filesystem_class(location.scheme)._get_kwargs_from_urls(self.root)
            self._files = fsspec.filesystem(location.scheme, **{**of_url, **options})
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
        """See Client. fsspec does not say of which version bytes are: it is asked before and after.

        What it says before may be what a listing has said.
        """

        def request() -> Got:
            before = self._info(name)
            version = _version(before)
            if most is not None and version.size > most:
                return Got(None, version, None)
            data = self._files.cat_file(self._path(name))
            if self._version_now(name) != version or version.size not in (-1, len(data)):
                raise ConnectionError("the object changed while it was read")
            return Got(data, version._replace(size=len(data)), md5_of(before.get("ETag")))

        got: Got = self._call(request, name)
        return got

    def get_again(self, name: str, most: int | None) -> Got:
        """See Client. `get_turns` has repeated requests already."""
        return self.get(name, most)

    def get_turns(
        self, names: Sequence[str], turns: Turns, found: dict[int, Any], most: int
    ) -> None:
        """See Client."""
        while (at := turns.take()) >= 0:
            nbytes = 0
            try:
                got = found[at] = self.get(names[at], most)
                nbytes = 0 if got.data is None else len(got.data)
            except BaseException as error:
                found[at] = as_exception(error)
            finally:
                turns.done(at, nbytes)

    def finish(self, name: str, held: Any) -> Got | None:
        """See Client."""
        if isinstance(held, Exception):
            raise held
        got: Got = held
        return got

    def get_range(self, name: str, start: int, end: int) -> tuple[Any, ObjectVersion]:
        """See Client. The version is asked for after the bytes."""

        def request() -> tuple[Any, ObjectVersion]:
            data = self._files.cat_file(self._path(name), start=start, end=end)
            version = self._version_now(name)
            if len(data) != end - start and not 0 <= version.size < end:
                raise ConnectionError("the answer is shorter or longer than was asked for")
            return data, version

        got: tuple[Any, ObjectVersion] = self._call(request, name)
        return got

    def head(self, name: str) -> ObjectVersion:
        """See Client."""
        version: ObjectVersion = self._call(lambda: self._version_now(name), name)
        return version

    def list(self, prefix: str) -> Iterator[Found]:
        """See Client. fsspec finds all at once, and gives them in pages."""
        found = self._list(prefix, self._files.find)
        for at in range(0, len(found), _PAGE):
            yield found[at : at + _PAGE]

    def list_directly(self, prefix: str) -> Found:
        """See Client."""

        def find(path: str, detail: bool) -> dict[str, Any]:
            entries = self._files.ls(path, detail=detail)
            return {info["name"]: info for info in entries if info.get("type") == "file"}

        return self._list(prefix, find)

    def _list(self, prefix: str, find: Any) -> Found:
        def request() -> Found:
            self._files.invalidate_cache()
            base = self._files._strip_protocol(self.root).rstrip("/") + "/"
            return [
                (path.removeprefix(base) if path.startswith(base) else path, _version(info))
                for path, info in find(self._path(prefix), detail=True).items()
            ]

        found: Found = self._call(request, prefix)
        return found

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _info(self, name: str) -> dict[str, Any]:
        info: dict[str, Any] = self._files.info(self._path(name))
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        return info

    def _version_now(self, name: str) -> ObjectVersion:
        """What the server says, and not what a listing has said."""
        self._files.invalidate_cache(self._path(name))
        self._files.dircache.clear()  # some file systems have no `invalidate_cache` of their own
        return _version(self._info(name))

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
