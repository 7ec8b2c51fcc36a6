"""GPUCacheCallback: what a cache does, in the log of a Lightning Trainer.

Loaders need nothing of this: a LightningDataModule may return a GPUCachedPathDataLoader or a
torchdata Loader as it is.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
            raise ImportError(
                "GPUCacheCallback needs Lightning: pip install 'gpucache-pipes[lightning]'"
            ) from error


class GPUCacheCallback(pl.Callback):
    """Logs after each epoch what `store` has done in it.

        Trainer(callbacks=[GPUCacheCallback(store)], use_distributed_sampler=False)
        Trainer(callbacks=[GPUCacheCallback(lambda: datamodule.store)], ...)

    Logged through the Trainer's logger, for an epoch of training together with the validation in
    it, and for validate and test by themselves:

    - `<prefix>/hit_rate`: share of the features requested that were on the device, 0 to 1;
    - `<prefix>/cached_bytes`: bytes of features on the device at the end of the epoch;
    - `<prefix>/wait_seconds`: time that the training thread waited for files;
    - `<prefix>/bytes_read`: bytes read from storage.

    Under several ranks these are the means over all ranks.

    Args:
        store: the store that the loaders share, or a function that gives it, where it is only made
            once the Trainer has chosen the device of this process.
        prefix: what the names of the metrics begin with.
    """

    def __init__(
        self, store: GPUFeatureStore | Callable[[], GPUFeatureStore], prefix: str = "cache"
    ) -> None:
        super().__init__()
        self.store = store
        self.prefix = prefix
        self._before: StoreStats | None = None

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Say so if the Trainer is to replace samplers, which it cannot do in our loaders."""
        if getattr(trainer, "overfit_batches", 0):
            warnings.warn(
                "Trainer(overfit_batches=...) cannot turn off shuffling in our loaders: give one "
                "over PathLister(..., shuffle=False), with limit_train_batches=...",
                stacklevel=2,
            )
        connector = getattr(trainer, "_accelerator_connector", None)
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            warnings.warn(
                "Trainer(use_distributed_sampler=True) has no effect on a GPUCachedPathDataLoader "
                "or on nodes: set it to False, and let PathLister or a DistributedSampler of yours "
                "give each rank its part",
                stacklevel=2,
            )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See lightning.pytorch.Callback."""
        self._before = self._stats()  # resumed in the middle of an epoch, that one does not start

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See lightning.pytorch.Callback."""
        self._before = self._stats()

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See lightning.pytorch.Callback."""
        self._log(pl_module)

    def on_validation_epoch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> None:
        """See lightning.pytorch.Callback."""
        if trainer.state.fn == "validate":
            self._before = self._stats()

    def on_validation_epoch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule"
    ) -> None:
        """See lightning.pytorch.Callback."""
        if trainer.state.fn == "validate":
            self._log(pl_module)

    def on_test_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See lightning.pytorch.Callback."""
        self._before = self._stats()

    def on_test_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """See lightning.pytorch.Callback."""
        self._log(pl_module)

    def _log(self, module: Any) -> None:
        assert self._before is not None
        done = self._stats().since(self._before)
        values = {
            "hit_rate": done.hit_rate,
            "cached_bytes": float(done.cached_bytes),
            "wait_seconds": done.wait_seconds,
            "bytes_read": float(done.bytes_read),
        }
        metrics = {f"{self.prefix}/{name}": value for name, value in values.items()}
        module.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True)

    def _stats(self) -> StoreStats:
        store = self.store if isinstance(self.store, GPUFeatureStore) else self.store()
        return store.stats()
