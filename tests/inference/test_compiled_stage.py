"""Steps as compiled graphs compute what the model's own code does, for one token and for any number."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import make
from served import VOCAB, config_of, engine_of, stage_of

from megatron_ds.errors import ConfigError
from megatron_ds.inference import SamplingParams, compiled_stage, served_model
from megatron_ds.inference.batching import Span
from megatron_ds.inference.compiled_stage import CompiledDecoding, _DecodingStep
from megatron_ds.inference.model_runner import CacheSize, ModelRunner
from megatron_ds.inference.sequence import Request, Sequence
from megatron_ds.inference.serving_engine import ServingEngine
from megatron_ds.inference.serving_recipes import PackedWeight, use_serving_recipes
from megatron_ds.kernels.cpu import onednn
from megatron_ds.kernels.cpu.compiled_graph import compile_graph, record
from megatron_ds.mesh import Mesh
from megatron_ds.models.transformer import Transformer

# What is served in half precision has packed weights, whose products they do trace.
TRACES = pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 and 2.12 do not trace F.linear of any size")
PROMPTS = [[(7 * i + 3 * j) % VOCAB for i in range(length)] for j, length in enumerate((1, 2, 33, 50, 5))]


def logprobs_of(engine: ServingEngine, alone: int) -> list[dict[int, float]]:
    """Of some texts together, and then of one by itself, whose steps are of one token."""
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    found: dict[str, list[dict[int, float]]] = {}
    for number, prompt in [*enumerate(PROMPTS), (9, PROMPTS[alone])]:
        if number == 9:
            while engine.has_work:
                found |= {output.request_id: output.outputs[0].logprobs or [] for output in engine.step()}
        engine.add(str(number), prompt, params)
    while engine.has_work:
        found |= {output.request_id: output.outputs[0].logprobs or [] for output in engine.step()}
    return [of_token for name in sorted(found) for of_token in found[name]]


@TRACES
@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
def test_a_compiled_model_says_the_same_to_1e_10(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2, for rotary positions take their sines in fp32 always, and a compiled sine differs in its last bit."""
    model = stage_of(config_of("gpt2").model_copy(update={"num_layers": 1}), Mesh.single())
    want = logprobs_of(engine_of(model), 2)
    engine = engine_of(model, budget=64)
    engine.runner.compile()
    texts: list[int] = []
    run = CompiledDecoding.run
    monkeypatch.setattr(CompiledDecoding, "run", lambda *of: (texts.append(len(of[1])), run(*of))[1])
    found = logprobs_of(engine, 2)
    assert texts == [5] * 4 + [2] + [1] * 6  # every step but those of the prompts
    assert len(found) == len(want) == 36
    for mine, theirs in zip(found, want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)


def build(name: str, folder: Path, dtype: torch.dtype) -> Transformer:
    make(name).save_pretrained(folder)
    return served_model.build(served_model.find(folder), Mesh.single(), dtype)


@TRACES
@pytest.mark.parametrize("name", ["olmo2", "gemma2", "gpt-j", "opt", "falcon-rw-1b"])
def test_a_family_is_recorded_as_it_computes(tmp_path: Path, name: str) -> None:
    model = build(name, tmp_path, torch.float64)
    want = logprobs_of(engine_of(model), 1)
    engine = engine_of(model, budget=64)
    engine.runner.compile(compiled=False)
    for mine, theirs in zip(logprobs_of(engine, 1), want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)  # a table of sines in fp32


@pytest.mark.parametrize("name", ["opt", "gemma2"])
def test_half_precision_and_packed_weights_are_recorded(tmp_path: Path, name: str) -> None:
    model = build(name, tmp_path, torch.bfloat16)
    head = use_serving_recipes(model)
    assert isinstance(head, PackedWeight)
    ModelRunner(model, Mesh.single(), CacheSize(4, 4, torch.bfloat16), head).compile(compiled=False)


