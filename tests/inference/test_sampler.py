"""The sampler against closed forms and `transformers`' logits processors; draws that depend on nothing but the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.inference.sampler import Row, Sampler
from megatron_ds.inference.sampling_params import SamplingParams
from megatron_ds.mesh import Axis, Mesh, MeshShape
from megatron_ds.rng import derive_seed
from megatron_ds.testing import run_ranks

VOCAB = 40


def row(params: SamplingParams, seed: int = 0, answer: tuple[int, ...] = (), banned: tuple[int, ...] = ()) -> Row:
    return Row(params, seed, 0, (1, 2, 3, *answer), 3, banned)


def scores(rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2


def kept(params: SamplingParams, logits: Tensor) -> Tensor:
    """The distribution that is drawn from."""
    sampler = Sampler(Axis("tp"), 0, VOCAB)
    found = sampler.sample(logits.clone(), [row(params)]).processed[0]
    assert found is not None
    whole = torch.zeros(VOCAB, dtype=torch.float64)
    for token, value in found.items():
        whole[token] = torch.tensor(value, dtype=torch.float64).exp()
    return whole


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, []),
        ({"temperature": 0.7}, [("TemperatureLogitsWarper", (0.7,))]),
        ({"top_k": 5}, [("TopKLogitsWarper", (5,))]),
        ({"top_p": 0.6}, [("TopPLogitsWarper", (0.6,))]),
        ({"min_p": 0.1}, [("MinPLogitsWarper", (0.1,))]),
        ({"top_k": 9, "top_p": 0.8}, [("TopKLogitsWarper", (9,)), ("TopPLogitsWarper", (0.8,))]),
        ({"temperature": 2.0, "top_p": 0.95}, [("TemperatureLogitsWarper", (2.0,)), ("TopPLogitsWarper", (0.95,))]),
    ],
)
def test_what_is_drawn_from_is_what_transformers_draws_from(ours: dict[str, Any], theirs: list[Any]) -> None:
    import transformers

    logits = scores()
    want = logits.clone()
    for name, values in theirs:
        want = getattr(transformers, name)(*values)(torch.zeros(1, 1, dtype=torch.int64), want)
    found = kept(SamplingParams(processed_logprobs=VOCAB, **ours), logits)
    torch.testing.assert_close(found, want[0].softmax(-1), rtol=0, atol=1e-12)


def test_each_row_of_a_batch_is_cut_by_its_own_settings() -> None:
    """Of a vocabulary of which the candidates of top-p are a part."""
    import transformers

    logits = 3 * torch.randn(1, 3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    settings: list[dict[str, Any]] = [{}, {"top_p": 0.6}, {"top_k": 5}, {"top_k": 2000}, {"min_p": 0.05}]
    settings += [{"top_k": 50, "top_p": 0.5, "min_p": 0.3}, {"top_p": 0.999}, {"top_k": 2500, "top_p": 0.5}]
    for batch in (settings, settings[:4]):
        rows = [SamplingParams(**of_row) for of_row in batch]
        found = Sampler(Axis("tp"), 0, 3000)._kept(logits.repeat(len(rows), 1), rows)
        for of_row, got in zip(batch, found, strict=True):
            want, nothing = logits.clone(), torch.zeros(1, 1, dtype=torch.int64)
            for name, kind in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
                if name in of_row:
                    # Min-p is relative to the most probable token, so it may as well come last.
                    want = getattr(transformers, f"{kind}LogitsWarper")(of_row[name])(nothing, want)
            assert torch.equal(got, want[0]), of_row


def test_logprobs_are_of_the_model_and_processed_ones_of_what_is_drawn_from() -> None:
    params = SamplingParams(top_k=4, temperature=0.5, repetition_penalty=1.4, logprobs=VOCAB, processed_logprobs=4)
    logits = scores(2)
    logits[0, 2] = 9.0  # of the prompt, so that its penalty is seen
    rows = [row(params), row(SamplingParams(temperature=0.0, logprobs=VOCAB))]
    found = Sampler(Axis("tp"), 0, VOCAB).sample(logits.clone(), rows)
    for of_row, want in zip(found.logprobs, logits.log_softmax(-1), strict=True):
        assert of_row == pytest.approx(dict(enumerate(want.tolist())), abs=1e-12)
    assert found.processed[1] is None and found.processed[0] is not None and len(found.processed[0]) == 4
    penalised = logits[0].clone()
    penalised[[1, 2, 3]] = torch.where(penalised[[1, 2, 3]] > 0, penalised[[1, 2, 3]] / 1.4, penalised[[1, 2, 3]] * 1.4)
    values, ids = (penalised / 0.5).topk(4)
    assert found.processed[0] == pytest.approx(dict(zip(ids.tolist(), values.log_softmax(0).tolist())), abs=1e-12)


def test_a_flat_distribution_asks_for_more_candidates() -> None:
    logits = torch.zeros(1, 5000, dtype=torch.float64) - torch.arange(5000) * 1e-6
    sampler = Sampler(Axis("tp"), 0, 5000)
    found = sampler.sample(logits.clone(), [row(SamplingParams(top_p=0.5, processed_logprobs=1000))])
    # Half of the mass: 2,500 tokens of nearly the same probability.
    values = sampler._kept(logits.clone(), [SamplingParams(top_p=0.5)])
    assert abs(int(values.isfinite().sum()) - 2498) < 5 and found.tokens[0] < 2503


def test_penalties_biases_and_bans_are_the_closed_forms() -> None:
    params = SamplingParams(
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={7: 3.0, 8: 5.0},
        processed_logprobs=VOCAB,
    )
    logits = scores()
    want = logits[0].clone()
    want[7] += 3.0
    want[8] += 5.0  # before the penalties, as `transformers` orders its processors
    for token in (1, 2, 3, 8):
        want[token] = want[token] / 1.5 if want[token] > 0 else want[token] * 1.5
    want[8] -= 0.5 + 2 * 0.25
    want[3] -= 0.5 + 0.25
    want[5] = -torch.inf
    sampler = Sampler(Axis("tp"), 0, VOCAB)
    found = sampler.sample(logits.clone(), [row(params, answer=(8, 3, 8), banned=(5,))])
    of_token = found.processed[0]
    assert of_token is not None and found.tokens == [int(want.argmax())]
    for token, value in of_token.items():
        assert value == pytest.approx(float(want.log_softmax(-1)[token]), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_of_equals_in_a_wide_row_the_smallest_id_is_taken(dtype: torch.dtype) -> None:
    """Which threads and vectors reduce apart; a tie of half precision is common."""
    width = 70001
    logits = torch.zeros(4, width).to(dtype)
    places = [(69999, 70000), (5, 40000), (33, 34, 35, 69990), (0, 16, 17)]
    for of_row, ties in zip(logits, places, strict=True):
        of_row[list(ties)] = 1.0
    sampler = Sampler(Axis("tp"), 0, width)
    found = sampler.sample(sampler.mask_padding(logits), [row(SamplingParams(temperature=0.0))] * 4)
    assert found.tokens == [min(ties) for ties in places]


def test_of_equals_the_smallest_id_is_taken_and_top_k_1_is_greedy() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, [9, 4, 30]] = 1.0
    rows = [row(SamplingParams(temperature=0.0)), row(SamplingParams(top_k=1, temperature=5.0))]
    assert Sampler(Axis("tp"), 0, VOCAB).sample(logits, rows).tokens == [4, 4]
    colder = torch.arange(VOCAB, dtype=torch.float32).expand(2, VOCAB)
    rows = [row(SamplingParams(temperature=cold)) for cold in (1e-40, 2e-5)]
    assert Sampler(Axis("tp"), 0, VOCAB).sample(colder.clone(), rows).tokens == [VOCAB - 1] * 2


def test_at_the_highest_temperature_no_token_beyond_the_vocabulary_comes() -> None:
    sampler = Sampler(Axis("tp"), 0, VOCAB)
    logits = sampler.mask_padding(torch.randn(64, VOCAB + 64))
    rows = [row(SamplingParams(temperature=1e30, repetition_penalty=1e30), seed=seed) for seed in range(64)]
    assert max(sampler.sample(logits, rows).tokens) < VOCAB


def test_draws_have_the_distribution() -> None:
    """Chi-square of 20,000 draws; 39 degrees of freedom, the bound is passed once in 10^5."""
    logits = scores()
    count = 20_000
    rows = [row(SamplingParams(), seed=seed) for seed in range(count)]
    tokens = Sampler(Axis("tp"), 0, VOCAB).sample(logits.repeat(count, 1), rows).tokens
    seen = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    want = logits[0].softmax(-1) * count
    assert float(((seen - want) ** 2 / want).sum()) < 93.0


@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0])
def test_a_draw_is_the_largest_of_all_scores_with_their_noise(spread: float) -> None:
    """Flat and peaked rows; some where the tokens that are looked at first do not hold it, one without any token."""
    scores = spread * torch.randn(40, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sampler, rows = Sampler(Axis("tp"), 0, 3000), [row(SamplingParams(), seed) for seed in range(40)]
    keys = [derive_seed(of_row.seed, "sample", 0, len(of_row.tokens)) for of_row in rows]
    noise = sampler._noise(keys, np.arange(3000)[None].repeat(40, 0), scores)
    assert abs(float(noise.mean()) - 0.5772) < 0.02 and abs(float(noise.std()) - 1.2825) < 0.02, "Gumbel's"
    scores[:20] = 0.01 * scores[:20] - noise[:20]
    scores[:, ::7], scores[-1] = -torch.inf, -torch.inf
    assert sampler.sample(scores.clone(), rows).tokens == (scores + noise).argmax(1).tolist()


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    logits, sampler = scores(), Sampler(Axis("tp"), 0, VOCAB)
    rows = [row(SamplingParams(), seed=seed) for seed in range(8)]
    together = sampler.sample(logits.repeat(8, 1), rows).tokens
    assert together == [sampler.sample(logits.clone(), [one]).tokens[0] for one in rows]
    assert len(set(together)) > 3
    places = [row(SamplingParams(), 0, answer=(5,) * n) for n in range(20)]
    samples = [Row(SamplingParams(), 0, n, (1, 2, 3), 3) for n in range(20)]
    for several in (places, samples):
        assert len(set(sampler.sample(logits.repeat(20, 1), several).tokens)) > 5


PARAMS = [
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(top_k=3, logprobs=0, processed_logprobs=3),
    SamplingParams(top_p=0.5, temperature=1.7, processed_logprobs=8),
    SamplingParams(min_p=0.2, repetition_penalty=1.3, logit_bias={39: 2.0}),
]


def on_ranks(ranks: int) -> Any:
    mesh = Mesh.create(MeshShape(tp=ranks), torch.device("cpu"))
    width = 48 // ranks
    whole = torch.cat((scores(8), torch.full((8, 8), 50.0, dtype=torch.float64)), dim=1)  # 8 rows of padding
    own = whole[:, mesh.tp.rank * width : (mesh.tp.rank + 1) * width]
    sampler = Sampler(mesh.tp, mesh.tp.rank * width, VOCAB)
    rows = [row(params, seed, answer=(39, 11)) for seed in (1, 2) for params in PARAMS]
    found = sampler.sample(sampler.mask_padding(own), rows)
    return found.tokens, found.logprobs, found.processed


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_vocabulary_gives_the_same_tokens(ranks: int) -> None:
    tokens, *want = on_ranks(1)
    for found, *logprobs in run_ranks(on_ranks, ranks, ranks):
        assert found == tokens and max(tokens) < VOCAB
        for mine, theirs in zip(logprobs, want, strict=True):
            for of_mine, of_theirs in zip(mine, theirs, strict=True):
                assert (of_mine is None) == (of_theirs is None)
                assert of_mine is None or of_mine == pytest.approx(of_theirs, abs=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"n": 10**9}, {"n": True}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0},
        {"top_p": 1.5}, {"top_k": -2}, {"top_k": 1.5}, {"max_tokens": 0}, {"min_tokens": 20}, {"stop": ""},
        {"stop": [3]}, {"stop_token_ids": [-1]}, {"logit_bias": {"x": 1}}, {"logit_bias": {1: float("nan")}},
        {"logprobs": -1}, {"seed": "x"}, {"presence_penalty": 3}, {"repetition_penalty": 0}, {"logit_bias": 5},
        {"stop": ["a"], "detokenize": False}, {"max_tokens": float("inf")}, {"n": None}, {"foo": 1},
        {"temperature": 1e39}, {"repetition_penalty": 1e39}, {"repetition_penalty": 1e-40},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_tokens_of_a_prompt_may_be_on_another_device_than_logits() -> None:
    """On the meta device, whose operators refuse others' operands as a GPU's do."""
    logits, tokens = torch.empty(3, VOCAB, device="meta"), torch.zeros(3, dtype=torch.int64)
    found = Sampler(Axis("tp"), 0, VOCAB)._values_at(logits, tokens)
    assert found.device.type == "meta" and found.shape == (3,)
