"""Files that the `.pt` reader leaves to `torch.load`."""

import os
import re

import torch

from gpucache_pipes.files.pt.vetting import require_sound
from gpucache_pipes.files.source import LoadedFeature

_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][\w.]*) was not")
_REFUSED = re.compile(
    r"(?:Unsupported (?:global|class|operand|storage).*?|GLOBAL |Trying to (?:call|instantiate).*?)"
    r"([A-Za-z_][\w.]*\.[\w.]+)"
)


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
