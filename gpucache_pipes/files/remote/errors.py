"""The exceptions of client libraries in the words of this package, without credentials.

Texts of clients hold what servers answer: the id of the access key, strings that were signed, and
internal addresses. So they are not passed on, not even as a cause; what matters of them is: the
status, the code of the error, and how often the client has tried.
"""

import asyncio
import errno
import re
from typing import NamedTuple

ERRORS = (OSError, ValueError, ImportError, RuntimeError, TypeError)
"""What is an error of one object."""

_STATUS = re.compile(r"status code: (\d{3})|\b[sS]tatus(?: code)?[:= ]+(\d{3})\b")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_RETRIES = re.compile(r"after (\d+) retries")
_NO_CREDENTIALS = ("169.254.169.254", "169.254.170.2", "metadata.google", "latest/api/token")
_WAY_OUT = "credentials come from storage_options= or, as the SDKs have it, from the environment"


class ChangedError(OSError):
    """An object is another one than a moment ago, or than a listing says."""


def changed(url: str) -> ChangedError:
    """The object changed between two requests for it."""
    return ChangedError(errno.ESTALE, "the object changed while it was read", url)


class Failure(NamedTuple):
    """An exception of a client.

    Attributes:
        error: what to raise instead.
        again: whether asking again may help, and the client has not done so itself.
        no_ranges: whether the server cannot send a part of an object.
    """

    error: Exception
    again: bool = False
    no_ranges: bool = False


def translate(error: BaseException, url: str) -> Failure:
    """What an exception of a client means for the object or the prefix at `url`."""
    name = type(error).__name__
    text = str(error)
    status, code, tried = _found(text)
    what = " ".join(filter(None, [status, code])) or name
    if name == "PanicException":
        return Failure(RuntimeError(f"the client library has failed at {url!r}; the log says why"))
    if code in ("NoSuchBucket", "ContainerNotFound") or "specified bucket does not exist" in text:
        return Failure(FileNotFoundError(errno.ENOENT, "No such bucket", url))
    if status == "404" or isinstance(error, FileNotFoundError) or name == "NotFoundError":
        return Failure(FileNotFoundError(errno.ENOENT, "No such object", url))
    if any(mark in text for mark in _NO_CREDENTIALS) or name in (
        "NoCredentialsError", "DefaultCredentialsError"
    ):  # fmt: skip
        return Failure(PermissionError(errno.EACCES, f"no credentials were found: {_WAY_OUT}", url))
    if (
        status in ("401", "403")
        or isinstance(error, PermissionError)
        or name in ("PermissionDeniedError", "UnauthenticatedError")
    ):
        denied = f"access is denied ({what}): {_WAY_OUT}"
        return Failure(PermissionError(errno.EACCES, denied, url))
    if status == "416":  # its end is before what was asked for
        return Failure(changed(url))
    if "Received non-partial response" in text or "Range request not supported" in text:
        return Failure(OSError(errno.ENOTSUP, "the server sends no ranges", url), no_ranges=True)
    if name == "UnknownConfigurationKeyError":
        # The first line names the key, not its value.
        return Failure(ValueError(f"storage_options for {url!r}: {text.splitlines()[0]}"))
    if name == "InvalidPathError" or "invalid path" in text:
        return Failure(
            ValueError(
                f"{url!r}, or an object below it, has a name that the client library cannot ask "
                "for, such as one with an empty part or a newline: rename it, or list URLs yourself"
            )
        )
    if isinstance(error, (ValueError, TypeError, ImportError)) and not status:
        return Failure(
            ValueError(f"the client library refuses {url!r}, or storage_options for it ({name})")
        )
    return _transient(error, url, text, status, what, tried)


class ForkedError(RuntimeError):
    """The threads of a client library do not exist in this process."""


def forked(url: str) -> ForkedError:
    """The error of an object that cannot be read in a forked process."""
    return ForkedError(
        f"cannot read {url!r} in a process that was forked from one that has used object storage: "
        'use multiprocessing_context="spawn" or "forkserver"'
    )


def _transient(
    error: BaseException, url: str, text: str, status: str, what: str, tried: int
) -> Failure:
    """What may pass: the network, or a server that is busy."""
    # obstore retries what has no answer yet, and says so; not an answer that breaks off.
    again = "Error performing" not in text
    after = f" after {tried} retries" if tried else ""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or "timed out" in text:
        return Failure(TimeoutError(errno.ETIMEDOUT, f"no answer in time{after}", url), again)
    if status:
        answer = OSError(errno.EIO, f"the server answers {what}{after}", url)
        return Failure(answer, again and status in ("408", "429", "500", "502", "503", "504"))
    # GenericError is what obstore says of a connection; other libraries have errors of many names.
    name = type(error).__name__
    passes = isinstance(error, ConnectionError) or name == "GenericError"
    passes = passes or any(part in name for part in ("Connect", "Timeout", "Server", "Payload"))
    if not passes:
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        return Failure(OSError(number, f"the client library fails with {name}", url))
    broken = ConnectionError(errno.ECONNRESET, f"the connection failed ({name}){after}", url)
    return Failure(broken, again)


def _found(text: str) -> tuple[str, str, int]:
    """The status, the code and the number of retries in the text of a client; "" and 0 if none."""
    status = _STATUS.search(text)
    code = _CODE.search(text)
    tried = _RETRIES.search(text)
    return (
        (status[1] or status[2]) if status else "",
        code[1] if code else "",
        int(tried[1]) if tried else 0,
    )


def as_exception(error: BaseException) -> Exception:
    """An exception that may be kept: what ends a thread is none."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}")
