"""Files: their keys, their formats, and the threads that read them."""

from gpucache_pipes.files.formats import FileOpener, opener
from gpucache_pipes.files.layout import (
    ALIGNMENT,
    Branch,
    Layout,
    Leaf,
    Tree,
    build,
    flatten,
    leaf_names,
    own,
)
from gpucache_pipes.files.path_table import PathLike, PathTable
from gpucache_pipes.files.sampling import sample_file_sizes
from gpucache_pipes.files.source import LoadedFeature, Opener, OpenFeature
from gpucache_pipes.files.versions import file_version, has_version

__all__ = [
    "ALIGNMENT",
    "Branch",
    "FileOpener",
    "Layout",
    "Leaf",
    "LoadedFeature",
    "OpenFeature",
    "Opener",
    "PathLike",
    "PathTable",
    "Tree",
    "build",
    "file_version",
    "flatten",
    "has_version",
    "leaf_names",
    "opener",
    "own",
    "sample_file_sizes",
]
