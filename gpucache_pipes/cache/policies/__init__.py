"""Policies decide what is evicted. One file each; `register` adds more."""

from gpucache_pipes.cache.policies.base import BasePolicy, Key, Policy, make_policy, register
from gpucache_pipes.cache.policies.clairvoyant import Clairvoyant
from gpucache_pipes.cache.policies.fifo import FIFO
from gpucache_pipes.cache.policies.keep import Keep
from gpucache_pipes.cache.policies.lru import LRU

register("clairvoyant", Clairvoyant)
register("fifo", FIFO)
register("keep", Keep)
register("lru", LRU)

__all__ = [
    "FIFO",
    "LRU",
    "BasePolicy",
    "Clairvoyant",
    "Keep",
    "Key",
    "Policy",
    "make_policy",
    "register",
]
