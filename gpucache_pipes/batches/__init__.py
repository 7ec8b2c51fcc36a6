"""Batches of features: sequences of them, and the tensors they are collated to."""

from gpucache_pipes.batches.feature_batch import FeatureBatch, first_device, to_device
from gpucache_pipes.batches.ragged import MODES, Padded, RaggedOptions

__all__ = ["MODES", "FeatureBatch", "Padded", "RaggedOptions", "first_device", "to_device"]
