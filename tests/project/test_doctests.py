"""Examples in docstrings run as printed."""

import doctest
import importlib
import pkgutil

import pytest

import gpucache_pipes

MODULES = [
    module.name
    for module in pkgutil.walk_packages(gpucache_pipes.__path__, "gpucache_pipes.")
    if not module.name.endswith("__main__")
]


EXTRAS = {"gpucache_pipes.adapters.lightning": "lightning", "gpucache_pipes.testing": "hypothesis"}


def examples_of(name: str) -> list[doctest.DocTest]:
    for folder, library in EXTRAS.items():
        if name.startswith(folder):
            pytest.importorskip(library, reason=f"{folder} needs it")
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    runner = doctest.DocTestRunner()
    for test in examples_of(name):
        runner.run(test)
    assert runner.summarize().failed == 0


def test_there_are_some() -> None:
    for name in ("units", "store.page_size", "cache.simulation.trace"):
        assert examples_of(f"gpucache_pipes.{name}")
