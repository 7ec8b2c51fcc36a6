"""Paths and samples as plain data, for the states of pipelines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpucache_pipes.files.paths import NumberedPath, PathList, Paths
from gpucache_pipes.files.samples import Samples

_POSITIONS = "label_positions"
_PARTS = "sample_parts"


def as_plain_data(element: Any) -> Any:
    """Paths or samples for a state: a list, or a dict of lists. Anything else as it is.

    With labels also the positions of the paths.
    """
    if isinstance(element, Samples):
        return {_PARTS: list(element.parts), "paths": as_plain_data(element.paths)}
    if isinstance(element, NumberedPath):
        return {_POSITIONS: element.position, "paths": str(element)}
    if isinstance(element, Paths):
        paths = [str(path) for path in element]
        if element.files.labels is None:
            return paths
        return {_POSITIONS: element.positions.tolist(), "paths": paths}
    return element


def from_plain_data(data: Any, files: PathList | None, given: Sequence[str]) -> Any:
    """What `as_plain_data` was given, if these are still the files; else the paths alone.

    Args:
        data: from a state.
        files: the list of files, with labels; None if there is none.
        given: its paths as they were first.
    """
    if isinstance(data, dict) and data.keys() == {_PARTS, "paths"}:
        return Samples(tuple(data[_PARTS]), from_plain_data(data["paths"], files, given))
    if not isinstance(data, dict) or data.keys() != {_POSITIONS, "paths"}:
        return data
    positions, paths = data[_POSITIONS], data["paths"]
    single = isinstance(positions, int)
    pairs = [(positions, paths)] if single else list(zip(positions, paths, strict=True))
    if (
        files is None
        or files.labels is None
        or any(at >= len(given) or path not in (given[at], files.paths[at]) for at, path in pairs)
    ):
        return paths
    if single:
        return NumberedPath.of(files, positions)
    return Paths(files, np.array(positions, np.intp))
