"""The short version of tests/soak.py."""

from pathlib import Path

from soak import CONSUMERS, Soak


def test_a_short_soak(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=1)
    soak.run(lambda operations: operations < 60, patience=100)
    assert min(soak.progress) == 60 and len(soak.progress) == CONSUMERS
    assert soak.counts["batches served"] > 100 and soak.counts["faults injected"]
