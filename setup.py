"""Builds the native reader, and makes the package's page of README.md.

Without a compiler the package installs all the same: the reader in Python takes over. What else
there is to say about the package is in pyproject.toml.
"""

import re
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent

# One wheel for all versions of CPython, but for those without the global interpreter lock, which
# have no stable ABI.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


def repository() -> str:
    """The address of the repository; "" while there is none."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address: str = settings["tool"]["gpucache_pipes"]["repository"]
    return address.rstrip("/")


def urls(address: str) -> dict[str, str]:
    """The links of the package's page."""
    if not address:
        return {}
    pages = {"Changelog": "blob/main/CHANGELOG.md", "Documentation": "tree/main/docs"}
    return {"Repository": address, **{name: f"{address}/{page}" for name, page in pages.items()}}


def readme(address: str) -> str:
    """README.md, whose links lead from the package's page to the repository; else to nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not address:
        return text
    text = re.sub(r"(!\[[^\]]*\])\((?!\w+://)([^)]+)\)", rf"\1({address}/raw/main/\2)", text)
    return re.sub(
        r"(?<!!)(\[[^\]!]*\])\((?!\w+://|#)([^)]+)\)", rf"\1({address}/blob/main/\2)", text
    )


def extension(module: str) -> Extension:
    """A native module, by its path in the package. Without a compiler it is left out."""
    return Extension(
        f"gpucache_pipes.{module.replace('/', '.')}",
        [f"gpucache_pipes/{module}.c"],
        depends=["gpucache_pipes/files/_native.h"],
        extra_compile_args=["-O2", "-Wall", "-Wextra"],
        py_limited_api=STABLE_ABI,
        optional=True,
    )


if __name__ == "__main__":
    setup(
        long_description=readme(repository()),
        long_description_content_type="text/markdown",
        project_urls=urls(repository()),
        ext_modules=[extension("files/_native"), extension("files/packed/_packed")],
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
    )
