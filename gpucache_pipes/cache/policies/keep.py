"""Never evict."""

from collections.abc import Iterator

from gpucache_pipes.cache.policies.base import BasePolicy, Key


class Keep(BasePolicy):
    """Never evicts: a key stays cached until it is released.

    Over epochs that touch each file once this serves capacity/files of all requests, and no
    policy can serve more. It never adapts: once the working set has moved, it has no hits.
    """

    def on_insert(self, key: Key) -> None:
        """See Policy."""

    def on_remove(self, key: Key) -> None:
        """See Policy."""

    def victims(self, key: Key) -> Iterator[Key]:
        """See Policy."""
        return iter(())
