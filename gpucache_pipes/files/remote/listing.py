"""Which objects a URL means, and the file that remembers them for the next start."""

import contextlib
import fcntl
import fnmatch
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from gpucache_pipes.files.remote.clients import Client, Found, open_client
from gpucache_pipes.files.remote.object_list import LISTS, ObjectList
from gpucache_pipes.files.remote.options import RemoteOptions
from gpucache_pipes.files.remote.urls import HTTP, locate
from gpucache_pipes.files.remote.versions import ObjectVersion

_log = logging.getLogger("gpucache_pipes")

_FORMAT = "gpucache_pipes list of objects 1"
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME",
    "GOOGLE_BASE_URL",
)  # fmt: skip
_GLOB = re.compile(r"[*?[]")
_MOST_BELOW = 20_000
"""Objects in subdirectories that are passed over. Where there are more, requests that leave them
out are made instead, whose results clients do not stream."""


def find_objects(url: str, pattern: str, recursive: bool, options: RemoteOptions) -> ObjectList:
    """The objects below a prefix, of a glob, or one object, sorted by their URLs.

    A prefix is taken as a directory: "s3://bucket/a" does not find "s3://bucket/ab.pt". Stores and
    listers of this process that have the same storage_options know what was listed, for as long as
    the result is referred to.

    Args:
        url: of a prefix, a glob or an object.
        pattern: which names below a prefix are meant.
        recursive: also those below further slashes.
        options: see RemoteOptions.

    Raises:
        FileNotFoundError: there are none, or there is no such bucket.
        PermissionError: access is denied, or there are no credentials.
        OSError: the server cannot be reached.
        ValueError: a URL that cannot be listed, options that the client does not know, or a
            list_cache that is another file.
    """
    if options.list_cache is None:
        objects = _list(url, pattern, recursive, options)
    else:
        path = os.fspath(options.list_cache)
        about = [_FORMAT, url, pattern, str(recursive), _endpoint(options.storage_options or {})]
        found = _load(path, about)
        if found is None:
            with _locked(path):
                found = _load(path, about)  # another process may have been faster
                if found is None:
                    found = _list(url, pattern, recursive, options)
                    _save(path, about, found)
        objects = found
    LISTS.add(objects, options.storage_options or {})
    return objects


def _list(url: str, pattern: str, recursive: bool, options: RemoteOptions) -> ObjectList:
    location = locate(url)
    if location.scheme in HTTP:
        raise ValueError(
            f"HTTP has no listing of {url!r}: give a list of URLs, or the URL of an object store"
        )
    client = open_client(location, options.storage_options or {})
    magic = _GLOB.search(location.name)
    if magic is not None:
        prefix = location.name[: location.name.rfind("/", 0, magic.start()) + 1]
        wanted = _globbed(location.name)
        recursive = True
        where = f"for the glob {url!r}"
    else:
        prefix = location.name and location.name.removesuffix("/") + "/"
        part = _Part(pattern)

        def wanted(path: str) -> bool:
            return part.matches(path, path.rfind("/") + 1) is not None

        where = f"below {url!r} with pattern {pattern!r}" + (
            "" if recursive else " (recursive=True looks below further slashes too)"
        )
    below = f"{client.root}/{prefix}"
    names: list[str] = []
    versions: list[npt.NDArray[np.int64]] = []
    seen = 0
    for page in _pages(client, prefix, recursive, options.progress):
        some = [item for item in page if wanted(item[0])]
        names += [path for path, _ in some]
        versions.append(_array([version for _, version in some]))
        seen += len(page)
    if not names and not seen and magic is None and location.name and not url.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            version = client.head(location.name)
            names, versions = [location.name], [_array([version])]
            below = f"{client.root}/"
    if not names and not seen and magic is None and os.path.splitext(location.name)[1]:
        raise FileNotFoundError(f"no object {url!r}, and none below it")
    if not names:
        raise FileNotFoundError(f"no objects {where}; {seen:,} have other names")
    urls = [f"{client.root}/{path}" for path in names]
    table = np.concatenate(versions)
    # Not all stores list in the order of names.
    order = sorted(range(len(urls)), key=urls.__getitem__)
    return ObjectList([urls[n] for n in order], below, table[order])


