"""The documentation as a site, and the page of the package."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gpucache_pipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    where = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(where)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return where


def test_every_public_name_has_a_reference(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "reference").rglob("index.html"))
    for name in gpucache_pipes.__all__:
        if name not in ("Ticket",):  # a former name
            assert re.search(rf'id="gpucache_pipes\.(\w+\.)*{name}"', pages), name
    for command in ("inspect", "plan", "bench"):
        assert f"usage: gpucache-pipes {command}" in pages


def test_pages_lead_nowhere_outside(site: Path) -> None:
    """What a page links to is part of the site, or has an address."""
    for page in site.rglob("index.html"):
        for target in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text()):
            if not target.startswith("/"):
                found = page.parent / target
                assert found.exists(), f"{page.relative_to(site)}: {target}"


def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_package", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_address_of_the_repository_makes_all_links() -> None:
    made = setup()
    assert made.readme("") == (ROOT / "README.md").read_text()
    assert made.urls("") == {}
    text = made.readme("https://example.org/us/it")
    assert made.urls("https://example.org/us/it")["Repository"] == "https://example.org/us/it"
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(re.match(r"https://|#", target) for target in targets)
    assert "](https://example.org/us/it/raw/main/docs/overview.svg)" in text
    assert "](https://example.org/us/it/blob/main/docs/dataloader.md)" in text
    for file in ("pyproject.toml", "setup.py", "mkdocs.yml", "README.md"):
        addresses = re.findall(r"https?://(?:github|gitlab)\.com/\S+", (ROOT / file).read_text())
        assert not addresses, "the address stands in pyproject.toml alone"
