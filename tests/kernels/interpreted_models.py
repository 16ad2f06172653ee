"""Whole models under Triton's interpreter: every op takes its twin, and the numbers are those of the references."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from interpreter_worker import close
from torch import Tensor

from megatron_ds.config import ModelConfig
from megatron_ds.kernels import registry
from megatron_ds.models.families import class_of
from megatron_ds.models.transformer import StageSettings


def whole_model(**settings: Any) -> None:
    """A model takes the twins everywhere it has an op, and computes with them what it computes without."""
    shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 4, "vocab_size": 50, "vocab_multiple": 8}
    config = ModelConfig(**{**shape, **settings})
    tokens = torch.randint(50, (2, 6))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(5).expand(2, 5),
        "loss_mask": torch.tensor([[True] * 5, [True, False, True, True, True]]),
        "sample_index": torch.tensor([3, 4]),
    }
    results = []
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        model = class_of(config)(config, StageSettings(label_smoothing=0.1, z_loss=0.01, dtype=dtype))
        model.initialize(1)
        with torch.no_grad():  # what is 0 at first hides what its gradient does
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
        launched: list[str] = []

        def load(op: registry.Op, x: Tensor, launched: list[str] = launched) -> Any:
            launched.append(op.name)
            return registry.load_twin(op.name, op.twin, x.device.type)

        with registry.use(implementation), patch.object(registry.Op, "load", load):
            loss = model(batch)
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}, set(launched)))
    (loss, gradients, launched_ops), (want, expected, none) = results
    assert not none and {"norm", "cross_entropy"} < launched_ops, launched_ops
    activation = "gated" if config.activation == "swiglu" else "bias_gelu"
    assert activation in launched_ops and ("rotary" in launched_ops) == (config.position == "rope")
    assert "split_heads" in launched_ops
    assert ("dropout_add" in launched_ops) == (config.hidden_dropout > 0)
    assert ("softmax" in launched_ops) == (config.attention_dropout > 0)
    close("loss", loss, want, 1e-6)
    for name, gradient in gradients.items():
        grad = expected[name]
        assert gradient is not None and grad is not None, name
        close(name, gradient, grad, 2e-5)
