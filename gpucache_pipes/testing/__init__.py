"""Helpers for your own tests: random features, contracts, a simulated device.

A contract is a class of tests for pytest. To test a policy, a source, a file format or a backend of
your own, inherit `PolicyContract`, `SourceContract`, `FormatContract` or `BackendContract`.

Needs hypothesis, which the package itself does not: `pip install hypothesis`.
"""

from gpucache_pipes.testing.backends import BackendContract
from gpucache_pipes.testing.features import assert_same, features
from gpucache_pipes.testing.formats import FormatContract
from gpucache_pipes.testing.ordering import UnorderedAccessError
from gpucache_pipes.testing.policies import PolicyContract, simulate_policy
from gpucache_pipes.testing.simulated import SimulatedRuntime
from gpucache_pipes.testing.simulated_memory import WrongDeviceError
from gpucache_pipes.testing.sources import SourceContract

__all__ = [
    "BackendContract",
    "FormatContract",
    "PolicyContract",
    "SimulatedRuntime",
    "SourceContract",
    "UnorderedAccessError",
    "WrongDeviceError",
    "assert_same",
    "features",
    "simulate_policy",
]
