"""Checkpoints: safetensors and JSON, checksummed, committed atomically, loadable on any mesh from any mesh."""

from megatron_ds.checkpoint.directory import read_meta, resolve
from megatron_ds.checkpoint.load import load
from megatron_ds.checkpoint.reader import Checkpoint
from megatron_ds.checkpoint.save import save
from megatron_ds.shard.flat_shards import FlatShard

__all__ = [
    "Checkpoint",
    "FlatShard",
    "load",
    "read_meta",
    "resolve",
    "save",
]
