"""The short version of tests/attack.py: each way with a few seeds."""

import pytest
from attack import run_seed
from attacks import WAYS


@pytest.mark.filterwarnings("ignore")  # files are damaged at random
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_attack(way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda *_: None)  # of interrupts in finalizers
    assert run_seed(way, seed)["seeds"] == 1
