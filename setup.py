"""Builds the native reader. What else there is to say about the package is in pyproject.toml.

Without a compiler the package installs all the same: the reader in Python takes over.
"""

import sysconfig

from setuptools import Extension, setup

# One wheel for all versions of CPython, but for those without the global interpreter lock, which
# have no stable ABI.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            "gpucache_pipes.files._native",
            ["gpucache_pipes/files/_native.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            py_limited_api=STABLE_ABI,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
