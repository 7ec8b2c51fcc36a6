"""Which files of a group are cached, and what is evicted for them."""

from typing import TYPE_CHECKING

from gpucache_pipes.cache.entries import LAYOUT_SHIFT
from gpucache_pipes.cache.states import CACHED
from gpucache_pipes.errors import PolicyError

if TYPE_CHECKING:
    from gpucache_pipes.cache.cache import Cache


class Admission:
    """Decides for one file after another, and changes nothing but the policy.

    The policy is told of each victim at once, as it expects. The caller evicts all victims
    together, whatever is raised here.

    Args:
        owner: the cache.

    Attributes:
        victims: the entries to evict, each once.
    """

    def __init__(self, owner: "Cache") -> None:
        self.victims: dict[int, None] = {}
        self._owner = owner
        # What is to come to the cache, less the victims.
        self._items = self._pages = self._charge = 0

    def admit(self, number: int, layout: int, evict: bool) -> bool:
        """Whether the entry is to be cached. Without `evict` nothing is evicted for it.

        Raises what the policy raises, and RuntimeError for a victim that is not cached.
        """
        table = self._owner.layouts
        pages, charge = table.pages.item(layout), table.charge.item(layout)
        if not self._fits(1, pages, charge):
            if not evict or not self._owner.ledger.could_fit(pages, charge):
                return False
            if not self._make_room(number, pages, charge):
                return False
        self._add(1, pages, charge)
        return True

    def _fits(self, items: int, pages: int, charge: int) -> bool:
        return self._owner.ledger.fits(
            self._pages + pages, self._charge + charge, self._items + items
        )

    def _add(self, items: int, pages: int, charge: int) -> None:
        self._items += items
        self._pages += pages
        self._charge += charge

    def _make_room(self, number: int, pages: int, charge: int) -> bool:
        """Choose victims until there is room, or none and return False."""
        try:
            return self._ask_policy(number, pages, charge)
        except MemoryError:
            raise
        except Exception as error:
            policy = self._owner.policy
            raise PolicyError(
                f"the policy {policy!r} has failed: {type(error).__name__}: {error}"
            ) from error

    def _ask_policy(self, number: int, pages: int, charge: int) -> bool:
        owner, entries = self._owner, self._owner.entries
        table, pinned = owner.layouts, owner.pins.numbers()
        chosen: dict[int, None] = {}
        before = self._items, self._pages, self._charge
        owner.log.report()
        for key in owner.policy.victims(entries.file(number)):
            victim = entries.latest(key)
            if entries.state.item(victim) != CACHED or victim in self.victims:
                path = entries.paths[victim]
                raise RuntimeError(f"it would evict {path!r}, which is not cached")
            if victim in pinned or victim in chosen:
                continue
            chosen[victim] = None
            place = entries.place.item(victim)
            layout = (place if place >= 0 else ~place) >> LAYOUT_SHIFT
            self._add(-1, -table.pages.item(layout), -table.charge.item(layout))
            if self._fits(1, pages, charge):
                break
        else:
            self._items, self._pages, self._charge = before
            return False
        for victim in chosen:
            self.victims[victim] = None
            owner.policy.on_remove(entries.file(victim))
        return True
