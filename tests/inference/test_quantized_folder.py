"""Quantised folders: read by transformers (with compressed-tensors) as by us, on any mesh, and refused where broken."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file, save_file
from scripts_as_modules import load_script
from served import folder_logits
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from megatron_ds.data.tokenizers import ByteTokenizer
from megatron_ds.errors import CheckpointError, ConfigError
from megatron_ds.inference import LLM, SamplingParams
from megatron_ds.inference.quantization import SCHEMES, packed, unpacked
from megatron_ds.inference.quantized_export import compare, export_quantized
from megatron_ds.inference.serving_recipes import linear_layers
from megatron_ds.testing import run_ranks

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "initializer_range": 0.06,
}  # fmt: skip


def save_model(family: str, folder: Path, dtype: torch.dtype, vocab_size: int = 99) -> None:
    torch.manual_seed(0)
    if family == "llama":  # separate, grouped queries
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": vocab_size}, num_key_value_heads=2))
    elif family == "phi3":  # fused, stacked
        model = Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=1))
    else:  # interleaved, with biases
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    model.to(dtype).save_pretrained(folder)
    (folder / "README.md").write_text("a card\n")


@pytest.mark.parametrize("family", ["llama", "phi3", "neox"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_the_same_from_the_folder(tmp_path: Path, scheme: str, family: str) -> None:
    save_model(family, tmp_path / "whole", torch.float32)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", scheme)
    assert (folder / "README.md").read_text() == "a card\n"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        want, unquantized = theirs(tokens).logits, whole(tokens).logits
    found = folder_logits(folder, tokens)
    error = (found - want).abs() / want.std()
    if (
        scheme == "w8a8"
    ):  # compressed-tensors takes a 127.5th of a token's largest input, where we and vLLM take a 127th
        assert error.mean() < 0.02
    else:
        assert error.max() < (0.03 if scheme == "fp8" else 1e-5)  # inputs between two FP8 values may become either
    assert (unquantized - want).abs().mean() > 4e-3 * want.std(), "nothing was quantised"


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_folders_of_others_are_read(tmp_path: Path, scheme: str) -> None:
    """Compressed by compressed-tensors itself, with groups and scales that we would not choose."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    inputs = None
    if scheme == "int4":
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64)
    else:
        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel")
        inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight_scale
            scale.data.copy_(module.weight.view(*scale.shape, -1).abs().amax(2) / (7.5 if scheme == "int4" else 400))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits
    assert (folder_logits(tmp_path, tokens) - want).abs().max() < (0.03 if inputs else 1e-5) * want.std()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folder_is_what_quantising_in_memory_gives(tmp_path: Path, scheme: str) -> None:
    save_model("llama", tmp_path / "whole", torch.bfloat16)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", scheme)
    with (
        LLM(tmp_path / "whole", quantization=scheme) as one,
        LLM(folder) as two,
    ):
        layers = [llm.engine.runner.model.layers["1"] for llm in (one, two)]
        states = [dict(layer.named_buffers()) for layer in layers]
        assert states[0].keys() == states[1].keys() and len(states[0]) >= 8
        for name, value in states[0].items():
            assert torch.equal(value.view(torch.uint8), states[1][name].view(torch.uint8)), name
        for mine, theirs in zip(*(linear_layers(layer) for layer in layers), strict=True):
            x = torch.randn(3, mine.weight.shape[-1], dtype=torch.bfloat16)
            assert torch.equal(mine.recipe.product(x, None, None), theirs.recipe.product(x, None, None))
        params = SamplingParams(temperature=0.0, max_tokens=4)
        assert two.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    difference = compare(tmp_path / "whole", folder, [list(range(3, 40)), list(range(20, 60))])
    most = {"int8": 0.03, "w8a8": 0.04, "fp8": 0.1, "int4": 0.3}[scheme]
    assert difference.tokens == 75 and most / 4 < difference.logit < most and difference.kl > 0
    same = compare(folder, folder, [list(range(3, 40))])
    assert same.logit == same.kl == 0 and same.agreement == 1 and same.perplexities[0] == same.perplexities[1]


