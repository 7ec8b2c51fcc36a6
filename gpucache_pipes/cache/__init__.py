"""Bookkeeping without torch, threads or locks: what is held, by whom, and what goes next."""

from gpucache_pipes.cache.cache import LAYOUT_SHIFT, Cache
from gpucache_pipes.cache.entry import Entry, State
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.policies import Policy, make_policy, register

__all__ = ["LAYOUT_SHIFT", "Cache", "Entry", "Ledger", "Policy", "State", "make_policy", "register"]
