"""Helpers for your own tests: random features, a contract for policies, a simulated device.

Needs hypothesis, which the package itself does not: `pip install 'gpucache-pipes[testing]'`.
"""

from gpucache_pipes.testing.features import assert_same, features
from gpucache_pipes.testing.ordering import UnorderedAccessError
from gpucache_pipes.testing.policies import PolicyContract, simulate_policy
from gpucache_pipes.testing.simulated import SimulatedRuntime

__all__ = [
    "PolicyContract",
    "SimulatedRuntime",
    "UnorderedAccessError",
    "assert_same",
    "features",
    "simulate_policy",
]