def _pages(
    client: Client, prefix: str, recursive: bool, progress: Callable[[int], Any] | None
) -> Iterator[Found]:
    """What is listed below a prefix, without the objects that stand for directories."""
    direct: list[Found] = []
    below = 0
    for page in client.list(prefix):
        if progress is not None:
            progress(len(page))
        inside = [item for item in page if item[0].startswith(prefix) and item[0] != prefix]
        if recursive:
            yield inside
            continue
        direct.append([item for item in inside if "/" not in item[0][len(prefix) :]])
        below += len(inside) - len(direct[-1])
        if below > _MOST_BELOW:
            direct = [[item for item in client.list_directly(prefix) if item[0] != prefix]]
            break
    yield from direct


def _array(versions: list[ObjectVersion]) -> npt.NDArray[np.int64]:
    return np.array(versions, np.int64).reshape(-1, 3)


def _globbed(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches a glob as `glob.glob` has it, with "**" for any number of parts."""
    parts = [None if part == "**" else _Part(part) for part in pattern.split("/")]
    return lambda name: _match(parts, name.split("/"))


class _Part:
    """A part of a glob. As in a shell, a name that begins with a dot needs one that does."""

    def __init__(self, pattern: str) -> None:
        hidden = "" if pattern.startswith(".") or not _GLOB.search(pattern) else r"(?!\.)"
        self.matches = re.compile(hidden + fnmatch.translate(pattern)).match


def _match(parts: Sequence[_Part | None], names: Sequence[str]) -> bool:
    for at, part in enumerate(parts):
        if part is None:
            rest = names[at:]
            visible = next((n for n, name in enumerate(rest) if name.startswith(".")), len(rest))
            if at == len(parts) - 1:  # it matches at least the name of the object
                return 0 < len(rest) == visible
            return any(_match(parts[at + 1 :], rest[n:]) for n in range(visible + 1))
        if at >= len(names) or not part.matches(names[at]):
            return False
    return len(parts) == len(names)


# The file


def _endpoint(options: Mapping[str, Any]) -> str:
    """What tells buckets of one name apart."""
    names = ("endpoint", "aws_endpoint", "aws_endpoint_url", "endpoint_url", "account_name",
             "azure_storage_account_name", "base_url")  # fmt: skip
    given = [str(options[name]) for name in names if name in options]
    given += [os.environ[name] for name in _ENDPOINTS if name in os.environ]
    # A hash, since an address may hold credentials.
    return blake2b(" ".join(given).encode(), digest_size=8).hexdigest()


def _load(path: str, about: list[str]) -> ObjectList | None:
    """What a file remembers; None if there is none, or one of other arguments."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:  # noqa: PTH123
            found = list(map(str, held["about"]))
            if found[0] != _FORMAT:
                raise ValueError("of another format")
            if found != about:
                _log.info("%r is of another listing: objects are listed again", path)
                return None
            below = str(held["below"][()])
            text = held["names"].tobytes().decode("utf-8", "surrogatepass")
            versions = held["versions"]
        urls = [below + name for name in text.split("\0")]
        if versions.shape != (len(urls), 3) or versions.dtype != np.int64:
            raise ValueError("of another shape")
        return ObjectList(urls, below, versions)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # whatever numpy, zipfile and zlib say of bytes that are damaged
        raise ValueError(
            f"list_cache={path!r} is not a list of objects, or a damaged one: remove it, or name "
            "another file"
        ) from None


def _save(path: str, about: list[str], objects: ObjectList) -> None:
    """Write the file as a whole, or not at all."""
    start = len(objects.below)
    text = "\0".join([url[start:] for url in objects])
    directory = os.path.dirname(path) or "."
    os.makedirs(directory, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".list-", delete=False) as file:
        try:
            np.savez_compressed(
                file, about=np.array(about), below=np.array(objects.below),
                names=np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8),
                versions=objects.versions,
            )  # fmt: skip
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Have the processes of a job list one after the other, so that the first one does it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.lock", "w") as file:  # noqa: PTH123
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:  # who waits for this file looks for the result first
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.lock")