@pytest.mark.parametrize("scheme", ["w8a8", "int4"])
def test_quantised_weights_are_recorded_as_they_compute(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions, half precision and scales of the inputs, which no graph may keep as constants.

    Beside prompts as the model computes them, and decoding as the function does that is recorded: in half precision
    the model's own attention rounds otherwise.
    """
    sizes = {"num_layers": 1, "hidden_size": 128, "ffn_hidden_size": 128, "vocab_multiple": 16}
    model = stage_of(config_of("llama").model_copy(update=sizes), Mesh.single(), torch.bfloat16)
    head = use_serving_recipes(model, scheme)
    found = []
    for recorded in (False, True):
        engine = engine_of(model, budget=64)
        runner = engine.runner = ModelRunner(model, engine.mesh, CacheSize(64, 4, torch.bfloat16), head)
        if recorded:
            runner.compile(compiled=False)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(compiled_stage, "record", lambda run, *_: lambda *inputs: (run(*inputs),))
                runner.decoding = CompiledDecoding(model, runner.head_recipe, runner.cache, compiled=False)
        found.append(logprobs_of(engine, 2))
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_a_step_that_goes_on_has_the_inputs_of_one_made_anew() -> None:
    texts = [
        Sequence(Request(str(n), [1], SamplingParams(), 0), 0, list(range(30)), blocks=[9, n, 8, 7 * n])
        for n in (1, 2, 3)
    ]

    def spans(place: int, count: int = 3) -> list[Span]:
        return [Span(text, place + 2 * number, 1) for number, text in enumerate(texts[:count])]

    step, went_on = _DecodingStep(spans(0), 8), []
    for place in range(1, 12):
        went_on.append(step.goes_on(spans(place)))
        fresh = _DecodingStep(spans(place), 8)
        step = step if went_on[-1] else fresh
        assert torch.equal(step.of_texts, fresh.of_texts) and torch.equal(step.of_blocks, fresh.of_blocks)
        assert step.most == fresh.most
    assert went_on == [place not in (4, 6, 8) for place in range(1, 12)], "a text needs another block"
    step = _DecodingStep(spans(8), 8)
    assert not step.goes_on(spans(10)) and not step.goes_on(spans(9, 2)) and not step.goes_on(spans(9)[::-1])
    assert step.goes_on(spans(9))
    decoding = CompiledDecoding.__new__(CompiledDecoding)
    decoding._size, decoding._step, decoding._columns, decoding._pages = 8, step, torch.arange(9), []
    decoding._run = lambda *inputs: inputs[1]
    texts[0].blocks = [9, 5, 8, 7]  # its last one was shared, and is a copy now
    assert torch.equal(decoding.run(spans(10), copied=True), _DecodingStep(spans(10), 8).of_blocks)


def test_a_size_that_decides_what_is_computed_is_refused() -> None:
    def cut(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.shape[0] == 61 else x

    with pytest.raises(ConfigError, match="other numbers of tokens; use enforce_eager=True"):
        record(cut, [torch.ones(61)], {61})


def _product(seed: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Inputs, and what multiplies them by weights of a seed: whole, packed, packed int8 where that can be."""
    draw = torch.Generator().manual_seed(seed)
    scale, weight = torch.randn(32, generator=draw), torch.randn(32, 32, generator=draw)
    packed = onednn.packed(weight) if onednn.can_pack(weight) else None
    whole = torch.randint(-127, 128, (32, 32), generator=draw, dtype=torch.int8)
    int8 = onednn.packed_int8(whole) if onednn.can_multiply_int8(whole) else None
    zeros = torch.zeros(32, dtype=torch.int32)

    def run(x: torch.Tensor) -> torch.Tensor:
        out = x * scale
        if packed is not None:
            out = out + onednn.product(out, packed, None)
            out = onednn.product(out.relu(), packed, scale)
        if int8 is not None:
            out = out + onednn.int8_product((x + onednn.INT8_ZERO).to(torch.uint8), int8, scale, zeros)
        return out

    return torch.randint(-127, 128, (61, 32), generator=draw).float(), run


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler takes no path with a space")
def test_other_weights_of_the_same_shapes_find_the_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a second process do: neither their values nor where they are may be compiled in."""
    from torch._dynamo.utils import counters
    from torch._inductor import cpp_builder, exc

    for _ in range(2):
        # Of a seed that no run had before: the cache on disk may have its graph.
        x, run = _product(int.from_bytes(os.urandom(7), "big"))
        counters.clear()
        compiled = compile_graph(record(run, [x], {61}))
        for rows in (x, x[:1]):
            torch.testing.assert_close(compiled(rows), run(rows), rtol=1e-5, atol=1e-3)
    found = {key: count for key, count in counters["inductor"].items() if key.startswith("fxgraph_cache")}
    assert found == {"fxgraph_cache_hit": 1}

    def missing(*_: object) -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"install g\+\+, or use enforce"):  # what is found is C++, too
        compile_graph(record(run, [x], {61}))


def test_without_a_compiler_the_error_says_what_helps() -> None:
    from torch._inductor import config

    graph = record(lambda x: x.sin() + 1, [torch.ones(4)])
    with (
        config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(ConfigError, match=r"install g\+\+, or use enforce"),
    ):
        compile_graph(graph)
