"""``deepspeed.ops``: optimizers."""

from megatron_ds.integrations.deepspeed.ops import adam

__all__ = ["adam"]
