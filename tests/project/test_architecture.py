"""Who may import whom, and what is public."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpucache_pipes

ROOT = Path(gpucache_pipes.__file__).parent

# What the modules of each folder may import of this package; all may import the leaves.
LEAVES = {"errors", "units"}
ALLOWED = {
    "cache": {"cache"},
    "device": {"device"},
    "files": {"files"},
    "batches": {"batches", "device", "files"},
    "peers": {"peers", "batches", "device", "files"},
    "store": {"store", "batches", "cache", "device", "files", "peers"},
    "nodes": {"nodes", "batches", "files", "peers", "store"},
    "adapters": {"adapters", "files", "nodes", "store"},
    "cli": {"cli", "batches", "cache", "device", "files", "nodes", "peers", "store"},
    "testing": {"testing", "cache", "device", "files", "nodes", "store"},
    "former_names": set(),
    "__init__": {"adapters", "batches", "cache", "files", "nodes", "store"},
    "__main__": {"cli"},
    **{leaf: set() for leaf in LEAVES},
}


def imports_of(path: Path) -> set[str]:
    """The rooms of this package that a module imports."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("gpucache_pipes.")}
    return rooms


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imports_of(path) <= ALLOWED[room] | LEAVES


def test_the_cache_needs_no_torch() -> None:
    code = "import sys, gpucache_pipes; gpucache_pipes.simulate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names() -> None:
    names = gpucache_pipes.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(gpucache_pipes, name).__doc__, name
        assert name in dir(gpucache_pipes)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gpucache_pipes.no_such_name


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages([str(ROOT)], "gpucache_pipes.") if m.ispkg],
)
def test_every_all_is_complete_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    public = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, type(importlib))
    ]
    # As ruff sorts them: constants, classes, then the rest.
    assert sorted(module.__all__) == sorted(public)


FORMER = {
    "gpucache_pipes": "Ticket FeatureBatch StoreStats Padded GPUFeatureStore Trace simulate",
    "gpucache_pipes.cache": "Future Policy Trace make_policy register simulate",
    "gpucache_pipes.batch": "FeatureBatch",
    "gpucache_pipes.bench": "Contender Work advice bench",
    "gpucache_pipes.planning": "plan advice POLICIES",
    "gpucache_pipes.inspection": "inspect_file inspect_files",
    "gpucache_pipes.ragged": "Padded RaggedOptions",
    "gpucache_pipes.stats": "StoreStats",
    "gpucache_pipes.ticket": "Ticket",
    "gpucache_pipes.upcoming": "Upcoming",
    "gpucache_pipes.store": "GPUFeatureStore",
    "gpucache_pipes.files.planned": "Plan PlanReader",
    "gpucache_pipes.files.formats": "FORMATS",
}


@pytest.mark.parametrize("module", FORMER)
def test_former_names_can_be_imported(module: str) -> None:
    for name in FORMER[module].split():
        assert getattr(importlib.import_module(module), name) is not None


def test_a_former_name_is_the_present_object() -> None:
    from gpucache_pipes.bench import Work
    from gpucache_pipes.ticket import Ticket

    from gpucache_pipes.cli import bench
    from gpucache_pipes.store import PendingBatch

    assert Ticket is PendingBatch and Work is bench.Work
    assert bench.__spec__ is not None and bench.__spec__.name == "gpucache_pipes.cli.bench"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gpucache_pipes.no_such_module")
