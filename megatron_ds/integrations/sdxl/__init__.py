"""Fine-tune SDXL of `diffusers` with ZeRO: what `examples/finetune_sdxl.py` is made of."""
