"""What a consumer sees when a file cannot become a feature."""

import os
from typing import Any


class FeatureLoadError(RuntimeError):
    """One file could not be loaded; the store goes on and the next request tries again.

    Attributes:
        path: the file.
        __cause__: what the reader or `load_fn` raised.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot load {self.path!r}: {self.reason}"


class RankError(RuntimeError):
    """Other ranks had errors, so that this one cannot go on with its batch: see Lockstep.

    Attributes:
        texts: by rank, what was raised there.
    """

    def __init__(self, texts: dict[int, str]) -> None:
        super().__init__(texts)
        self.texts = texts

    def __str__(self) -> str:
        return "; ".join(f"rank {rank} failed with {text}" for rank, text in self.texts.items())


def load_error(path: str, cause: BaseException) -> Exception:
    """The exception to raise `from cause` at the batch that needed `path`.

    A missing file stays a FileNotFoundError and a lack of memory a MemoryError, so that
    `except` clauses written for plain `torch.load` keep working. A new one is made for each
    consumer: two threads must not share one traceback.
    """
    if isinstance(cause, FileNotFoundError):
        reason = cause.strerror or "No such file"
        if not _is_same(cause.filename, path):  # a load_fn needs more than the path it is given
            reason = f"{reason} ({cause.filename!r}, needed to load)"
        return FileNotFoundError(cause.errno, reason, path)
    if isinstance(cause, MemoryError) or _is_lack_of_device_memory(cause):
        text = str(cause) or "out of memory"
        return MemoryError(text if path in text else f"cannot load {os.fspath(path)!r}: {text}")
    return FeatureLoadError(path, f"{type(cause).__name__}: {cause}".removesuffix(": "))


def _is_lack_of_device_memory(cause: BaseException) -> bool:
    """For most of it torch has a class of its own, a RuntimeError; for the rest it has none."""
    return isinstance(cause, RuntimeError) and (
        type(cause).__name__ == "OutOfMemoryError" or "error: out of memory" in str(cause)
    )


def _is_same(missing: Any, path: str) -> bool:
    """Whether what is missing is the file itself, as it was spelled or with links resolved."""
    if missing in (None, path):
        return True
    try:
        return str(os.path.realpath(missing)) == os.path.realpath(path)
    except (OSError, TypeError, ValueError):
        return False
