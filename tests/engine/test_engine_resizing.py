"""Tables of tokens that grow and shrink in training: the numbers of plain torch, whose state is changed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import megatron_ds
from megatron_ds.engine import Engine
from megatron_ds.testing import run_ranks

SIZES = [6, 9, 4]  # rows, each for two steps
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1),
}
# Tied or not, stage, optimizer (None: the configuration's), where the state lies.
CASES: list[tuple[bool, int, str | None, str]] = [
    (True, 0, "AdamW", "none"),
    (False, 1, None, "none"),
    (True, 1, "Adagrad", "none"),
    (False, 2, "AdamW", "cpu"),
    (True, 2, "SGD", "none"),
    (True, 3, "AdamW", "none"),
    (False, 3, None, "none"),
    (False, 3, "AdamW", "cpu"),
]


class Tokens(nn.Module):
    """A table, a block, a frozen block, and a head with a bias; the head may be tied to the table."""

    def __init__(self, rows: int, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.tied = tied
        self.table = nn.Embedding(rows, 8).double()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double() for _ in range(3))
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(8, rows).double()
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens.roll(1, dims=1).flatten())

    def resize(self, rows: int, fill: float = 0.5) -> None:
        """As in transformers: the table's parameter gets other data, the head is another module."""
        with torch.no_grad():
            table, head = torch.full((rows, 8), fill).double(), nn.Linear(8, rows).double()
            kept = min(rows, self.table.num_embeddings)
            table[:kept] = self.table.weight[:kept]
            self.table.weight.data, self.table.num_embeddings = table, rows
            for new, old in zip(head.parameters(), self.head.parameters()):
                new.fill_(fill)[:kept] = old[:kept]
            self.head = head
        if self.tied:
            self.head.weight = self.table.weight


def tokens_of(number: int, rows: int) -> Tensor:
    return torch.randint(rows, (4, 5), generator=torch.Generator().manual_seed(number))


def plain(tied: bool, name: str) -> dict[str, Tensor]:
    model = Tokens(SIZES[0], tied)
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    for part, rows in enumerate(SIZES):
        if part:
            old = dict(model.named_parameters())
            model.resize(rows)
            for key, parameter in model.named_parameters():
                if not key.startswith(("table", "head")):
                    continue
                state = optimizer.state.pop(old[key])
                for kind, value in state.items():
                    if value.dim():
                        kept = min(rows, len(value))
                        state[kind] = value.new_zeros((rows, *value.shape[1:]))
                        state[kind][:kept] = value[:kept]
                optimizer.state[parameter] = state
                (group,) = optimizer.param_groups
                group["params"] = [parameter if p is old[key] else p for p in group["params"]]
        for number in (2 * part, 2 * part + 1):
            optimizer.zero_grad()
            model(tokens_of(number, rows)).backward()
            optimizer.step()
    return model.state_dict()


def engine_of(rows: int, tied: bool, stage: int, name: str | None, offload: str) -> Engine:
    model = Tokens(rows, tied)
    zero: dict[str, Any] = {"stage": stage, "bucket_mb": 0.0005, "offload_optimizer": {"device": offload}}
    if stage == 3:
        zero |= {"persistence_threshold": 20, "offload_parameters": {"device": offload}}
    if name is None:
        settings = {"optimizer": {"lr": 1e-2, "beta2": 0.999, "weight_decay": 0.1}, "decay": "all"}
        return megatron_ds.initialize(model, {"zero": zero, **settings})
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    return megatron_ds.initialize(model, {"zero": zero}, optimizer)


def trained(folder: str, tied: bool, stage: int, name: str | None, offload: str) -> dict[str, Tensor]:
    """With another engine from the middle of the second size on."""
    engine = engine_of(SIZES[0], tied, stage, name, offload)
    axis = engine.mesh.data
    for part, rows in enumerate(SIZES):
        if part:
            with engine.resizing():
                engine.module.resize(rows, fill=0.5 if axis.is_first else 7.0)  # type: ignore[operator]
        for number in (2 * part, 2 * part + 1):
            if number == 3:
                engine.save_checkpoint(folder)
                engine.close()
                engine = engine_of(rows, tied, stage, name, offload)
                engine.load_checkpoint(folder)
            # A loss keeps the graph of before, in which tables have their old shape.
            loss = engine.backward(engine(tokens_of(number, rows).chunk(axis.size)[axis.rank]))
            engine.step()
    assert loss.isfinite()
    state = engine.state_dict()
    engine.close()
    return state


def all_trained(folder: str) -> dict[Any, dict[str, Tensor]]:
    return {case: trained(f"{folder}/{number}", *case) for number, case in enumerate(CASES)}


@pytest.mark.parametrize(("ranks", "apart"), [(1, False), (2, False), (2, True)])
def test_resized_tables_train_as_in_plain_torch(ranks: int, apart: bool, tmp_path: Path) -> None:
    want = {(tied, name or "AdamW"): plain(tied, name or "AdamW") for tied, _, name, _ in CASES}
    for found in run_ranks(all_trained, ranks, str(tmp_path), apart=apart):
        for case, state in found.items():
            for key, value in want[case[0], case[2] or "AdamW"].items():
                assert (state[key] - value).abs().max() < 1e-12, (case, key)
