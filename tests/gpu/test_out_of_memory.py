"""Device memory runs out in the store and beside it, and the store goes on afterwards.

In processes of their own, which torch.cuda.set_per_process_memory_fraction limits.
"""

from pathlib import Path

import pytest
from gpu_common import run
from running_out import PLACES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("taken", [0.1, 0.5, 0.95])
def test_the_store_goes_on_after_memory_ran_out(taken: float) -> None:
    """In uploads, in gathers, where the arena grows, and in allocations of the consumer."""
    script = str(Path(__file__).with_name("running_out.py"))
    done = run(script, str(taken), timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": exact\n") == len(PLACES), done.stdout
