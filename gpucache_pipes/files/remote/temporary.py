"""Objects that only torch.load can read, by a temporary copy on the disk."""

import os
import tempfile
from typing import Any

from gpucache_pipes.files.pt.fallback import by_torch_load
from gpucache_pipes.files.remote.versions import ObjectVersion
from gpucache_pipes.files.selection import Selection
from gpucache_pipes.files.source import LoadedFeature


def load_from_copy(
    data: Any,
    name: str,
    weights_only: bool,
    selection: Selection | None,
    version: ObjectVersion,
) -> LoadedFeature:
    """Load an object whose bytes are `data`. Raises as `by_torch_load`.

    What does not work: torch.load of bytes in memory. The checks that protect the process look at
    a file, and pickles of older formats are read by its descriptor.
    """
    suffix = os.path.splitext(name)[1][:16]
    with tempfile.NamedTemporaryFile(prefix="gpucache-", suffix=suffix) as file:
        file.write(data)
        file.flush()
        feature = by_torch_load(file.name, weights_only, selection)
    feature.version, feature.file_version = version.packed, version.stored
    return feature
