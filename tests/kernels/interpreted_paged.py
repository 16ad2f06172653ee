"""Paged attention under Triton's interpreter, against plain attention in float64 over the keys of each text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from interpreted_inputs import normal
from interpreter_worker import TOLERANCE, Canaries, close
from torch import Tensor

from megatron_ds.config import ModelConfig
from megatron_ds.inference.batching import Plan, Span
from megatron_ds.inference.model_runner import CacheSize, ModelRunner
from megatron_ds.kernels import registry
from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.float8 import E4M3
from megatron_ds.kernels.paged_attention import PagedKV, PagedTexts, paged_attention
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPT


@dataclass(frozen=True)
class Case:
    """``texts``: (rows, place of the first) each; other sizes as in a model."""

    texts: tuple[tuple[int, int], ...] = ((1, 0), (1, 70), (0, 9), (3, 5), (1, 33), (35, 0))
    size: int = 4
    heads: int = 2
    groups: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    float8: bool = False
    window: int | None = None
    alibi: str | None = None
    softcap: float | None = None
    factor: float = 1.0  # of the queries: large scores overflow without the running maximum


CASES = {
    "plain": Case(),
    "group of 3, blocks of 16": Case(heads=6, groups=2, size=16, texts=((1, 70), (9, 20), (1, 2))),
    "group of 8, head dim 64, half": Case(heads=8, size=32, head_dim=64, dtype=torch.float16),
    "head dim 128, half": Case(groups=2, head_dim=128, dtype=torch.float16, texts=((1, 150), (2, 64))),
    "head dim 20": Case(head_dim=20, size=5),
    "head dim 17, blocks of one token": Case(head_dim=17, size=1, texts=((1, 6), (2, 3))),
    "more keys than a part has tiles": Case(texts=((1, 1100), (1, 15))),
    "a window and a softcap": Case(window=50, softcap=3.0, factor=4.0, texts=((1, 200), (4, 140), (1, 49), (1, 50))),
    "ALiBi": Case(groups=2, alibi="exact", window=21, texts=((1, 70), (35, 30))),
    "rounded ALiBi": Case(groups=2, alibi="rounded", texts=((1, 300), (2, 290))),
    "eight bits": Case(float8=True, groups=2, texts=((1, 70), (9, 20))),
    "eight bits, half": Case(float8=True, heads=4, head_dim=24, dtype=torch.float16),
    "large scores": Case(factor=200.0, texts=((1, 70), (9, 20))),
}


def attended(case: Case, q: Tensor, k: Tensor, v: Tensor, start: int, slopes: Tensor) -> Tensor:
    """``[c, n, d]`` of the last ``c`` queries of a text with keys ``[l, g, d]``; in float64."""
    count, heads, d = q.shape
    out = torch.zeros(count, heads, d, dtype=torch.float64)
    for i in range(count):
        own = start + i
        low = 0 if case.window is None else max(0, own - case.window + 1)
        places = torch.arange(low, own + 1)
        for h in range(heads):
            g = h // (heads // case.groups)
            scores = k[places, g] @ q[i, h] / math.sqrt(d)
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if case.alibi == "exact":
                scores = scores + slopes[h].double() * (places - own)
            elif case.alibi == "rounded":
                bias = (slopes[h].bfloat16() * places.bfloat16()).double()
                scores = scores + (bias - (slopes[h].bfloat16() * torch.tensor(own).bfloat16()).double()) * 0.25
            out[i, h] = scores.softmax(0) @ v[places, g]
    return out


def pages(case: Case, blocks: list[list[int]], pool: int, canaries: Canaries) -> tuple[PagedKV, list[Tensor]]:
    """Keys or values of each text, in blocks of a pool full of NaN; and what they are in float64."""
    shape = pool * case.size, case.groups, case.head_dim
    data = torch.full(shape, math.nan, dtype=case.dtype)
    scale = torch.full((*shape[:2], 1), math.nan) if case.float8 else None
    if case.float8:
        data = data.to(E4M3).view(torch.uint8)
    whole = []
    for (count, start), of_text in zip(case.texts, blocks):
        rows = normal(start + count, case.groups, case.head_dim, dtype=case.dtype)
        slots = torch.tensor([of_text[p // case.size] * case.size + p % case.size for p in range(len(rows))])
        slots = slots.to(torch.int64)
        if scale is not None:
            factors = torch.rand(len(rows), case.groups, 1) / 100 + 1e-3
            eight = (rows.float() / factors / 10).to(E4M3)
            data[slots], scale[slots] = eight.view(torch.uint8), factors
            whole.append(eight.double() * factors.double())
        else:
            data[slots] = rows
            whole.append(rows.double())
    return PagedKV(canaries.around(data), None if scale is None else canaries.around(scale)), whole


def inputs(case: Case, canaries: Canaries) -> tuple[PagedTexts, list[list[int]], int]:
    """Tables of scattered blocks; what a table has beyond its text is a block that nobody has written."""
    counts = [-(-(start + count) // case.size) for count, start in case.texts]
    order = (torch.randperm(sum(counts)) + 1).tolist()  # block 0 is nobody's
    blocks = [[order.pop() for _ in range(count)] for count in counts]
    tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    spans, row = [], 0
    for number, (count, start) in enumerate(case.texts):
        tables[number, : counts[number]] = torch.tensor(blocks[number])
        spans.append([row, count, start])
        row += count
    longest, decodes = max(count for count, _ in case.texts), any(count == 1 for count, _ in case.texts)
    tables, of_texts = canaries.around(tables), canaries.around(torch.tensor(spans, dtype=torch.int32))
    return PagedTexts(tables, of_texts, case.size, longest, decodes), blocks, row


def check(case: Case) -> None:
    canaries = Canaries()
    texts, blocks, rows = inputs(case, canaries)
    keys, of_keys = pages(case, blocks, 1 + sum(map(len, blocks)), canaries)
    values, of_values = pages(case, blocks, 1 + sum(map(len, blocks)), canaries)
    # As behind a projection: queries of a group beside its keys.
    q = canaries.around(case.factor * normal(rows, case.heads + 2, case.head_dim, dtype=case.dtype)[:, : case.heads])
    slopes = canaries.around(torch.rand(case.heads))
    alibi = None if case.alibi is None else Alibi(slopes, 0.25 if case.alibi == "rounded" else None)
    with registry.use("triton"), canaries.around_allocations():
        out = paged_attention(q, keys, values, texts, case.window, alibi, case.softcap)
    canaries.check()
    row = 0
    for number, (count, start) in enumerate(case.texts):
        mine = q[row : row + count].double()
        want = attended(case, mine, of_keys[number], of_values[number], start, slopes)
        if count:
            close(f"text {number}", out[row : row + count], want, 2 * TOLERANCE[case.dtype])
        row += count


def neighbours() -> None:
    """No bit of a text's result depends on the texts beside it, nor on the other rows of its chunk."""
    case = Case(texts=((1, 90), (4, 30), (1, 3)))
    canaries = Canaries()
    texts, blocks, rows = inputs(case, canaries)
    keys, values = (pages(case, blocks, 1 + sum(map(len, blocks)), canaries)[0] for _ in range(2))
    q = normal(rows, case.heads, case.head_dim)
    with registry.use("triton"):
        together = paged_attention(q, keys, values, texts)
        for number, (row, count, start) in enumerate(texts.spans.tolist()):
            first = max(0, count - 2)  # of the chunk of four its last two
            spans = torch.tensor([[0, count - first, start + first]], dtype=torch.int32)
            alone = PagedTexts(texts.tables[number : number + 1], spans, case.size, count - first, count == 1)
            found = paged_attention(q[row + first : row + count], keys, values, alone)
            assert torch.equal(found, together[row + first : row + count]), number


