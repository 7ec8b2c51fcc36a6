"""For tests of your own: strategies for features, a model cache, a contract for policies.

Needs hypothesis, which the package itself does not: `pip install hypothesis`.
"""

from gpucache_pipes.testing.features import assert_same, features
from gpucache_pipes.testing.policies import PolicyContract, simulate_policy

__all__ = ["PolicyContract", "assert_same", "features", "simulate_policy"]
