"""Support for policies that were written when two methods of Policy had other names."""

from typing import Any

FORMER_NAMES = {"announce": "foresee", "retract": "forget"}
"""The former name by the present one."""

_OTHERS = ("on_access", "on_insert", "on_remove", "victims", "begin_epoch")


class RenamedMethods:
    """The methods of `policy` under their present names; what it lacks is missing here, too."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        for name in (*FORMER_NAMES, *_OTHERS):
            former = FORMER_NAMES.get(name, name)
            defined = former if _distance(policy, former) < _distance(policy, name) else name
            if hasattr(policy, defined):
                setattr(self, name, getattr(policy, defined))

    def __repr__(self) -> str:
        return repr(self._policy)


def with_present_names(policy: Any) -> Any:
    """`policy` itself, or an adapter if its class knows only the former names.

    The most derived class decides. A class that defines `announce` or `retract` may have a method
    `forget` for a purpose of its own. A subclass of a policy that defines `announce` may still
    override `foresee`, as it did before.
    """
    present = min(_distance(policy, name) for name in FORMER_NAMES)
    former = min(_distance(policy, name) for name in FORMER_NAMES.values())
    return RenamedMethods(policy) if former < present else policy


def _distance(policy: Any, name: str) -> int:
    """How far up its classes, in order of lookup, the attribute is defined; the object comes last.

    The `__dict__` of an object is not looked at unless no class has the name: CPython makes that
    dict when it is first asked for, and from then on attributes of the object take longer. The hits
    of a policy took half as long again.
    """
    classes = type(policy).__mro__
    found = next((at for at, scope in enumerate(classes) if name in vars(scope)), None)
    if found is None:
        found = len(classes) if hasattr(policy, name) else len(classes) + 1
    return found
