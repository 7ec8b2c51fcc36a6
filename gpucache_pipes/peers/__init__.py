"""The caches of several ranks as one: who owns which file, and what ranks send each other.

Knows torch.distributed. Whatever is sent, and when, follows from arithmetic that all ranks do
alike.
"""

from gpucache_pipes.peers.agreement import ENDS, FAILS, GOES_ON, agree, error_of_all
from gpucache_pipes.peers.arrival import Arrival
from gpucache_pipes.peers.exchange import Exchange
from gpucache_pipes.peers.group import NO_GROUP, NoGroup, PeerGroup
from gpucache_pipes.peers.message import Contents
from gpucache_pipes.peers.schedule import Owners, Positions, Schedule

__all__ = [
    "ENDS",
    "FAILS",
    "GOES_ON",
    "NO_GROUP",
    "Arrival",
    "Contents",
    "Exchange",
    "NoGroup",
    "Owners",
    "PeerGroup",
    "Positions",
    "Schedule",
    "agree",
    "error_of_all",
]
