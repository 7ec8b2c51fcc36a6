"""PipelineIdentity: what makes two pipelines over one source the same pipeline."""

import weakref
from typing import Any


class PipelineIdentity:
    """A hashable key that stands for one object, by identity, also after it was collected.

    `id(source)` cannot do this: once the object is collected, a new one may get the same id, and
    would inherit what the policy knows of the old one. The object itself cannot do it either:
    sources need not be hashable, may compare equal without being the same, and would be kept
    alive by every table that has them for a key. So this holds a weak reference, and compares
    what that refers to. Lists, tuples, dicts and ranges have no weak references: they are held,
    and live as long as the identity.

    Identities are equal if they were made of the same object. This holds after its end, too: a
    pipeline takes back its announcement when it is collected, which is often together with its
    source, and must then find what an earlier pipeline over that source is filed under. It
    follows from CPython, where an object has one weak reference without a callback, which all
    callers of `weakref.ref` share for as long as any of them holds it. Elsewhere identities of a
    dead object would equal themselves only, and such an announcement would stay until the policy
    notices that it is wrong.

    Hashing and comparing call nothing of the source, take no lock, and may happen in any thread
    and in finalizers.

    Args:
        source: any object.

    >>> batches = [["a.pt", "b.pt"]]
    >>> PipelineIdentity(batches) == PipelineIdentity(batches)
    True
    >>> PipelineIdentity(batches) == PipelineIdentity([["a.pt", "b.pt"]])
    False
    """

    __slots__ = ("_hash", "_held", "_reference")

    def __init__(self, source: Any) -> None:
        self._hash = hash(id(source))
        self._held: Any = None
        self._reference: weakref.ref[Any] | None = None
        try:
            self._reference = weakref.ref(source)
        except TypeError:
            self._held = source

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PipelineIdentity):
            return NotImplemented
        mine, theirs = self._reference, other._reference
        if mine is None or theirs is None:
            return mine is theirs and self._held is other._held
        if mine is theirs:
            return True
        source = mine()
        return source is not None and source is theirs()

    def __repr__(self) -> str:
        source = self._held if self._reference is None else self._reference()
        return f"PipelineIdentity({'collected' if source is None else type(source).__name__})"
