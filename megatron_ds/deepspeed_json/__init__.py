"""Reads a DeepSpeed configuration, a dictionary or a JSON file, as the engine's own."""

from megatron_ds.deepspeed_json.from_json import auto_values, from_deepspeed, is_deepspeed, read_values
