"""Loads the files that the fast `.pt` reader does not support, by `torch.load`."""

import os
import re
import struct
import zipfile

import torch

from gpucache_pipes.files.pt.vetting import require_sound
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import LoadedFeature

# What the errors of torch.load(weights_only=True) call the global that it refuses.
_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][\w.]*) was not")
_REFUSED = re.compile(
    r"(?:Unsupported (?:global|class|operand|storage).*?|GLOBAL |Trying to (?:call|instantiate).*?)"
    r"([A-Za-z_][\w.]*\.[\w.]+)"
)


def by_torch_load(
    path: str, weights_only: bool, selection: Selection | None = None
) -> LoadedFeature:
    """Load a file by `torch.load`, after it was checked for what would harm the process.

    `torch.load` decides about every file that the fast reader does not support.

    Args:
        path: the file.
        weights_only: see `torch.load`. If False, the file may run any code.
        selection: what is kept of the feature; None is all.

    Raises:
        OSError: the file cannot be read.
        MemoryError: the feature does not fit in host memory.
        TypeError: the feature holds what the cache cannot hold; see `flatten`.
        ValueError: the file is refused, or `torch.load` cannot read it. The text says why.
    """
    size = os.stat(path).st_size
    try:
        require_sound(path, pickles=weights_only)
    except ValueError as error:
        if other := _other_format(path):
            raise ValueError(other) from error
        raise
    try:
        # map_location: a reader thread must not touch the GPU from which a file was saved.
        # torch.device: what a file makes anew, such as a sparse tensor, or whatever its code makes
        # with weights_only=False, would be on the default device of the thread.
        with torch.device("cpu"):
            feature = torch.load(path, map_location="cpu", weights_only=weights_only)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(_reason(path, weights_only, error)) from error
    return LoadedFeature(feature if selection is None else selection.feature(feature), size)


_FORMATS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array of numpy.save, whose name must end with .npy",
    b"\x1f\x8b": "compressed by gzip",
    b"PAR1": "a Parquet file",
}
"""Files that are taken for those of torch.save, by how they begin."""


def _other_format(path: str) -> str | None:
    """Says what a file is, if it is certainly something else. Only for files that were refused."""
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(8)
    text = "the file is {}, and not one of torch.save; load_fn= reads others"
    for beginning, name in _FORMATS.items():
        if start.startswith(beginning):
            return text.format(name)
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
            return None  # a damaged one, which the checks below describe
        if names and all(name.endswith(".npy") for name in names):
            return text.format("an archive of numpy.savez")
    return None


def _reason(path: str, weights_only: bool, error: Exception) -> str:
    """Return why `torch.load` raised `error`, with a way out."""
    if other := _other_format(path):
        return other
    with open(path, "rb") as file:  # noqa: PTH123
        start = file.read(4)
    if not start:
        return "the file is empty"
    text = str(error)
    refused = _GLOBAL.search(text) or _REFUSED.search(text)
    if weights_only and refused and refused[1].startswith("numpy"):
        return (
            "the file holds arrays of numpy, and the cache holds tensors. Save tensors, by "
            "torch.from_numpy; or, if you trust the files, convert them: load_fn=lambda path: "
            "torch.utils.data.default_convert(torch.load(path, weights_only=False))"
        )
    if weights_only and refused:
        return (
            f"weights_only=True refuses {refused[1]}. If you trust the files, allow it by "
            "torch.serialization.add_safe_globals, or create the store with weights_only=False; "
            "or read the files with load_fn"
        )
    if weights_only and "Unsupported operand" in text and start == b"PK\x03\x04":
        return (
            "weights_only=True reads only pickles of protocol 2, which torch.save writes by "
            "default. Save the file again by torch.save; or, if you trust it, create the store "
            "with weights_only=False; or read it with load_fn"
        )
    [line, *_] = text.splitlines() or [""]
    if len(line) > 400:
        line = line[:400].rpartition(" ")[0] + " [...]"
    return f"not a torch.save file, or a damaged one ({type(error).__name__}: {line})"
