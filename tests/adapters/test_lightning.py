"""Lightning's Trainer, for real, over one shared store."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from gpucache_pipes import (
    FeaturePathDataset,
    GPUCachedPathDataLoader,
    GPUFeatureStore,
    PathLister,
)

pytest.importorskip("lightning.pytorch", reason="needs Lightning: pip install lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from gpucache_pipes.adapters.lightning import GPUCacheCallback

ROOT = Path(__file__).parents[2]
Files = Callable[..., list[str]]
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own


class Recorder(pl.LightningModule):
    """Trains a linear layer, and records the batches that it gets."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.stop_after = stop_after
        self.seen: dict[str, list[list[int]]] = {"train": [], "validate": [], "test": []}
        self.given: list[torch.Tensor] = []

    def note(self, stage: str, batch: Any) -> Any:
        self.seen[stage].append(batch["label"].flatten().tolist())
        self.given.append(batch["feature"])
        return self.layer(batch["feature"]).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.stop_after is not None and len(self.seen["train"]) == self.stop_after:
            raise KeyboardInterrupt
        return self.note("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("validate", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Data(pl.LightningDataModule):
    def __init__(self, paths: list[str], store: GPUFeatureStore, kind: str = "node") -> None:
        super().__init__()
        self.paths, self.store, self.kind = paths, store, kind
        self.yielded: list[torch.Tensor] = []

    def loader(self, start: int, end: int, shuffle: bool = False) -> Any:
        paths = self.paths[start:end]
        inner: Any
        if self.kind == "node":
            inner = PathLister(paths, batch_size=3, shuffle=shuffle)
        else:
            torch.manual_seed(0)
            dataset = FeaturePathDataset(paths)
            inner = StatefulDataLoader(dataset, batch_size=3, shuffle=shuffle)
        return GPUCachedPathDataLoader(inner, store=self.store, build_batch_fn=self.note)

    def note(self, batch: Any, original: Any, paths: Any) -> Any:
        self.yielded.append(batch["feature"])
        return batch

    def train_dataloader(self) -> Any:
        return self.loader(0, 12, shuffle=True)

    def val_dataloader(self) -> Any:
        return self.loader(12, 18)

    def test_dataloader(self) -> Any:
        return self.loader(15, 21)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(options.get("callbacks")),
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**settings, **options})


def test_fit_validate_and_test_over_one_store(make_files: Files, tmp_path: Path) -> None:
    paths = make_files(21)
    model = Recorder()
    with GPUFeatureStore("cpu") as store:
        data = Data(paths, store)
        callback = GPUCacheCallback(store)
        logger = CSVLogger(tmp_path)
        runner = trainer(tmp_path, max_epochs=2, callbacks=[callback], logger=logger)
        runner.fit(model, datamodule=data)
        assert runner.callback_metrics["cache/hit_rate"] == 1
        assert runner.callback_metrics["cache/cached_bytes"] == store.stats().cached_bytes
        runner.validate(model, datamodule=data, verbose=False)
        assert runner.callback_metrics["cache/hit_rate"] == 1
        [tested] = runner.test(model, datamodule=data, verbose=False)
        assert tested["cache/hit_rate"] == 0.5 and tested["cache/bytes_read"] > 0
        assert store.stats().files_read == 21
    epochs = [[*chain.from_iterable(model.seen["train"][i : i + 4])] for i in (0, 4)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert model.seen["validate"][-2:] == [[12, 13, 14], [15, 16, 17]]
    assert model.seen["test"] == [[15, 16, 17], [18, 19, 20]]
    # Lightning did not move the tensors, which are on the device already.
    assert len(model.given) == len(data.yielded)
    assert all(a is b for a, b in zip(model.given, data.yielded, strict=True))
    [log] = Path(logger.log_dir).glob("metrics.csv")
    header, *rows = log.read_text().splitlines()
    rates = [row.split(",")[header.split(",").index("cache/hit_rate")] for row in rows]
    # Two epochs, validate, test. The sanity check had read the files for validation.
    assert [float(rate) for rate in rates if rate] == [pytest.approx(6 / 18), 1, 1, 0.5]


# At the last batch of an epoch, Lightning 2.6 goes wrong with a StatefulDataLoader, wrapped or not.
@pytest.mark.parametrize(
    ("kind", "after"), [("node", n) for n in range(1, 12)] + [("stateful", n) for n in (2, 5, 11)]
)
def test_resuming_within_an_epoch(make_files: Files, tmp_path: Path, kind: str, after: int) -> None:
    paths = make_files(21)
    options: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 0}

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    with GPUFeatureStore("cpu") as store:
        whole = Recorder()
        trainer(tmp_path, **options, callbacks=[checkpoint()]).fit(
            whole, datamodule=Data(paths, store, kind)
        )
        resumed = Recorder()
        trainer(tmp_path, **options).fit(
            resumed, datamodule=Data(paths, store, kind), ckpt_path=tmp_path / f"step={after}.ckpt"
        )
    assert len(whole.seen["train"]) == 12
    rest = whole.seen["train"][after:]
    if kind == "node":
        assert resumed.seen["train"] == rest
    else:
        # The rest of that epoch; a sampler that draws from torch draws anew for the following one.
        left = -after % 4
        assert resumed.seen["train"][:left] == rest[:left]
        assert len(resumed.seen["train"]) == len(rest)


