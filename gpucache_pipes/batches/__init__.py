"""Batches of features: sequences of them, and the tensors that they are collated to."""

from gpucache_pipes.batches.feature_batch import ColumnBatch, FeatureBatch, PageBatch
from gpucache_pipes.batches.ragged_options import MODES, Padded, RaggedOptions, key_of
from gpucache_pipes.batches.sample_batch import SampleBatch, collate_parts
from gpucache_pipes.batches.transfer import collate_on_host, first_device, to_device, upload

__all__ = [
    "MODES",
    "ColumnBatch",
    "FeatureBatch",
    "Padded",
    "PageBatch",
    "RaggedOptions",
    "SampleBatch",
    "collate_on_host",
    "collate_parts",
    "first_device",
    "key_of",
    "to_device",
    "upload",
]
