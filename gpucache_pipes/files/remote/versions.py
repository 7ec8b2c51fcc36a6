"""What a server says of an object, and what this package knows it by."""

import re
import struct
import time
from hashlib import blake2b
from typing import NamedTuple

_VERSION = struct.Struct("=qqq")
_MD5 = re.compile("[0-9a-fA-F]{32}")
_RACY_SECONDS = 60
"""Times of modification are often whole seconds, and those of the clock of a server: an object that
was written this lately may be written again and keep its own, if its server gives no etag."""


class ObjectVersion(NamedTuple):
    """What a listing or an answer says of an object, as numbers.

    Attributes:
        size: in bytes; -1 if unknown.
        etag: 63 bits of a hash of its etag; -1 if it has none.
        modified: seconds since the epoch; -1 if unknown.
    """

    size: int
    etag: int
    modified: int

    @classmethod
    def of(cls, size: int | None, etag: str | None, modified: float | None) -> "ObjectVersion":
        """The version for what a server says. Quotes and the mark of weak etags do not count."""
        return cls(
            -1 if size is None else size,
            _hash(etag.strip().removeprefix("W/").strip('"')) if etag else -1,
            -1 if modified is None else int(modified),
        )

    def is_same(self, other: "ObjectVersion") -> bool:
        """Whether both are certainly of one version of an object. Listings may lack the etag."""
        if self.size != other.size:
            return False
        if self.etag >= 0 and other.etag >= 0:
            return self.etag == other.etag
        return self.modified >= 0 and self.modified == other.modified

    @property
    def packed(self) -> bytes | None:
        """For `Source.version`; None if the object may change and keep it."""
        return None if self.stored is None else _VERSION.pack(*self)

    def plan_key(self, url: str) -> bytes | None:
        """By what the read plan of an object is remembered; None if it is not.

        With its URL: what is no etag, or one of a time and a size, is that of other objects, too.
        """
        packed = self.packed
        return None if packed is None else packed + _digest(url)

    @property
    def stored(self) -> tuple[int, int] | None:
        """For `Source.file_versions`; None as above."""
        if self.etag >= 0:
            return self.size, self.etag
        if self.modified < 0 or self.modified > time.time() - _RACY_SECONDS:
            return None
        return self.size, self.modified


UNKNOWN_VERSION = ObjectVersion(-1, -1, -1)


def md5_of(etag: str | None) -> bytes | None:
    r"""The MD5 that an etag may be; None for one of other form, such as of an upload in parts.

    >>> md5_of('"9f108a32b608be11c1e1c33c95d8e561"')[:2], md5_of('"9f108a32b608be11-2"')
    (b'\x9f\x10', None)
    """
    text = (etag or "").strip('"')
    return bytes.fromhex(text) if _MD5.fullmatch(text) else None


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _hash(etag: str) -> int:
    return int.from_bytes(_digest(etag), "little") >> 1
