"""Tensors of the package do not depend on torch.set_default_device."""

import ast
from collections.abc import Iterator
from pathlib import Path

from torch.utils._device import _device_constructors

import gpucache_pipes

ROOT = Path(gpucache_pipes.__file__).parent

# The functions of torch that make a tensor on the default device if they are not told where.
MADE_BY = {function.__name__.removeprefix("fft_") for function in _device_constructors()} | {
    "as_nested_tensor"
}

# These make tensors without an argument for the device: only where the device is chosen for them.
IMPLICIT = {
    "default_collate": {"batches/transfer.py"},
    "nested_tensor_from_jagged": {"batches/ragged.py"},
}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """The calls in all modules: the module, the call, and what is called."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), node, ast.unparse(node.func)


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    found = 0
    without = set()
    for module, call, name in calls():
        root, _, function = name.rpartition(".")
        if root.split(".")[0] == "torch" and function in MADE_BY:
            found += 1
            if not any(keyword.arg == "device" for keyword in call.keywords):
                without.add((module, ast.unparse(call)))
    assert found > 20
    assert not without


def test_what_makes_tensors_implicitly_is_called_in_one_place() -> None:
    for module, _, name in calls():
        function = name.rpartition(".")[2]
        assert module in IMPLICIT.get(function, {module}), f"{module} calls {function}"


def test_functions_of_torch_are_called_by_their_full_names() -> None:
    """Otherwise the first test would not see them."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                assert not MADE_BY & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Import):
                assert not any(alias.asname and alias.name == "torch" for alias in node.names), path
