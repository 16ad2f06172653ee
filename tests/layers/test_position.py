"""Rotary embeddings and ALiBi against the papers' formulas and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_ds.kernels.alibi import Alibi
from megatron_ds.kernels.rotary import rotate_reference
from megatron_ds.layers.position import Rotary, alibi_slopes, rotary_table

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = {**LLAMA31, "factor": 32.0}


@pytest.mark.parametrize("scaling", [None, LLAMA31, LLAMA32], ids=["plain", "llama3.1", "llama3.2"])
@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 10000.0), (6, 100.0)])
def test_rotary_equals_transformers(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **({"rope_type": "llama3", **scaling} if scaling else {})}
        if scaling
        else {"rope_theta": theta, "rope_type": "default"},
    )
    rotary = llama.LlamaRotaryEmbedding(config)
    frequencies = Rotary(head_dim, theta, scaling).frequencies()
    torch.testing.assert_close(frequencies, rotary.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 2, 3, 100], [5, 4, 0, 1, 8191]])  # [b, s]
    x = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(0))  # [b, s, n, d]
    cos, sin = rotary_table(positions.t(), frequencies, torch.float32)
    got = rotate_reference(x.transpose(0, 1), cos, sin).transpose(0, 1)
    their_cos, their_sin = rotary(x, positions)
    want, _ = llama.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), their_cos, their_sin)
    # At position 8191 the last bit of a frequency moves the angle by 5e-4.
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=2e-3)
    torch.testing.assert_close(got[:, :4], want.transpose(1, 2)[:, :4], rtol=0, atol=1e-5)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [2.0 + 0.5 * i for i in range(16)],
}


@pytest.mark.parametrize("length", [255, 256, 257, 1000])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.5, "original_max_position_embeddings": 256},
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "attention_factor": 1.7, "original_max_position_embeddings": 20},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "original_max_position_embeddings": 2**30},
        {**YARN, "factor": 1.0},
        LONG,
        {**LONG, "factor": 0.5},
        {**LONG, "attention_factor": 1.3},
    ],
    ids=lambda scaling: "-".join(map(str, list(scaling.values())[:2])),
)
def test_stretched_frequencies_equal_transformers(scaling: dict[str, Any], length: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = llama.LlamaConfig(
        head_dim=32, max_position_embeddings=256, rope_parameters={"rope_theta": 10000.0, **scaling}
    )
    frequencies, amplitude = rope.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=length)
    ours = Rotary(32, 10000.0, scaling)
    torch.testing.assert_close(ours.frequencies(length), frequencies, rtol=1e-6, atol=0)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)
    cos, sin = rotary_table(torch.tensor([[7]]), frequencies, torch.float64, ours.amplitude)
    torch.testing.assert_close((cos**2 + sin**2).flatten(), torch.full((32,), amplitude**2).double(), rtol=1e-6, atol=0)


def test_frequencies_change_with_the_length_only_beyond_the_context() -> None:
    for scaling in (LONG, {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}, YARN):
        rotary = Rotary(32, 10000.0, scaling)
        for length in (1, 256, 257):
            same = torch.equal(rotary.frequencies(length), rotary.frequencies(1))
            assert rotary.depends_on(length) == (not same) == (length > 256 and scaling is not YARN)


def test_llama3_scaling_is_continuous_and_keeps_and_stretches() -> None:
    scaled, plain = Rotary(128, 500000.0, LLAMA31).frequencies(), Rotary(128, 500000.0).frequencies()
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert short.any() and long.any() and not (short | long).all()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8, rtol=1e-6, atol=0)
    between = (scaled / plain)[~(short | long)]
    assert ((between > 1 / 8) & (between < 1)).all() and (between.diff() < 0).all()


def test_rotary_is_the_rotation_of_the_paper_and_relative() -> None:
    frequencies = Rotary(8, 10000.0).frequencies()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(vector: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = rotary_table(torch.tensor([[position]]), frequencies, torch.float64)
        return rotate_reference(vector.view(1, 1, 1, 8), cos, sin).flatten()

    for i in range(4):
        angle = 3 * 10000.0 ** (-2 * i / 8)
        a, b = x[0, i].item(), x[0, i + 4].item()
        turned = at(x[0], 3)
        assert turned[i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
        assert turned[i + 4].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)
    scores = [(at(x[0], p + 5) @ at(x[1], p)).item() for p in (0, 1, 40)]
    assert scores[1:] == pytest.approx(scores[:1] * 2, abs=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 8, 16, 64])
def test_slopes_of_a_power_of_two_are_the_papers_geometric_sequence(heads: int) -> None:
    ratio = 2 ** (-8 / heads)
    assert alibi_slopes(heads).tolist() == pytest.approx([ratio ** (i + 1) for i in range(heads)], rel=1e-6)


def test_slopes_equal_blooms_for_every_number_of_heads() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in [*range(1, 40), 71, 112]:
        ones = torch.ones(1, 2)
        theirs = bloom.build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1]  # of key position 1: the slope
        torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_bias_is_slope_times_distance() -> None:
    slopes = alibi_slopes(3)
    bias = Alibi(slopes).bias(torch.arange(4), torch.arange(4), torch.float64)
    want = [[[slope * (key - query) for key in range(4)] for query in range(4)] for slope in slopes.tolist()]
    assert bias.tolist() == want


def test_rounded_bias_is_falcons() -> None:
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    heads, length = 12, 600
    theirs = falcon.build_alibi_tensor(torch.ones(1, length, dtype=torch.int64), heads, torch.float32) * 0.25
    places = torch.arange(length)
    bias = Alibi(alibi_slopes(heads), 0.25).bias(places[-1:], places, torch.float64)
    assert torch.equal(bias, (theirs - theirs[..., -1:]).double())