def test_the_tool_says_what_fewer_bits_change_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers has it of both folders, window by window."""
    save_model("llama", tmp_path / "whole", torch.float32, vocab_size=257)
    ByteTokenizer().save_hf(tmp_path / "whole")
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text()[:300])
    tool = load_script("tools/quantize.py")
    fewer = tmp_path / "fewer"
    tool.main(tool.Quantize(tmp_path / "whole", fewer, "int4", text, window=64, max_windows=3))
    windows = torch.tensor(list(text.read_bytes()[: 3 * 64])).view(3, 64)  # a byte's token is its number
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path).eval()(windows).logits[:, :-1].double()
                         for path in (tmp_path / "whole", fewer))  # fmt: skip
    nll = [cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item() for logits in (before, after)]
    first, second = (logits - logits.mean(-1, keepdim=True) for logits in (before, after))
    kl = kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    said = re.search(
        r"on 189 tokens\nperplexity +(\S+) -> (\S+) \((\S+)%\)\nlogits +(\S+)% off .*, (\S+) at most\n"
        r"KL divergence +(\S+) nats a token\nlikeliest token the same for (\S+)%", capsys.readouterr().out,
    )  # fmt: skip
    assert said is not None
    want = [
        math.exp(nll[0]), math.exp(nll[1]), 100 * math.expm1(nll[1] - nll[0]),
        100 * (second - first).norm() / first.norm(), (second - first).abs().max(), kl, 100 * same,
    ]  # fmt: skip
    last_digits = (1e-4, 1e-4, 1e-2, 1e-2, 1e-3, 0.0, 1e-2)
    for number, expected, digit in zip(said.groups(), want, last_digits, strict=True):
        assert float(number) == pytest.approx(float(expected), rel=0.01, abs=digit)
    assert want[3] > 1 and want[6] < 100
    for wrong, what in (({"window": 1}, "--window 1"), ({"max_windows": 0}, "--max-windows 0")):
        with pytest.raises(ConfigError, match=what):
            tool.main(tool.Quantize(tmp_path / "whole", tmp_path / "third", "int8", text, **wrong))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_take_their_parts_of_the_folder(tmp_path: Path, scheme: str) -> None:
    save_model("llama", tmp_path / "whole", torch.float64)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", scheme)
    tokens = torch.arange(3, 40).unsqueeze(0)
    want = folder_logits(folder, tokens)
    for tp in (2, 4):  # 4: more ranks than key/value heads
        for found in run_ranks(folder_logits, tp, folder, tokens, tp):
            assert (found - want).abs().max() < 1e-9 * want.std()


def test_numbers_come_out_of_words_as_they_went_in() -> None:
    for bits in (4, 8):
        values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, 61), dtype=torch.int8)
        assert torch.equal(unpacked(packed(values, bits), bits, 61), values)
    assert packed(torch.tensor([[-8, 7, 0, 0, 0, 0, 0, -8]]).to(torch.int8), 4).tolist() == [[0x088888F0]]


def changed(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("int8", lambda t: t.pop(f"{NAME}_scale"), f"{NAME}_(packed|shape) is part of a quantised tensor without its"),
        ("w8a8", lambda t: t.pop(f"{NAME}_scale"), f"{NAME} is torch.int8 and has no {NAME}_scale"),
        ("fp8", lambda t: t.pop(f"{NAME}_scale"), f"{NAME} is torch.float8_e4m3fn and has no {NAME}_scale"),
        ("fp8", lambda t: t.update({f"{NAME}_scale": torch.ones(3)}), r"_scale \[3, 1\] .* has .*_scale \[128, 1\]"),
        ("fp8", lambda t: t.update({NAME: t[NAME].float()}), r"float32, .* has .*weight \[128, 128\] of torch.float8"),
        ("int4", lambda t: t.pop(f"{NAME}_packed"), f"is kept as {NAME}_scale .* has {NAME}_packed"),
        ("int4", lambda t: t.update({f"{NAME}_shape": torch.tensor([64, 999])}), r"packed \[128, 16\] .*d \[64, 125\]"),
        ("int8", lambda t: t.update({f"{NAME}_zero_point": torch.ones(64, 1)}), "_zero_point is part of a quantised"),
    ],
)  # fmt: skip
def test_damaged_folders_are_refused(tmp_path: Path, scheme: str, change: Any, message: str) -> None:
    save_model("llama", tmp_path / "whole", torch.float32)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", scheme)
    changed(folder, change)
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "is quantised by 'gptq'; serve the unquantised model"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "or the key/value cache"),
        ({"config_groups": {"a": {}, "b": {}}}, "in several ways"),
        ({"quantization_status": "frozen"}, "is not compressed"),
        ({"transform_config": {"config_groups": {}}}, "there is a transform_config besides"),
        ({"format": "mxfp4-pack-quantized"}, "in the format 'mxfp4-pack-quantized', which is none of int8"),
        ({"symmetric": False}, "'symmetric': False.*which is none of"),
        ({"num_bits": 5}, "'num_bits': 5.*which is none of"),
        ({"actorder": "group"}, "'actorder': 'group'.*which is none of"),
        ({"group_size": 48}, r"_scale \[128, 4\] .*, where 'int4' in groups of 48 has"),
    ],
)
def test_other_schemes_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model("llama", tmp_path / "whole", torch.float32)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", "int4")
    config = json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]
    group = said["config_groups"]["group_0"]
    if change.keys() & {"symmetric", "num_bits", "actorder", "group_size"}:
        group["weights"].update(change)
    else:
        said.update(change)
        group.update({name: change[name] for name in change.keys() & {"format"}})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        LLM(folder)


def test_what_cannot_be_quantised_or_served_like_this(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "whole", torch.float32)
    folder = export_quantized(tmp_path / "whole", tmp_path / "fewer", "int8")
    with pytest.raises(ConfigError, match="quantization='fp8', but the weights are 'int8' already"):
        LLM(folder, quantization="fp8")
    with pytest.raises(ConfigError, match="batch_invariant=True goes with quantization=None"):
        LLM(folder, batch_invariant=True)
    with pytest.raises(CheckpointError, match=r"is quantised .quant_method='compressed-tensors'.: dequantise first"):
        export_quantized(folder, tmp_path / "again", "int8")
    with pytest.raises(ConfigError, match="is no folder of transformers; a checkpoint becomes one by"):
        export_quantized(tmp_path, tmp_path / "again", "int8")
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        export_quantized(tmp_path / "whole", folder, "int8")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=99)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel keeps its weights as \[in, out\]"):
        export_quantized(tmp_path / "gpt2", tmp_path / "again", "int8")
    assert not (tmp_path / "again").exists()
