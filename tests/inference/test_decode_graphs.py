"""Decode steps padded to buckets say what they say without, and write nothing that is another's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import _llama
from served import VOCAB, config_of, engine_of, stage_of

from megatron_ds.inference import LLM, SamplingParams, llm
from megatron_ds.inference.decode_graphs import GraphSizes
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.mesh import Mesh
from megatron_ds.models.transformer import Transformer

LONGEST = 60


def sizes_of(model: Transformer, rows: int, size: int) -> GraphSizes:
    return GraphSizes(rows, -(-LONGEST // size), size, model.config.padded_vocab, torch.float64)


class Stand:
    """Stands for CUDA's graphs: runs the step, on the static buffers, and sees what it writes into the cache."""

    def __init__(self, engine: ServingEngine):
        self.engine, self.replays = engine, 0

    def written(self) -> set[int]:
        """Slots that the texts of the step may write."""
        size = self.engine.batcher.pool.size
        at = [(s.blocks, s.computed) for s in self.engine.batcher.running if s.computed < len(s.tokens)]
        return {blocks[place // size] * size + place % size for blocks, place in at if place // size < len(blocks)}

    def __call__(self, run: Callable[[], None]) -> Callable[[], object]:
        run()

        def replay() -> None:
            cache, pool = self.engine.runner.cache, self.engine.batcher.pool
            data = [p.data for of in (cache.keys, cache.values) for p in of.values()]
            before = [x.clone() for x in data]
            run()
            self.replays += 1
            for x, was in zip(data, before, strict=True):
                rows = (x.view(torch.int64) != was.view(torch.int64)).transpose(1, 2).flatten(0, 1)
                changed = rows.flatten(1).any(1).nonzero().flatten().tolist()
                assert set(changed) - set(range(pool.count * pool.size, len(rows))) <= self.written()

        return replay


def answers(model: Transformer, seed: int, graphs: bool) -> tuple[dict[str, Any], int]:
    """Of requests that come and go, in a cache full of NaN; and the number of replayed steps."""
    draw = random.Random(seed)
    size, seats = draw.randrange(1, 9), draw.randrange(1, 8)
    blocks = -(-LONGEST // size) + draw.randrange(0, 10)
    engine = engine_of(model, None, blocks, size, seats, seats + size + draw.randrange(20), longest=LONGEST)
    for of_layer in (*engine.runner.cache.keys.values(), *engine.runner.cache.values.values()):
        of_layer.data[:] = torch.nan
    stand = Stand(engine)
    if graphs:
        engine.runner.capture(stand, sizes_of(model, seats, size))
    found: dict[str, Any] = {}
    for step in range(400):
        if step < 12:
            for number in range(draw.choice([0, 0, 1, 2])):
                tokens = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
                params = SamplingParams(
                    temperature=draw.choice([0.0, 1.0]), seed=step, max_tokens=draw.randrange(1, 14),
                    n=draw.choice([1, 1, 2]), logprobs=2, prompt_logprobs=draw.choice([None, 1]),
                )  # fmt: skip
                engine.add(f"{step}-{number}", tokens, params)
            if draw.random() < 0.2:
                engine.abort(f"{draw.randrange(12)}-0")
        for output in engine.step():
            found[output.request_id] = [(s.token_ids, s.logprobs) for s in output.outputs]
        if step >= 12 and not engine.has_work:
            return found, stand.replays
    raise AssertionError("it does not end")


@pytest.mark.parametrize("family", ["llama", "falcon-rw"])
def test_buckets_change_no_token_and_write_no_live_block(family: str) -> None:
    model = stage_of(config_of(family), Mesh.single())
    replays = 0
    for seed in range(3):
        want, _ = answers(model, seed, graphs=False)
        found, count = answers(model, seed, graphs=True)
        replays += count
        assert found.keys() == want.keys()
        for name, samples in found.items():
            for (tokens, logprobs), (want_tokens, want_logprobs) in zip(samples, want[name], strict=True):
                assert tokens == want_tokens
                for mine, theirs in zip(logprobs, want_logprobs, strict=True):
                    assert mine == pytest.approx(theirs, abs=1e-10)
    assert replays > 30


def test_a_step_runs_in_the_smallest_bucket_that_holds_it() -> None:
    model = stage_of(config_of("llama"), Mesh.single())
    engine = engine_of(model)
    assert sizes_of(model, 6, 4).buckets == [1, 2, 4, 6] and sizes_of(model, 8, 4).buckets == [1, 2, 4, 8]
    assert sizes_of(model, 1, 4).buckets == [1]
    captured: list[int] = []
    replayed: list[int] = []

    def capture(run: Callable[[], None]) -> Callable[[], object]:
        count = run.args[0]  # type: ignore[attr-defined]
        captured.append(count)
        return lambda: (replayed.append(count), run())

    engine.runner.capture(capture, sizes_of(model, 6, 4))
    assert captured == [6, 4, 2, 1]  # the largest first: the others fit into its memory
    for number in range(5):
        params = SamplingParams(temperature=0.0, max_tokens=2 + number, ignore_eos=True)
        engine.add(str(number), [number + 1, 3], params)
    while engine.has_work:
        engine.step()
    assert replayed == [6, 4, 4, 2, 1]


def test_the_static_buffers_are_counted_in_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _llama().save_pretrained(tmp_path)
    monkeypatch.setattr(llm, "_memory", lambda device, part: 1 << 20)
    counts, params = [], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    tokens = []
    for capture in (None, lambda run: run):
        monkeypatch.setattr(llm, "capture_for", lambda mesh, capture=capture: capture)
        with LLM(tmp_path, dtype="float32", max_num_seqs=200, enforce_eager=False, block_size=16) as served:
            counts.append(served.engine.batcher.pool.count)
            tokens.append([o.outputs[0].token_ids for o in served.generate([[3, 4], [5]], params, use_tqdm=False)])
            cache = served.engine.runner.cache
            of_cache = sum(p.data.nbytes for of in (cache.keys, cache.values) for p in of.values())
            graphs = served.engine.runner.graphs
            if graphs is not None:
                buffers = (graphs.numbers, graphs.tables, graphs.spans, graphs.logits)
                assert sum(buffer.nbytes for buffer in buffers) == graphs.sizes.bytes > 16 * 1024
                of_cache += graphs.sizes.bytes
            block = of_cache // (counts[-1] + 1)
            assert (1 << 20) - 2 * block < of_cache <= 1 << 20
    assert counts[1] < counts[0] and tokens[0] == tokens[1]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu_say_what_eager_steps_say(tmp_path: Path) -> None:
    """The kernel, captured and not, beside a CPU; requests of several lengths that end one after the other."""
    _llama().to(torch.float32).save_pretrained(tmp_path)
    prompts = [[(7 * i + 3 * j) % 60 + 3 for i in range(length)] for j, length in enumerate((1, 2, 33, 50, 5))]
    params = [SamplingParams(temperature=0.0, max_tokens=5 + 3 * j, logprobs=3, ignore_eos=True) for j in range(5)]
    found = []
    for device, eager in (("cpu", True), ("cuda", True), ("cuda", False)):
        settings: dict[str, Any] = {"device": device, "enforce_eager": eager, "num_blocks": 64, "max_num_seqs": 5}
        with LLM(tmp_path, dtype="float32", **settings) as served:
            assert (served.engine.runner.graphs is not None) == (not eager)
            found.append([output.outputs[0] for output in served.generate(prompts, params, use_tqdm=False)])
    for mine, want in zip(found[1:], found[:1] * 2, strict=True):
        for one, other in zip(mine, want, strict=True):
            assert one.token_ids == other.token_ids
            for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert a == pytest.approx(b, abs=1e-3)
