"""The cache's bookkeeping: entries, the budget, pins, and policies that choose victims.

Needs no torch, starts no threads and takes no locks; the store holds its lock while it calls in.
"""

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.arena_size import NoPagesError
from gpucache_pipes.cache.cache import LAYOUT_SHIFT, Cache
from gpucache_pipes.cache.check import check_cache
from gpucache_pipes.cache.entry import NOT_READY, SCATTERED, Entry, State
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.policies import Policy, make_policy, register
from gpucache_pipes.cache.simulation import Served, Simulation, Trace, simulate

Future = AccessPlan
"""The former name of AccessPlan."""

__all__ = [
    "LAYOUT_SHIFT",
    "NOT_READY",
    "SCATTERED",
    "AccessPlan",
    "Cache",
    "Entry",
    "Future",
    "Ledger",
    "NoPagesError",
    "Policy",
    "Served",
    "Simulation",
    "State",
    "Trace",
    "check_cache",
    "make_policy",
    "register",
    "simulate",
]
