"""megatron-ds: transformers that do not fit on one device, in plain PyTorch, with the same numbers on every mesh."""

__version__ = "0.1.0"
