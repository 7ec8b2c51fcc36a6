"""URLs of objects: their parts, and how they are shown."""

import re
from typing import NamedTuple
from urllib.parse import unquote

from gpucache_pipes.files.paths import URL

HTTP = frozenset({"http", "https"})
OBSTORE = HTTP | {"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"}
"""Schemes of object stores that obstore speaks to. All others are left to fsspec."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"]*)")
_PORT = re.compile(r":\d+$")
_ADDRESS = re.compile(r"\[[0-9A-Fa-f:.]*\]")
"""An address of IPv6, whose colons separate no password."""
_SIGNED = re.compile(
    r"[?&]([^=&]*(sig|token|signature|credential|accesskey)[^=&]*)=", re.IGNORECASE
)
_FILE = "file://"
_AZURE = frozenset({"abfs", "abfss", "az", "azure", "adl"})
"""In URLs of these a container may stand before its account: "abfss://container@account..."."""


class Location(NamedTuple):
    """Where an object is.

    Attributes:
        scheme: of the URL, in lower case.
        root: what all objects of its bucket, container or host begin with: "s3://bucket".
        name: of the object in it; "" for the root itself.
    """

    scheme: str
    root: str
    name: str


def locate(url: str) -> Location:
    """The parts of a URL. Names are not percent-encoded, except in those of HTTP.

    Raises ValueError for a URL that cannot name an object. It shows no credentials.

    >>> locate("s3://bucket/features/a b.pt")
    Location(scheme='s3', root='s3://bucket', name='features/a b.pt')
    >>> locate("https://host/a%20b.pt").name
    'a b.pt'
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    host, _, name = rest.partition("/")
    if redacted(url) != url:
        raise ValueError(
            f"the URL {redacted(url)!r} holds credentials, a signature or a query. They would end "
            "up in logs and states: give credentials as storage_options=, or in the environment"
        )
    if scheme in OBSTORE:
        if not host:
            raise ValueError(f"the URL {url!r} names no bucket, container or host")
        parts = name.removesuffix("/").split("/") if name else []
        if not all(parts) or {".", ".."}.intersection(parts):
            raise ValueError(
                f"the URL {url!r} has an empty part, '.' or '..', which the client library "
                "cannot ask for: rename the object, or read it by a load_fn"
            )
    if scheme in HTTP:
        name = unquote(name)
    return Location(scheme, f"{scheme}://{host}", name)


def redacted(text: str) -> str:
    """A text with the URLs in it, without the user names, passwords and signatures that they hold.

    An Azure container before its account ("abfss://container@account...") is left.

    >>> redacted("s3://key:secret@bucket/a.pt, https://host/a.pt?X-Amz-Signature=12")
    's3://***@bucket/a.pt, https://host/a.pt?***'
    """
    return _URL.sub(_hidden, text) if "://" in text else text


def _hidden(match: re.Match[str]) -> str:
    scheme, rest = match[1], match[2]
    shown = rest
    host = _ADDRESS.sub("", rest.partition("/")[0])
    name, at, _ = host.rpartition("@")
    container = scheme.lower() in _AZURE and at and ":" not in name and "@" not in name
    if ":" in _PORT.sub("", host.rpartition("@")[2]) or (":" in name):
        # A password may hold slashes: up to the last "@", if there is one.
        shown = "***@" + rest.rpartition("@")[2] if "@" in rest else "***"
    elif at and not container:
        shown = "***@" + rest[len(name) + 1 :]
    path, mark, query = shown.partition("?")
    if mark and (scheme.lower() in HTTP or _SIGNED.search(mark + query)):
        shown = f"{path}?***"
    return f"{scheme}://{shown}"


def local_path(path: str) -> str:
    """The path of a local file for a URL such as "file:///data/a.pt"; any other as it is.

    >>> local_path("file:///data/a%20b.pt"), local_path("s3://bucket/a.pt")
    ('/data/a b.pt', 's3://bucket/a.pt')
    """
    if path[:7].lower() != _FILE:
        return path
    rest = path[7:].removeprefix("localhost")
    return unquote(rest) if rest.startswith("/") else path


def is_url(path: str) -> bool:
    """Whether a path is a URL, but that of a local file.

    >>> is_url("s3://bucket/a.pt"), is_url("/data/a.pt"), is_url("file:///data/a.pt")
    (True, False, False)
    """
    return URL.match(path) is not None and local_path(path) == path
