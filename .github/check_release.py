"""Check that a release says one thing everywhere: tag, version, changelog and addresses.

python .github/check_release.py v0.2.0
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problems(tag: str) -> list[str]:
    """What is not as it must be, to release this tag; empty if nothing."""
    found = []
    version = tag.removeprefix("v")
    source = (ROOT / "gpucache_pipes" / "__init__.py").read_text()
    [known] = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if known != version:
        found.append(f"gpucache_pipes.__version__ is {known}, and the tag is {tag}")
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## (\S+)", changes, re.MULTILINE)[0]
    if newest != version:
        found.append(f"the newest section of CHANGELOG.md is {newest}, not {version}")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if not settings["tool"]["gpucache_pipes"]["repository"]:
        found.append("pyproject.toml has no address of the repository: [tool.gpucache_pipes]")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if failed := problems(sys.argv[1]):
        sys.exit("\n".join(failed))
