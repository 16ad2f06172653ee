"""The engine against the trainer's forward pass over the whole text, in float64, whatever is served beside it."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import FAMILIES, VOCAB, config_of, engine_of, stage_of, whole_logits

from megatron_ds.errors import ConfigError
from megatron_ds.inference import paged_cache
from megatron_ds.inference.batching import guess
from megatron_ds.inference.outputs import RequestOutput
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.testing import run_ranks

ALL = VOCAB
MODELS = {name: stage_of(config_of(name), Mesh.single()) for name in FAMILIES}


def serve(
    engine: ServingEngine, arrivals: dict[int, list[Any]], aborts: dict[int, list[str]]
) -> dict[str, RequestOutput]:
    """What came of the requests that arrive at these steps."""
    done: dict[str, RequestOutput] = {}
    last = max([*arrivals, *aborts])
    step = 0
    while step <= last or engine.has_work:
        for name, tokens, params in arrivals.get(step, []):
            engine.add(name, tokens, params)
        for name in aborts.get(step, []):
            engine.abort(name)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        step += 1
        assert step < 2000, "it does not end"
    return done


def check(model: Any, output: RequestOutput) -> None:
    """Every log-probability of prompt and answer is that of the whole text computed at once."""
    for sample in output.outputs:
        text = [*output.prompt_token_ids, *sample.token_ids]
        want = whole_logits(model, text).log_softmax(-1)
        prompt = len(output.prompt_token_ids)
        found = [*(output.prompt_logprobs or [None] * prompt)[1:], *(sample.logprobs or [])]
        for place, of_token in enumerate(found):
            if of_token is not None:
                for token, value in of_token.items():
                    assert abs(value - want[place, token].item()) < 1e-10, (output.request_id, place, token)
        if sample.logprobs is not None:
            chosen = [of_token[token] for token, of_token in zip(sample.token_ids, sample.logprobs, strict=True)]
            assert sample.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-9)
        if output.prompt_logprobs is not None:
            complete = bool(sample.token_ids) or sample.finish_reason != "abort"
            assert not complete or len(output.prompt_logprobs) == prompt, sample.finish_reason
            assert output.prompt_logprobs[:1] in ([None], [])


def request(draw: random.Random, name: str, shared: list[int]) -> tuple[str, list[int], SamplingParams]:
    own = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
    params = SamplingParams(
        n=draw.choice([1, 1, 3]),
        temperature=draw.choice([0.0, 1.0]),
        seed=draw.randrange(100),
        max_tokens=draw.randrange(1, 12),
        logprobs=3,
        prompt_logprobs=draw.choice([None, 2]),
    )
    return name, shared[: draw.randrange(len(shared))] + own, params


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), family=st.sampled_from(sorted(FAMILIES)))
def test_any_schedule_gives_the_logits_of_the_whole_text(seed: int, family: str) -> None:
    """Arrivals, aborts, samples, shared beginnings, small pools (preemption), block sizes, budgets (chunks)."""
    draw = random.Random(seed)
    size, seats = draw.randrange(1, 9), draw.randrange(1, 6)
    blocks = -(-60 // size) + draw.randrange(0, 10)
    budget = seats + size + draw.randrange(0, 20)
    share, drafts = draw.random() < 0.7, draw.choice([0, 0, 4])
    engine = engine_of(MODELS[family], None, blocks, size, seats, budget, share, longest=60, drafts=drafts)
    for of_layer in (*engine.runner.cache.keys.values(), *engine.runner.cache.values.values()):
        of_layer.data.fill_(torch.nan)  # what a text has not written is not read, hidden from its queries or not
    shared = [draw.randrange(VOCAB) for _ in range(20)]
    arrivals: dict[int, list[Any]] = {}
    aborts: dict[int, list[str]] = {}
    for number in range(draw.randrange(1, 9)):
        step = draw.randrange(0, 12)
        arrivals.setdefault(step, []).append(request(draw, f"r{number}", shared))
        if draw.random() < 0.2:
            aborts.setdefault(step + draw.randrange(0, 6), []).append(f"r{number}")
    count = sum(map(len, arrivals.values()))
    limits = {"QUERIES": draw.choice([3, 64]), "_SCORES": draw.choice([200, 10**6])}  # of a part and of a call
    limits |= {
        "_PADDED": draw.choice([100, 10**6]),
        "_CUT": draw.choice([10, 10**3]),
        "_KEPT_BIASES": draw.choice([0, 10**6]),
    }
    with mock.patch.multiple(paged_cache, **limits):
        done = serve(engine, arrivals, aborts)
    assert len(done) == count
    for output in done.values():
        check(MODELS[family], output)
    assert engine.batcher.pool.free == blocks and not engine.batcher.running and not engine.batcher.waiting


def test_a_small_pool_preempts_and_computes_again() -> None:
    engine = engine_of(MODELS["llama"], blocks=15, size=4, longest=60, share=False)
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=0)
    done = serve(engine, {0: [(f"r{i}", [i + 1] * 9, params) for i in range(4)]}, {})
    assert engine.batcher.preemptions > 0
    for output in done.values():
        assert len(output.outputs[0].token_ids) == 20
        check(MODELS["llama"], output)


def test_a_block_is_copied_before_another_text_takes_it() -> None:
    engine = engine_of(MODELS["llama"], blocks=4, size=4)
    one, several = (SamplingParams(n=n, seed=1, max_tokens=3, logprobs=2) for n in (1, 3))
    # The first sample copies the prompt's last block, and the waiting ones give that up for the other request's token.
    arrivals = {0: [("samples", [5, 6, 7, 8, 9, 10], several), ("other", [1, 2, 3, 4], one)]}
    for output in serve(engine, arrivals, {}).values():
        check(MODELS["llama"], output)


def test_a_shared_beginning_is_computed_once() -> None:
    engine = engine_of(MODELS["llama"])
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1)
    shared = list(range(1, 41))
    first = serve(engine, {0: [("a", [*shared, 50], params)]}, {})["a"]
    second = serve(engine, {0: [("b", [*shared, 51, 52], params)]}, {})["b"]
    assert (first.cached, second.cached, engine.counters.cached_tokens) == (0, 40, 40)
    check(MODELS["llama"], second)


def test_guesses_change_nothing_but_the_number_of_steps() -> None:
    """Greedy and drawn, with stops, penalties and minimum lengths; the model is made to repeat itself."""
    requests = [
        ("greedy", [1, 2, 3] * 4, SamplingParams(temperature=0.0, max_tokens=30, logprobs=1)),
        ("drawn", [5, 6] * 6, SamplingParams(seed=3, top_k=2, max_tokens=30, logprobs=1)),
        ("ends", [9, 9, 9], SamplingParams(temperature=0.0, logit_bias={9: 50.0}, max_tokens=20)),
        ("stops", [7, 8] * 5, SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[7], min_tokens=4)),
        ("penalised", [4] * 8, SamplingParams(seed=1, frequency_penalty=0.3, repetition_penalty=1.1, max_tokens=25)),
    ]
    found = []
    for drafts in (0, 5):
        engine = engine_of(MODELS["llama"], drafts=drafts, longest=60)
        done = serve(engine, {0: list(requests)}, {})
        found.append({name: output.outputs[0] for name, output in done.items()})
        check(MODELS["llama"], done["greedy"])
        check(MODELS["llama"], done["drawn"])
        assert (engine.counters.drafted_tokens > 20) == (drafts > 0)
        assert engine.batcher.pool.free == engine.batcher.pool.count
    for name, without in found[0].items():
        assert found[1][name].token_ids == without.token_ids, name
        assert found[1][name].finish_reason == without.finish_reason


def test_an_id_is_free_again_when_its_request_has_ended() -> None:
    engine, params = engine_of(MODELS["llama"]), SamplingParams(temperature=0.0, max_tokens=2)
    for _ in range(2):
        engine.add("a", [1, 2], params)
        for _ in range(2):  # it waits for a step, then it is under way
            with pytest.raises(ConfigError, match="request 'a' is being served already"):
                engine.add("a", [3], params)
            engine.step()
        assert not engine.has_work


def test_the_time_of_a_step_is_counted_apart_from_the_computing_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, now = engine_of(MODELS["llama"]), 0.0
    monkeypatch.setattr(engine, "_clock", lambda: now)

    def lasts(seconds: float, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*arguments)

        return call

    monkeypatch.setattr(engine.batcher, "plan", lasts(1.0, engine.batcher.plan))
    monkeypatch.setattr(engine.runner, "run", lasts(4.0, engine.runner.run))
    monkeypatch.setattr(engine.sampler, "most_probable", lasts(2.0, engine.sampler.most_probable))
    serve(engine, {0: [("a", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))]}, {})
    counters = engine.counters
    assert (counters.steps, counters.step_seconds, counters.compute_seconds) == (5, 35.0, 30.0)
    # A step of 7 s for each of the later tokens; the first one's is all that came before.
    assert (counters.token_times.seconds, counters.first_tokens.seconds) == (7.0, 7.0)
    assert dict(counters.token_times.buckets()) | {"5.0": 0, "10.0": 1, "+Inf": 1} == dict(
        counters.token_times.buckets()
    )


def test_a_guess_is_what_followed_the_same_tokens() -> None:
    assert guess([1, 2, 3, 4, 1, 2, 3], 2) == (4, 1)
    assert guess([5, 1, 2, 9, 7, 2, 8, 1, 2], 3) == (9, 7, 2)
    assert guess([1, 2, 3], 4) == () == guess([1], 4)


def on_mesh(shape: MeshShape, family: str) -> list[Any]:
    mesh = Mesh.create(shape, torch.device("cpu"))
    engine = engine_of(
        stage_of(config_of(family), mesh), mesh, blocks=20, size=4, seats=3, budget=16, longest=60, drafts=3
    )
    if mesh.rank > 0:
        engine.follow()
        return []
    draw = random.Random(3)
    arrivals = {i: [request(draw, f"r{i}", list(range(20)))] for i in range(6)}
    done = serve(engine, arrivals, {4: ["r2"]})
    engine.stop()
    return [
        (
            o.request_id,
            o.prompt_token_ids,
            [([], o.prompt_logprobs or [])] + [(s.token_ids, s.logprobs) for s in o.outputs],
        )
        for o in done.values()
    ]


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        (MeshShape(tp=2), "gemma"),
        (MeshShape(tp=4), "llama"),
        (MeshShape(pp=2), "bloom"),
        (MeshShape(pp=2, tp=2), "gpt2"),
    ],
)
def test_every_mesh_gives_the_tokens_and_logits_of_one_process(shape: MeshShape, family: str) -> None:
    want = {name: rest for name, *rest in on_mesh(MeshShape(), family)}
    found = run_ranks(on_mesh, shape.world_size, shape, family)[0]
    assert len(found) == len(want) == 6
    for name, tokens, samples in found:
        assert tokens == want[name][0]
        for (ids, logprobs), (want_ids, want_logprobs) in zip(samples, want[name][1], strict=True):
            assert ids == want_ids
            for mine, theirs in zip(logprobs, want_logprobs, strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert mine.keys() == theirs.keys() and all(abs(mine[t] - theirs[t]) < 1e-10 for t in mine)
