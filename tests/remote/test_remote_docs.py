"""The code of docs/remote.md runs as printed, against servers where these can run here."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote.servers import KEY, SECRET, SeaweedFS, options, serve

PAGE = Path(__file__).parents[2] / "docs" / "remote.md"
BLOCK = re.compile(r"^<!-- needs: (\w+) -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEATURES = [{"feature": torch.full((4,), float(n))} for n in range(20)]


def code(kind: str) -> str:
    blocks = [text for needs, text in BLOCK.findall(PAGE.read_text()) if needs == kind]
    assert blocks
    return "\n\n".join(blocks)


def test_s3(
    weed: SeaweedFS, put: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    endpoint = f"http://127.0.0.1:{weed.port}"
    for name, value in {
        "AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "MY_ENDPOINT": endpoint, "MY_KEY": KEY, "MY_SECRET": SECRET,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for n, feature in enumerate(FEATURES):
        url = put(f"{n}.pt", feature)
    names: dict[str, Any] = {}
    text = code("s3").replace("s3://my-bucket/features/", url.rpartition("/")[0] + "/")
    exec(text, names)
    assert sorted(names["batch"][n]["feature"][0].item() for n in range(4)) == [0, 1, 10, 11]
    assert Path("features.list").exists() and Path("feature-cache").is_dir()
    assert names["feature"]["feature"].tolist() == [0.0] * 4
    names["loader"].close()


def test_http(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    for n, feature in enumerate(FEATURES):
        torch.save(feature, tmp_path / "features" / f"{n}.pt")
    names: dict[str, Any] = {}
    with serve(tmp_path) as address:
        text = code("http_server").replace("http://files.intranet", address)
        exec(f"from gpucache_pipes import GPUCachedPathDataLoader, PathLister\n{text}", names)
    found = torch.cat(names["features"])
    assert torch.equal(found, torch.stack([feature["feature"] for feature in FEATURES]))
    names["loader"].close()


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_the_options_of_other_stores_are_known_to_the_client(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server of theirs can run here: a client is made, and nothing is asked for."""
    pytest.importorskip("obstore")
    from gpucache_pipes.files.remote.clients import open_client
    from gpucache_pipes.files.remote.urls import locate

    account = tmp_path / "account.json"
    account.write_text(
        '{"private_key": "-", "private_key_id": "-", "client_email": "-", "disable_oauth": true, '
        '"gcs_base_url": "https://localhost"}'
    )
    monkeypatch.setenv("AZURE_KEY", "a2V5")
    made = []

    def lister(url: str, batch_size: int, storage_options: dict[str, Any]) -> None:
        made.append(open_client(locate(url), storage_options))

    text = code(kind).replace("/secrets/account.json", str(account))
    exec(f"import os\n{text}", {"PathLister": lister})
    assert len(made) == 1


def test_the_options_of_the_tests_are_those_of_the_page() -> None:
    assert set(options(1)) == set(re.findall(r'^    "(\w+)":', code("s3"), re.MULTILINE))
