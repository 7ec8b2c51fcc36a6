"""Modules under the names that they had in 0.1.0, for programs that import from them."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_PRESENT = {
    "batch": "batches",
    "bench": "cli.bench",
    "charts": "cli.charts",
    "inspection": "cli.inspect",
    "planning": "cli.plan",
    "ragged": "batches",
    "stats": "store",
    "ticket": "store",
    "upcoming": "store",
}


class FormerNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its former name, with the contents of the present one.

    A module of its own and not the present one: importing sets `__spec__`, which would then say the
    former name. Classes and functions are the same objects.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See MetaPathFinder."""
        package, _, name = fullname.rpartition(".")
        if package != __package__ or name not in _PRESENT:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """See Loader."""
        name = module.__name__.rpartition(".")[2]
        present = importlib.import_module(f"{__package__}.{_PRESENT[name]}")
        contents = {k: v for k, v in vars(present).items() if not k.startswith("__")}
        vars(module).update(contents, __doc__=f"The former name of `{present.__name__}`.")


def install() -> None:
    """Have the import system find former names, after all that it finds itself."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
