"""Hugging Face models to checkpoints and back: what converts, and a table for each family."""
