"""Hooks of MkDocs: pages that are made of other files, and links that lead out of the site.

README.md is the first page and CHANGELOG.md another one. Links from pages to files of the
repository become absolute, if its address is known (see `repository` in pyproject.toml), and plain
text otherwise.
"""

import posixpath
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
MADE = {"index.md": "README.md", "changes.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
COMMANDS = ("inspect", "plan", "pack", "bench")


def repository() -> str:
    """The address of the repository; "" while there is none."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    address: str = settings["tool"]["gpucache_pipes"]["repository"]
    return address.rstrip("/")


def on_config(config: Any) -> Any:
    """Show the repository, once it has an address."""
    config.repo_url = repository() or None
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside docs/."""
    for name in MADE:
        files.append(
            File.generated(config, name, content=(ROOT / MADE[name]).read_text(encoding="utf-8"))
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend links, and fill in what the commands say of themselves."""
    source = page.file.src_uri
    base = "" if source in MADE else posixpath.join("docs", posixpath.dirname(source))
    here = posixpath.dirname(source)
    if source == "reference/commands.md":
        markdown += "".join(map(_help, COMMANDS))

    def mended(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups(default="")
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(base, target))
        if path.startswith("docs/"):
            inside = posixpath.relpath(path.removeprefix("docs/"), here or ".")
            return f"{picture}[{text}]({inside}{anchor})"
        if path in MADE.values():
            name = next(name for name, made_of in MADE.items() if made_of == path)
            return f"{picture}[{text}]({posixpath.relpath(name, here or '.')}{anchor})"
        address = repository()
        return f"{picture}[{text}]({address}/blob/main/{path}{anchor})" if address else text

    return LINK.sub(mended, markdown)


def _help(command: str) -> str:
    arguments = [sys.executable, "-m", "gpucache_pipes", command, "--help"]
    said = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return f"\n## {command}\n\n```text\n{said}```\n"
