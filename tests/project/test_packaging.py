"""What the package asks pip for."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MALICIOUS = {"lightning": ["2.6.2", "2.6.3"], "pytorch-lightning": ["2.6.2", "2.6.3"]}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    texts += [line for line in pins if line and not line.startswith("#")]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", MALICIOUS)
def test_no_range_admits_a_malicious_upload(name: str) -> None:
    """GHSA-w37p-236h-pfx3."""
    found = [r for r in requirements() if r.name.lower().replace("_", "-") == name]
    assert found
    for requirement in found:
        assert requirement.specifier, requirement
        for version in MALICIOUS[name]:
            assert not requirement.specifier.contains(version, prereleases=True), requirement


def test_a_release_says_one_thing_everywhere() -> None:
    """The check of the release workflow; here nothing fits."""
    run = subprocess.run(
        [sys.executable, ROOT / ".github" / "check_release.py", "v99.0.0"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "and the tag is v99.0.0" in run.stderr
    assert "the newest section of CHANGELOG.md is Unreleased, not 99.0.0" in run.stderr