def engine(cache: torch.dtype) -> None:
    """The steps of a model with this kernel are those with torch's attention: a prompt in chunks, then decoding."""
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_heads=4, kv_heads=2, vocab_size=40, norm="rmsnorm", position="rope",
        bias=False, window=6, attention_softcap=3.0, init_std=0.2,
    )  # fmt: skip
    model = GPT(config).eval().requires_grad_(False)
    model.initialize(3)
    found = []
    for implementation in ("reference", "triton"):
        runner = ModelRunner(model, Mesh.single(), CacheSize(12, 4, cache))
        texts: list[Any] = [SimpleNamespace(tokens=list(range(9 + i)), blocks=[5 + i, 1 + i, 10 - i]) for i in (0, 1)]
        with registry.use({"paged_attention": implementation}):
            for spans in ([(0, 0, 4)], [(0, 4, 4), (1, 0, 7)], [(0, 8, 1), (1, 7, 1)]):
                plan = Plan([Span(texts[text], start, count) for text, start, count in spans])
                logits = runner.run(plan, range(plan.tokens))
                assert logits is not None
                found.append(logits.double())
    for number, (want, got) in enumerate(zip(found[:3], found[3:], strict=True)):
        close(f"step {number}", got, want, 1e-5)


PAGED: dict[str, Callable[[], None]] = {
    **{f"paged attention: {name}": partial(check, case) for name, case in CASES.items()},
    "paged attention: neighbours": neighbours,
    "paged attention: an engine in eight bits": partial(engine, E4M3),
}
