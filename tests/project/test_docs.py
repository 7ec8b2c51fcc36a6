"""Every Python block of README and docs runs as printed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- needs: (\w+) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A block of code, and the library that it needs, if the package does not."""


# As torchrun tells a process that is the only one; MASTER_PORT 0 is a free one.
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}

NEEDS = {"lightning.md": "lightning"}
"""Pages whose blocks need an extra."""


def need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def blocks(page: Path) -> list[str]:
    """The code of a page that can run here."""
    found = BLOCK.findall(page.read_text())
    return [code for library, code in found if not library or importlib.util.find_spec(library)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_runs_as_printed(page: Path, tmp_path: Path) -> None:
    need(NEEDS.get(page.name, "torch"))
    (tmp_path / "features").mkdir()
    for number in range(20):
        feature = {"feature": torch.randn(8), "label": torch.tensor(number)}
        torch.save(feature, tmp_path / "features" / f"{number}.pt")
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page)))
    # torchdata's StatefulDataLoader calls what torch has deprecated. Warnings of the libraries that
    # recipes are for are theirs.
    strict = ["-W", "error", "-W", "ignore:'set_vital' is deprecated"]
    run = subprocess.run(
        [sys.executable, *(strict if page.name != "recipes.md" else []), script],
        env={**os.environ, "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", **ALONE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_shows_the_examples_there_are() -> None:
    text = (ROOT / "README.md").read_text()
    for example in sorted((ROOT / "examples").glob("*.py")):
        assert f"examples/{example.name}" in text


def run_example(*arguments: object) -> str:
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_digits(tmp_path: Path) -> None:
    need("sklearn")
    said = run_example("examples/digits.py", "--epochs", 8, "--directory", tmp_path / "digits")
    accuracy = re.search(r"test accuracy +([\d.]+)", said)
    assert accuracy and float(accuracy[1]) >= 0.95  # 0.97 after the 20 epochs of the demo
    assert "files read         1797" in said


def test_train_with_gpu_cache(tmp_path: Path) -> None:
    script = "examples/train_with_gpu_cache.py"
    options = ["--epochs", 2, "--num-samples", 300, "--feature-dim", 64, "--batch-size", 50]
    said = run_example(script, tmp_path / "new", "--synthetic", *options, "--num-workers", 2)
    assert "epoch 1" in said and "hit rate 100.0%" in said
    half = ["--max-cache-items", 150, "--max-cache-bytes", "1MiB", "--prefetch-batches", 1]
    assert "epoch 1" in run_example(script, tmp_path / "new", *options, *half)


def test_iter_datapipes(tmp_path: Path) -> None:
    said = run_example("examples/iter_datapipes.py", "--epochs", 2)
    assert "epoch 0: 1000 samples" in said and "epoch 1: 1000 samples" in said
    assert "100% from memory" in said.splitlines()[1]


def test_profile_pipeline(tmp_path: Path) -> None:
    for number in range(50):
        feature = {"feature": torch.randn(64), "label": torch.tensor(number)}
        torch.save(feature, tmp_path / f"{number}.pt")
    trace = tmp_path / "trace.json"
    said = run_example("examples/profile_pipeline.py", tmp_path, trace, "--batch-size", 10)
    assert "perfetto" in said
    events = json.loads(trace.read_text())["traceEvents"]
    threads = {event["name"]: event["tid"] for event in events if event.get("ph") == "X"}
    assert threads["gpucache::read"] == threads["gpucache::upload"]
    assert threads["gpucache::gather"] != threads["gpucache::read"]
    picture = tmp_path / "trace.svg"
    run_example("benchmarks/draw_trace.py", trace, picture)
    assert "gpucache::gather" in picture.read_text()


def test_synthetic_overwrites_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.pt"
    torch.save({"feature": torch.zeros(4), "label": torch.tensor(0)}, mine)
    before = mine.read_bytes()
    script = str(ROOT / "examples" / "train_with_gpu_cache.py")
    command = [sys.executable, script, str(tmp_path), "--synthetic"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0 and "mine.pt" in run.stderr
    assert list(tmp_path.iterdir()) == [mine] and mine.read_bytes() == before
    empty = subprocess.run(
        [sys.executable, script, str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert empty.returncode != 0 and "--synthetic" in empty.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_pages_name_tests_that_there_are(page: Path) -> None:
    for module, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        [path] = (ROOT / "tests").rglob(module)
        content = path.read_text()
        assert not test or f"def {test}(" in content, f"{module}::{test}"


def test_a_promise_has_a_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    table = page.partition("| promise | test |")[2].partition("## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")]
    assert len(rows) > 20 and all("`test_" in row for row in rows)


def test_the_page_has_the_table_of_states() -> None:
    from gpucache_pipes.cache.states import STATES, TRANSITIONS

    page = (ROOT / "docs" / "concurrency.md").read_text()
    for state, (name, meaning) in STATES.items():
        following = [f"{STATES[b][0]}: {why}" for a, b, why in TRANSITIONS if a == state]
        assert f"| {name} | {meaning} | {'; '.join(following)} |" in page
