"""The exception that a consumer gets when a file cannot be loaded."""

import os

from gpucache_pipes.errors import FeatureLoadError, PolicyError
from gpucache_pipes.files.local import is_same_file
from gpucache_pipes.files.remote.urls import redacted


def load_error(path: str, cause: BaseException) -> Exception:
    """A new exception to raise `from cause` at the batch that needed `path`.

    A missing file stays a FileNotFoundError and a lack of memory a MemoryError, so that `except`
    clauses written for plain `torch.load` keep working; the rest is a FeatureLoadError. Each
    consumer gets an exception of its own: two threads must not share one traceback.
    """
    path = redacted(path)
    if isinstance(cause, FileNotFoundError):
        reason = cause.strerror or "No such file"
        if cause.filename not in (None, path) and not is_same_file(cause.filename, path):
            # A load_fn needs another file than the path that it is given.
            reason = f"{reason} ({cause.filename!r}, needed to load)"
        return FileNotFoundError(cause.errno, reason, path)
    if isinstance(cause, MemoryError) or _is_out_of_device_memory(cause):
        text = str(cause) or "out of memory"
        return MemoryError(text if path in text else f"cannot load {os.fspath(path)!r}: {text}")
    if isinstance(cause, PolicyError):
        return PolicyError(str(cause))
    return FeatureLoadError(path, f"{type(cause).__name__}: {cause}".removesuffix(": "))


def _is_out_of_device_memory(cause: BaseException) -> bool:
    """Torch has a class for most cases, a subclass of RuntimeError, and none for the others."""
    return isinstance(cause, RuntimeError) and (
        type(cause).__name__ == "OutOfMemoryError" or "error: out of memory" in str(cause)
    )
