"""Ranks that were given the same samples: said once, on rank 0, after the first step."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.advice.first_inputs import FirstInputs, same_inputs
from megatron_ds.testing import run_ranks


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def of(batch: Any) -> int | None:
    inputs = FirstInputs()
    inputs.see(batch)
    return inputs._digest


def told(same: tuple[int, ...], way: str) -> list[str]:
    """Ranks of ``same`` draw from one generator, the others from their own."""
    messages = Messages()
    logging.getLogger("megatron_ds.engine.engine").addHandler(messages)
    net = nn.Linear(4, 4)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).square().mean()

    engine = megatron_ds.initialize(net, {"zero": {"stage": 2}}, loss=loss)
    rank = engine.mesh.data.rank
    generator = torch.Generator().manual_seed(7 if rank in same else 100 + rank)
    engine.eval()
    engine(torch.ones(2, 4))  # an evaluation of the same samples is nobody's mistake
    engine.train()
    for _ in range(3):
        x = torch.randn(8, 4, generator=generator)
        if way == "train_batch":
            engine.train_batch([x])
        else:
            engine.backward(loss(engine, x))
            engine.step()
    engine.close()
    return messages.texts


@pytest.mark.parametrize("way", ["train_batch", "step"])
def test_ranks_with_the_same_samples_are_named_once(way: str) -> None:
    assert run_ranks(told, 3, (0, 2), way)[1:] == [[], []]
    (text,) = run_ranks(told, 3, (0, 2), way)[0]
    assert text.startswith("2 of 3 data-parallel ranks (0, 2) began with inputs that others had too (float32 [8, 4]")
    assert "DistributedSampler" in text
    assert run_ranks(told, 2, (), way) == [[], []]


def test_a_digest_tells_values_apart_and_takes_any_inputs() -> None:
    x = torch.arange(6.0)
    assert of((x,)) == of({"a": x.clone()}) != of((x + 1,))
    assert of((x, {"b": x})) != of((x, {"b": -x}))  # a later tensor counts too
    assert of((x.bfloat16().view(2, 3).t(), None, "text", 3)) is not None
    assert of((torch.empty(0), torch.tensor(True))) == of(torch.tensor(True))
    assert of(("no tensor",)) == 0
    nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
    assert of((torch.eye(2).to_sparse(), nested, torch.empty(3, device="meta"))) == 0
    torch.func.vmap(lambda row: row * of(row))(x.view(3, 2))  # no memory that could be looked at
    assert of(torch.tensor([1 + 2j])) != 0
    assert of(x.view(3, 2)[:, 1]) == of(x[1::2].clone()) != of(x[::2])  # a column
    assert of(x.view(1, 6)[:, 2]) == of(x[2:3].clone()) != of(x[3:4])  # of one row: contiguous, with a stride of 6
    inputs = FirstInputs()
    inputs.see(x)
    first = inputs._digest
    inputs.see(x + 1)
    assert inputs._digest == first


def test_only_equal_digests_of_something_are_a_fault() -> None:
    assert same_inputs([1, 2, 3], "") is None and same_inputs([0, 0], "") is None
    advice = same_inputs([5] * 20, "int64 [1, 8]")
    assert advice is not None and advice.message.startswith(
        "20 of 20 data-parallel ranks (0, 1, 2, 3, 4, 5, 6, 7 and 12 more)"
    )


class Pair(NamedTuple):
    x: Tensor
    weight: Any = 2.0


def test_a_batch_comes_to_the_model_as_it_was_made() -> None:
    """Its floating-point tensors in the model's dtype, whatever holds them; names and attributes stay."""
    from transformers import BatchEncoding

    seen: list[Any] = []

    class Net(nn.Linear):
        def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
            seen.append(batch)
            return super().forward(batch.x if isinstance(batch, Pair) else batch["x"][0])

    def loss(model: Any, batch: Any) -> Tensor:
        assert isinstance(batch, Pair | dict) or batch.x[0] is batch["x"][0]  # an attribute of a BatchEncoding
        return model(batch).float().square().mean()

    config = {"precision": {"dtype": "bf16"}, "cast_inputs": True}
    engine = megatron_ds.initialize(Net(4, 4), config, loss=loss)
    x = torch.ones(2, 4)
    for batch in (Pair(x), {"x": (x, torch.ones(1, dtype=torch.int64), "text", None)}, BatchEncoding({"x": [x]})):
        engine.train_batch([batch])
    assert isinstance(seen[0], Pair) and seen[0].x.dtype == torch.bfloat16 and seen[0].weight == 2.0
    x, number, text, nothing = seen[1]["x"]
    assert (x.dtype, number.dtype, text, nothing) == (torch.bfloat16, torch.int64, "text", None)
    assert seen[2]["x"][0].dtype == torch.bfloat16
    engine.close()