TWO_RANKS = """
import os, sys, warnings
sys.path.insert(0, sys.argv[1])
from test_lightning import *
def tell(message, *rest, **options):
    with open(Path(sys.argv[2], "told." + os.environ["RANK"]), "a") as file:
        print(message, file=file)
warnings.showwarning = tell
data = Data(sys.argv[3:], GPUFeatureStore("cpu"))
runner = trainer(Path(sys.argv[2]), max_epochs=1, devices=2, strategy="ddp", num_sanity_val_steps=0,
    callbacks=[GPUCacheCallback(lambda: data.store)], enable_checkpointing=False)
model = Recorder()
runner.fit(model, datamodule=data)
seen = sorted(chain.from_iterable(model.seen["train"]))
Path(sys.argv[2], f"seen.{runner.global_rank}").write_text(repr(seen))
loader = StatefulDataLoader(FeaturePathDataset(sys.argv[3:]))
GPUCachedPathDataLoader(loader, store=data.store)
data.store.close()
"""


def test_two_ranks_have_a_part_each_and_are_told_about_samplers(
    make_files: Files, tmp_path: Path
) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python"),
            *(sys.executable, "-c", TWO_RANKS, str(Path(__file__).parent), str(tmp_path)),
            *make_files(21),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    # Not by way of stdout and stderr, where two ranks may write into each other's lines.
    parts = [eval(file.read_text()) for file in tmp_path.glob("seen.*")]
    assert len(parts) == 2 and sorted(chain.from_iterable(parts)) == list(range(12))
    warned = [file.read_text() for file in tmp_path.glob("told.*")]
    assert len(warned) == 2
    for told in warned:
        assert "Trainer(use_distributed_sampler=True) has no effect" in told
        assert "each of the 2 ranks may read all files of this DataLoader" in told


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_resuming_where_lightning_ends_epochs_early(
    make_files: Files, tmp_path: Path, after: int
) -> None:
    paths = make_files(21)
    options: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 2}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with GPUFeatureStore("cpu") as store:
        whole, resumed = Recorder(), Recorder()
        trainer(tmp_path, **options, callbacks=[keep]).fit(whole, datamodule=Data(paths, store))
        trainer(tmp_path, **options).fit(
            resumed, datamodule=Data(paths, store), ckpt_path=tmp_path / f"step={after}.ckpt"
        )
    assert len(whole.seen["train"]) == 6
    assert resumed.seen["train"] == whole.seen["train"][after:]


