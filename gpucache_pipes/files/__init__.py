"""Feature files: where they are, what is in them, and how their bytes are read."""

from gpucache_pipes.files.any_files import AnyFiles
from gpucache_pipes.files.batch_reader import native_problem
from gpucache_pipes.files.chunks import read_many
from gpucache_pipes.files.failures import load_error
from gpucache_pipes.files.formats import FileOpener
from gpucache_pipes.files.layout import (
    ALIGNMENT,
    Branch,
    Layout,
    Leaf,
    Tree,
    build,
    copy_value,
    flatten,
)
from gpucache_pipes.files.local import LocalFiles, file_size
from gpucache_pipes.files.part_names import leaf_names, value_names
from gpucache_pipes.files.path_table import PathLike, PathTable
from gpucache_pipes.files.paths import NumberedPath, PathList, Paths, chosen, paths_without
from gpucache_pipes.files.plain_paths import as_plain_data, from_plain_data
from gpucache_pipes.files.remote.options import RemoteOptions, require_options
from gpucache_pipes.files.remote.remote_files import RemoteFiles
from gpucache_pipes.files.rows import RowFiles
from gpucache_pipes.files.samples import (
    Parts,
    Samples,
    as_samples,
    files_of,
    joined,
    with_their_samples,
)
from gpucache_pipes.files.selection import Key, Selection
from gpucache_pipes.files.source import (
    LoadedFeature,
    OpenFeature,
    Progress,
    Source,
    VersionedFeature,
)

__all__ = [
    "ALIGNMENT",
    "AnyFiles",
    "Branch",
    "FileOpener",
    "Key",
    "Layout",
    "Leaf",
    "LoadedFeature",
    "LocalFiles",
    "NumberedPath",
    "OpenFeature",
    "Parts",
    "PathLike",
    "PathList",
    "PathTable",
    "Paths",
    "Progress",
    "RemoteFiles",
    "RemoteOptions",
    "RowFiles",
    "Samples",
    "Selection",
    "Source",
    "Tree",
    "VersionedFeature",
    "as_plain_data",
    "as_samples",
    "build",
    "chosen",
    "copy_value",
    "file_size",
    "files_of",
    "flatten",
    "from_plain_data",
    "joined",
    "leaf_names",
    "load_error",
    "native_problem",
    "paths_without",
    "read_many",
    "require_options",
    "value_names",
    "with_their_samples",
]
