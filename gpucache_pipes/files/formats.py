"""Which reader opens a file: chosen by the end of its name."""

import os
import re
from collections.abc import Callable

import torch

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.npy import NpyReader
from gpucache_pipes.files.planned import PlanReader
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.files.pt.vetting import require_sound
from gpucache_pipes.files.safetensors import SafetensorsReader
from gpucache_pipes.files.source import LoadedFeature, OpenFeature

FORMATS: dict[str, Callable[[], PlanReader]] = {
    ".npy": NpyReader,
    ".safetensors": SafetensorsReader,
}
"""Readers by the end of a file's name. Files of all other names are read as `.pt` files."""


class FileOpener:
    """Opens feature files by the ends of their names. For any number of threads."""

    def __init__(self, weights_only: bool) -> None:
        self._weights_only = weights_only
        self._readers = {suffix: make() for suffix, make in FORMATS.items()}
        self._suffixes = tuple(self._readers)
        self._pt = PtReader()

    def open(self, path: str) -> OpenFeature:
        """The feature in a file. Raises OSError, or ValueError with the reason."""
        return self.probe(path)[0]

    def probe(self, path: str) -> tuple[OpenFeature, str | None]:
        """The feature, and why `torch.load` read it, or None. Raises as `open` does."""
        if path.endswith(self._suffixes):
            reader = next(r for suffix, r in self._readers.items() if path.endswith(suffix))
            try:
                return reader.open(path), None
            except Unsupported as error:
                raise ValueError(f"{error}; load_fn reads what this package does not") from error
        try:
            return self._pt.open(path), None
        except Unsupported as error:
            return by_torch_load(path, self._weights_only), str(error)


def by_torch_load(path: str, weights_only: bool) -> LoadedFeature:
    """What torch.load makes of the file: the authority on all that the reader does not know.

    Raises OSError as torch.load does, and else ValueError with a reason to read.
    """
    size = os.stat(path).st_size
    require_sound(path, pickles=weights_only)
    try:
        # map_location: a file saved on a GPU must not touch that GPU from a reader thread.
        feature = torch.load(path, map_location="cpu", weights_only=weights_only)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(_reason(path, weights_only, error)) from error
    return LoadedFeature(feature, size)


def _reason(path: str, weights_only: bool, error: Exception) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(4)
    if not start:
        return "the file is empty"
    text = str(error)
    refused = _GLOBAL.search(text) or _REFUSED.search(text)
    if weights_only and refused:
        return (
            f"weights_only=True refuses {refused[1]}. If you trust the files: allow it by "
            "torch.serialization.add_safe_globals, or make the store with weights_only=False; "
            "or convert it with load_fn"
        )
    if weights_only and "Unsupported operand" in text and start == b"PK\x03\x04":
        return (
            "weights_only=True reads only pickles of protocol 2, as torch.save writes by default. "
            "Save it anew; or, if you trust it, make the store with weights_only=False; or read it "
            "by load_fn"
        )
    [line, *_] = text.splitlines() or [""]
    return f"not a file of torch.save, or damaged ({type(error).__name__}: {line:.200})"


_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][\w.]*) was not")
_REFUSED = re.compile(
    r"(?:Unsupported (?:global|class|operand|storage).*?|GLOBAL |Trying to (?:call|instantiate).*?)"
    r"([A-Za-z_][\w.]*\.[\w.]+)"
)
