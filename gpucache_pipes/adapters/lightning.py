"""GPUCacheCallback: logs the statistics of a store through a Lightning Trainer.

Loaders work without it: a LightningDataModule may return a GPUCachedPathDataLoader or a torchdata
Loader as it is.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gpucache_pipes.store import GPUFeatureStore, StoreStats

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        import lightning.pytorch as pl
    except ImportError:
        try:
            import pytorch_lightning as pl
        except ImportError as error:
            raise ImportError("GPUCacheCallback needs Lightning: pip install lightning") from error


class GPUCacheCallback(pl.Callback):
    """Logs, at the end of each epoch, statistics of `store` over this epoch.

        Trainer(callbacks=[GPUCacheCallback(store)], use_distributed_sampler=False)
        Trainer(callbacks=[GPUCacheCallback(lambda: datamodule.store)], ...)

    An epoch of training includes the validation within it; `Trainer.validate` and `Trainer.test`
    are logged by themselves. The metrics:

    - `<prefix>/hit_rate`: share of requested features that were on the device, 0 to 1;
    - `<prefix>/cached_bytes`: bytes of features on the device at the end of the epoch;
    - `<prefix>/wait_seconds`: time that consumers waited for files;
    - `<prefix>/bytes_read`: bytes read from storage.

    With several ranks they are means over all ranks. Warns once if the store is on another device
    than the Trainer of this process.

    Args:
        store: the store that the loaders share; or a function that returns it, if it is made only
            after the Trainer has chosen the device of this process.
        prefix: the names of the metrics begin with it.

    Raises:
        TypeError: for anything else, or if the function returns anything else.
    """

    def __init__(
        self, store: GPUFeatureStore | Callable[[], GPUFeatureStore], prefix: str = "cache"
    ) -> None:
        super().__init__()
        if not isinstance(store, GPUFeatureStore) and not callable(store):
            raise TypeError(
                f"store must be a GPUFeatureStore, or a function that returns it, such as lambda: "
                f"datamodule.store; not {type(store).__name__}"
            )
        self.store = store
        self.prefix = prefix
        self._before: StoreStats | None = None
        self._compared = False

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Warn of options of the Trainer that replace samplers, which has no effect here."""
        if getattr(trainer, "overfit_batches", 0):
            warnings.warn(
                "Trainer(overfit_batches=...) cannot turn off shuffling in a "
                "GPUCachedPathDataLoader or in nodes: use PathLister(..., shuffle=False) and "
                "limit_train_batches=...",
                stacklevel=2,
            )
        connector = getattr(trainer, "_accelerator_connector", None)
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            warnings.warn(
                "Trainer(use_distributed_sampler=True) has no effect on a GPUCachedPathDataLoader "
                "or on nodes: set it to False, and let a PathLister or your own DistributedSampler "
                "give each rank its part",
                stacklevel=2,
            )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin to count; an epoch that is resumed has no start of its own."""
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin to count."""
        self._begin(trainer)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log the epoch of training."""
        self._log(pl_module)

    def on_validation_epoch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> None:
        """Begin to count, in `Trainer.validate`."""
        if trainer.state.fn == "validate":
            self._begin(trainer)

    def on_validation_epoch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> None:
        """Log `Trainer.validate`; validation within an epoch of training is logged with that."""
        if trainer.state.fn == "validate":
            self._log(pl_module)

    def on_test_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Begin to count."""
        self._begin(trainer)

    def on_test_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Log `Trainer.test`."""
        self._log(pl_module)

    def _begin(self, trainer: "pl.Trainer") -> None:
        """Begin to count. Compares the devices here: before, the store may not be made yet."""
        store = self._find_store()
        self._before = store.stats()
        if self._compared:
            return
        self._compared = True
        device = trainer.strategy.root_device
        if not _is_same(store.device, device):
            warnings.warn(
                f"the store is on {store.device}, but the Trainer of this process is on {device}: "
                "every batch will be copied from one to the other. Make the store with "
                "GPUFeatureStore(trainer.strategy.root_device)",
                stacklevel=3,
            )

    def _log(self, module: Any) -> None:
        assert self._before is not None
        done = self._find_store().stats().since(self._before)
        if not done.hits + done.misses:
            warnings.warn(
                "the store of GPUCacheCallback had no requests in this epoch: is it the one that "
                "the loaders use?",
                stacklevel=3,
            )
        values = {
            "hit_rate": done.hit_rate,
            "cached_bytes": float(done.cached_bytes),
            "wait_seconds": done.wait_seconds,
            "bytes_read": float(done.bytes_read),
        }
        metrics = {f"{self.prefix}/{name}": value for name, value in values.items()}
        module.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True)

    def _find_store(self) -> GPUFeatureStore:
        store = self.store if isinstance(self.store, GPUFeatureStore) else self.store()
        if not isinstance(store, GPUFeatureStore):
            raise TypeError(
                f"the function of GPUCacheCallback returned {type(store).__name__}, not a "
                "GPUFeatureStore: is it made in setup()?"
            )
        return store


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are the same, as far as they are known."""
    if one.type != other.type or one.type == "cpu":
        return one.type == other.type
    return None in (one.index, other.index) or one.index == other.index
