"""Features in packed segments: few large files in place of many small ones.

`PackedDirectory` is a data set that `pack` has made. `DiskCache` keeps what was read of other files
on a local disk, for later epochs, runs and processes.
"""

from gpucache_pipes.files.packed.checks import CHECKS
from gpucache_pipes.files.packed.disk_cache import DiskCache
from gpucache_pipes.files.packed.disk_directory import DiskDirectory
from gpucache_pipes.files.packed.packed_group import PackedGroup
from gpucache_pipes.files.packed.packer import END_SECONDS

__all__ = ["CHECKS", "END_SECONDS", "DiskCache", "DiskDirectory", "PackedGroup"]
