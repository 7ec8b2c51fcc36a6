"""The cache's bookkeeping: entries, the budget, pins, and policies that choose victims.

Needs no torch, starts no threads and takes no locks; the store holds its lock while it calls in.
"""

from gpucache_pipes.cache.access_plan import AccessPlan
from gpucache_pipes.cache.arena_size import NoPagesError
from gpucache_pipes.cache.cache import Cache
from gpucache_pipes.cache.check import check_cache
from gpucache_pipes.cache.entries import LAYOUT_SHIFT, NOWHERE, Numbers, distinct
from gpucache_pipes.cache.ledger import Ledger
from gpucache_pipes.cache.places import first_pages, runs_of
from gpucache_pipes.cache.policies import Policy, make_policy, register
from gpucache_pipes.cache.simulation import Served, Simulation, Trace, simulate
from gpucache_pipes.cache.states import ABSENT, LOADING, READY

Future = AccessPlan
"""The former name of AccessPlan."""

__all__ = [
    "ABSENT",
    "LAYOUT_SHIFT",
    "LOADING",
    "NOWHERE",
    "READY",
    "AccessPlan",
    "Cache",
    "Future",
    "Ledger",
    "NoPagesError",
    "Numbers",
    "Policy",
    "Served",
    "Simulation",
    "Trace",
    "check_cache",
    "distinct",
    "first_pages",
    "make_policy",
    "register",
    "runs_of",
    "simulate",
]
