"""warm()."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpucache_pipes import FeatureLoadError, GPUFeatureStore

Files = Callable[..., list[str]]


def test_warm(
    make_files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_files(300)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with GPUFeatureStore("cpu") as store:
        assert store.warm(paths) == 300
        assert "warming" in capsys.readouterr().err
        assert store.stats().hits == store.stats().misses == 0
        store.get_batch(paths)
        assert store.stats().hit_rate == 1.0
    with GPUFeatureStore("cpu", max_cache_items=20, policy="lru") as store:
        assert store.warm(paths, progress=False) == 20
    assert not capsys.readouterr().err


def test_warm_reports_the_first_bad_file(make_files: Files) -> None:
    paths = make_files(3)
    Path(paths[1]).write_bytes(b"")
    with GPUFeatureStore("cpu") as store, pytest.raises(FeatureLoadError, match=r"0001\.pt"):
        store.warm(paths, progress=False)


def test_warm_evicts_nothing_and_reads_little_in_vain(make_files: Files) -> None:
    paths = make_files(1500)
    with GPUFeatureStore("cpu", max_cache_bytes=40 * 100 + 39, policy="lru") as store:
        assert store.warm(paths, progress=False) == 100
        stats = store.stats()
        assert (stats.evictions, stats.files_read, stats.bypassed_items) == (0, 100, 0)
        assert store.warm(paths, progress=False) == 100
