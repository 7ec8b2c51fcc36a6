"""Eviction policies, one module each. `register` adds a policy under a name."""

from gpucache_pipes.cache.policies.base import BasePolicy, Key, Policy, make_policy, register
from gpucache_pipes.cache.policies.clairvoyant import Clairvoyant
from gpucache_pipes.cache.policies.fifo import FIFO
from gpucache_pipes.cache.policies.keep import Keep
from gpucache_pipes.cache.policies.lfu import LFU
from gpucache_pipes.cache.policies.lru import LRU
from gpucache_pipes.cache.policies.s3fifo import S3FIFO
from gpucache_pipes.cache.policies.sieve import Sieve
from gpucache_pipes.cache.policies.wtinylfu import WTinyLFU

register("clairvoyant", Clairvoyant)
register("fifo", FIFO)
register("keep", Keep)
register("lfu", LFU)
register("lru", LRU)
register("s3fifo", S3FIFO)
register("sieve", Sieve)
register("w-tinylfu", WTinyLFU)

__all__ = [
    "FIFO",
    "LFU",
    "LRU",
    "S3FIFO",
    "BasePolicy",
    "Clairvoyant",
    "Keep",
    "Key",
    "Policy",
    "Sieve",
    "WTinyLFU",
    "make_policy",
    "register",
]