EARLY = """
import sys
sys.path.insert(0, sys.argv[1])
from test_lightning import *
paths = sys.argv[3:]
store = GPUFeatureStore("cpu")
# Before it is known that there are ranks.
loader = GPUCachedPathDataLoader(PathLister(paths, batch_size=3, shuffle=True), store=store)
model = Recorder()
runner = trainer(Path(sys.argv[2]), max_epochs=1, devices=2, strategy="ddp",
    use_distributed_sampler=False, enable_checkpointing=False)
runner.fit(model, loader)
seen = sorted(chain.from_iterable(model.seen["train"]))
Path(sys.argv[2], f"seen.{runner.global_rank}").write_text(repr(seen))
assert len(loader) == 2
store.close()
"""


def test_a_lister_that_is_made_before_the_ranks_are_known(
    make_files: Files, tmp_path: Path
) -> None:
    script = tmp_path / "early.py"  # which Lightning starts once more
    script.write_text(EARLY)
    run = subprocess.run(
        [sys.executable, script, str(Path(__file__).parent), str(tmp_path), *make_files(12)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    parts = [eval(file.read_text()) for file in tmp_path.glob("seen.*")]
    assert len(parts) == 2 and sorted(chain.from_iterable(parts)) == list(range(12))


def test_what_the_callback_says_of_overfitting(tmp_path: Path) -> None:
    with GPUFeatureStore("cpu") as store:
        runner = trainer(tmp_path, overfit_batches=2)
        with pytest.warns(UserWarning, match="overfit_batches"):
            GPUCacheCallback(store).setup(runner, Recorder(), "fit")


HOOKS = {
    "fit": ["on_train_start", "on_train_epoch_start"],
    "validate": ["on_validation_epoch_start"],
    "test": ["on_test_epoch_start"],
}


def begin(store: GPUFeatureStore, stage: str, root_device: torch.device) -> list[str]:
    """The warnings of a callback in two runs of one stage, on a Trainer of that device."""
    runner: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=root_device), state=SimpleNamespace(fn=stage)
    )
    callback = GPUCacheCallback(lambda: store)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for hook in HOOKS[stage] * 2:
            getattr(callback, hook)(runner, Recorder())
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_store_on_another_device_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with GPUFeatureStore("cpu") as store:
        assert not begin(store, stage, torch.device("cpu"))
        [said] = begin(store, stage, torch.device("cuda", 1))
        assert "on cpu" in said and "on cuda:1" in said and "root_device" in said
        monkeypatch.setattr(GPUFeatureStore, "device", torch.device("cuda", 0))
        assert begin(store, stage, torch.device("cuda", 1))
        assert not begin(store, stage, torch.device("cuda", 0))
        assert not begin(store, stage, torch.device("cuda"))


def test_the_example(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "lightning_datamodule.py")
    options = ["--synthetic", "--epochs", "2", "--runs", str(tmp_path / "runs")]
    command = [sys.executable, script, str(tmp_path / "features"), *options]
    for more in ([], ["--resume", str(tmp_path / "runs" / "last.ckpt"), "--epochs", "3"]):
        run = subprocess.run([*command, *more], capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stderr
        # Resumed, the one epoch that is left reads its files.
        assert f"hit rate, last epoch      {'0.0%' if more else '100.0%'}" in run.stdout
        accuracy = run.stdout.partition("test accuracy ")[2].split()[0]
        assert float(accuracy) > 0.9


def test_the_example_with_one_cache_for_two_ranks(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "lightning_datamodule.py")
    options = ["--synthetic", "--epochs", "2", "--runs", str(tmp_path / "runs")]
    command = [sys.executable, script, str(tmp_path / "features"), *options]
    run = subprocess.run(
        [*command, "--share-caches", "--devices", "2"], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    # Without it each rank would find half of its files in its cache.
    assert "hit rate, last epoch      100.0%" in run.stdout


def test_what_is_no_store_for_the_callback() -> None:
    for wrong in (None, 3):
        with pytest.raises(TypeError, match="a function that returns it, such as lambda"):
            GPUCacheCallback(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"returned NoneType, not a GPUFeatureStore: .* setup"):
        GPUCacheCallback(lambda: None)._find_store()  # type: ignore[arg-type,return-value]
