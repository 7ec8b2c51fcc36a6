"""Fixtures for the tests of this folder, as a plugin: see servers.py."""

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from remote.servers import Proxy, SeaweedFS, options

_numbers = itertools.count()


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A server that all tests share; those that kill it have one of their own."""
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    try:
        server = SeaweedFS(tmp_path_factory.mktemp("weed"))
    except RuntimeError as error:
        pytest.skip(str(error))
    yield server
    server.kill()


@pytest.fixture
def proxy(weed: SeaweedFS) -> Iterator[Proxy]:
    proxy = Proxy(weed.port)
    yield proxy
    proxy.close()


@pytest.fixture
def remote(proxy: Proxy) -> dict[str, Any]:
    """storage_options for the proxy, with short pauses."""
    from datetime import timedelta

    return {
        **options(proxy.port),
        "retry_config": {
            "max_retries": 4,
            "retry_timeout": timedelta(seconds=20),
            "backoff": {
                "init_backoff": timedelta(milliseconds=10),
                "max_backoff": timedelta(milliseconds=50),
                "base": 2,
            },
        },
    }


@pytest.fixture
def put(weed: SeaweedFS) -> Callable[..., str]:
    """`put(name, feature)` saves a feature and returns its URL; all below one prefix.

    `put(name, raw=...)` saves bytes as they are.
    """
    import obstore
    from obstore.store import S3Store

    store = S3Store("tests", **options(weed.port))
    prefix = f"t{next(_numbers)}"

    def put(name: str, feature: Any = None, raw: bytes | None = None) -> str:
        buffer = io.BytesIO()
        torch.save(feature, buffer)
        obstore.put(store, f"{prefix}/{name}", buffer.getvalue() if raw is None else raw)
        return f"s3://tests/{prefix}/{name}"

    return put
