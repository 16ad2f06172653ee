"""The one-process run, which the matrix trusts, against code that is not ours.

First three steps of training against plain torch with ``torch.optim`` (float64), then logits and loss against
``transformers`` for the same weights. Weights are copied by hand, not with the conversion tables.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parity_rows import STEPS, UNUSED_STEPS, Row, config_of, reference_config
from parity_run import Outcome, Part, steps_of, train
from plain_gpt import PlainGPT, plain_loss
from torch import Tensor

from megatron_ds.config import ModelConfig, RunConfig, from_dict
from megatron_ds.mesh import Mesh
from megatron_ds.models.gpt import GPT
from megatron_ds.models.transformer import StageSettings


def plain_state(ours: dict[str, Tensor], m: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under the names and in the shapes of the plain model."""
    state = {"tokens.weight": ours["embedding.weight"][: m.vocab_size]}
    names = {
        "position.weight": "positions.weight",
        "embedding_norm.weight": "tokens_norm.weight",
        "embedding_norm.bias": "tokens_norm.bias",
        "final_norm.weight": "last_norm.weight",
        "final_norm.bias": "last_norm.bias",
    }
    if not m.tied_embeddings:
        state["head.weight"] = ours["head.weight"][: m.vocab_size]
    for i in range(m.num_layers):
        a, b = f"layers.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            names[f"{a}.attention_norm.{kind}"] = f"{b}.first_norm.{kind}"
            names[f"{a}.mlp_norm.{kind}"] = f"{b}.second_norm.{kind}"
            names[f"{a}.attention.out.{kind}"] = f"{b}.attention.output.{kind}"
            names[f"{a}.attention.q_norm.{kind}"] = f"{b}.attention.query_norm.{kind}"
            names[f"{a}.attention.k_norm.{kind}"] = f"{b}.attention.key_norm.{kind}"
            names[f"{a}.mlp.up.{kind}"] = f"{b}.up.{kind}"
            names[f"{a}.mlp.down.{kind}"] = f"{b}.down.{kind}"
            if f"{a}.attention.qkv.{kind}" in ours:
                qkv = ours[f"{a}.attention.qkv.{kind}"]
                state[f"{b}.attention.query.{kind}"] = qkv[:, :-2].flatten(0, 2)
                state[f"{b}.attention.key.{kind}"] = qkv[:, -2].flatten(0, 1)
                state[f"{b}.attention.value.{kind}"] = qkv[:, -1].flatten(0, 1)
        if f"{a}.mlp.gate_up.weight" in ours:
            state[f"{b}.gate.weight"], state[f"{b}.up.weight"] = ours[f"{a}.mlp.gate_up.weight"]
    return state | {plain: ours[name] for name, plain in names.items() if name in ours}


def plain_of(m: ModelConfig, architecture: str, length: int) -> PlainGPT:
    return PlainGPT(
        architecture,
        layers=m.num_layers,
        width=m.hidden_size,
        heads=m.num_heads,
        kv_heads=m.num_kv_heads,
        head_dim=m.head_size,
        inner=m.ffn_size,
        vocabulary=m.vocab_size,
        length=length,
        tied=m.tied_embeddings,
        qk_norm=m.qk_norm,
    ).double()


def tensors(parts: list[Part]) -> dict[str, Tensor]:
    return {part.name: torch.from_numpy(part.values.reshape(part.global_shape)) for part in parts}


def initial(config: RunConfig) -> GPT:
    model = GPT(config.model, StageSettings(dtype=torch.float64))
    model.initialize(config.seed)
    return model


def train_plain(
    config: RunConfig, architecture: str
) -> tuple[PlainGPT, list[tuple[float, float]], list[dict[str, Tensor]]]:
    """Three steps in plain torch: the model after them, losses and norms, and the gradients of each step."""
    model = plain_of(config.model, architecture, config.train.sequence_length)
    ours = {name: p.detach().clone() for name, p in initial(config).named_parameters()}
    model.load_state_dict(plain_state(ours, config.model))
    o = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if o.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, lr=o.lr, momentum=0.9, foreach=False)
    scalars, gradients = [], []
    for step, batches in enumerate(steps_of(config, Mesh.single()), start=1):
        batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
        documents = batch.get("document_ids", torch.zeros_like(batch["tokens"]))
        logits = model(batch["tokens"], batch["position_ids"], documents)
        loss = plain_loss(
            logits, batch["labels"], batch["loss_mask"], config.train.label_smoothing, config.train.z_loss
        )
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        # One step of warm-up, then a cosine to zero at step 5.
        for group in optimizer.param_groups:
            group["lr"] = o.lr * (1 + math.cos(math.pi * (step - 1) / 4)) / 2
        optimizer.step()
        scalars.append((loss.item(), norm.item()))
    return model, scalars, gradients


ROWS = [
    Row((1, 1, 1), architecture="gpt2", accumulation=4, smoothing=True),
    Row((1, 1, 1), architecture="gpt2", accumulation=4, tied=False, documents=True, optimizer="sgd"),
    Row((1, 1, 1), architecture="llama", accumulation=4, tied=False, documents=True, smoothing=True),
    Row((1, 1, 1), architecture="llama", accumulation=4, qk_norm=True, optimizer="sgd"),
    Row((1, 1, 1), architecture="bloom", accumulation=4, documents=True, smoothing=True, qk_norm=True),
]


@pytest.mark.parametrize("clip_norm", [1e3, 0.5])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_training_equals_plain_torch(row: Row, clip_norm: float) -> None:
    tolerance = 1e-10
    values = reference_config(config_of(row)).to_dict()
    values["optimizer"]["clip_norm"] = clip_norm
    values["train"]["steps"] = STEPS + UNUSED_STEPS
    config = from_dict(RunConfig, values, "test")
    ours: Outcome = train(config, Mesh.single())
    model, scalars, gradients = train_plain(config, row.architecture)
    assert len(ours.scalars) == len(scalars) == STEPS
    for (loss, norm), (want_loss, want_norm) in zip(ours.scalars, scalars):
        assert loss == pytest.approx(want_loss, abs=tolerance)
        assert norm == pytest.approx(want_norm, rel=tolerance)
    assert (clip_norm < 1) == all(norm > clip_norm for _, norm in scalars)
    for step in range(STEPS):
        compare(
            plain_state(tensors(ours.gradients[step]), config.model), gradients[step], tolerance, f"step {step + 1}"
        )
    compare(plain_state(tensors(ours.parameters), config.model), model.state_dict(), tolerance, "parameter")


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, what: str) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() < tolerance * max(1.0, tensor.abs().max()), f"{what}: {name}"


# transformers


def random_model(**settings: Any) -> GPT:
    """A model in float64 whose biases and norm weights are not what they start as."""
    config = ModelConfig(num_layers=2, hidden_size=32, vocab_size=53, max_positions=25, init_std=0.2, **settings)
    model = GPT(config, StageSettings(dtype=torch.float64))
    model.initialize(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("bias"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def check_against(theirs: Any, ours: GPT, tolerance: float) -> None:
    """Logits, and the loss with a third of the labels masked; transformers shifts the labels itself."""
    dtype = next(theirs.parameters()).dtype
    ours = ours.to(dtype)
    text = torch.randint(53, (3, 25), generator=torch.Generator().manual_seed(5))
    counted = torch.rand(3, 24, generator=torch.Generator().manual_seed(6)) > 0.3
    batch = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": counted,
        "position_ids": torch.arange(24).expand(3, -1),
        "sample_index": torch.arange(3),
    }
    labels = torch.cat((text[:, :1], text[:, 1:].masked_fill(~counted, -100)), dim=1)
    with torch.no_grad():
        out = theirs.eval()(input_ids=text, labels=labels)
        want = out.logits[:, :-1]
        assert want.std() > 0.5  # weights large enough for a mistake to be seen
        assert (ours.eval().logits(batch) - want).abs().max() < tolerance
        # The loss is taken in fp32 there.
        assert (ours(batch) / counted.sum()).item() == pytest.approx(out.loss.item(), abs=max(tolerance, 2e-6))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor


def test_gpt2_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    ours = random_model(num_heads=4)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=53, n_positions=25, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
    ).double()
    p = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(p["embedding.weight"][:53])
        theirs.transformer.wpe.weight.copy_(p["position.weight"])
        for kind in ("weight", "bias"):
            getattr(theirs.transformer.ln_f, kind).copy_(p[f"final_norm.{kind}"])
            for i, block in enumerate(theirs.transformer.h):
                a = f"layers.{i}"
                getattr(block.ln_1, kind).copy_(p[f"{a}.attention_norm.{kind}"])
                getattr(block.ln_2, kind).copy_(p[f"{a}.mlp_norm.{kind}"])
                # Conv1D keeps its weight as [in, out], with all queries, then all keys, then all values.
                qkv = p[f"{a}.attention.qkv.{kind}"]
                flat = torch.cat([qkv[:, j].flatten(0, 1) for j in range(3)])
                getattr(block.attn.c_attn, kind).copy_(transposed(flat))
                getattr(block.attn.c_proj, kind).copy_(transposed(p[f"{a}.attention.out.{kind}"]))
                getattr(block.mlp.c_fc, kind).copy_(transposed(p[f"{a}.mlp.up.{kind}"]))
                getattr(block.mlp.c_proj, kind).copy_(transposed(p[f"{a}.mlp.down.{kind}"]))
    check_against(theirs, ours, 1e-11)


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING], ids=["plain", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_equals_transformers(scaling: dict[str, Any] | None, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    ours = random_model(
        num_heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_hidden_size=72,
        position="rope",
        rope_theta=5e3,
        rope_scaling=scaling,
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tied_embeddings=tied,
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=53,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            max_position_embeddings=25,
            tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 5e3, **(scaling or {"rope_type": "default"})},
        )
    ).double()
    p = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(p["embedding.weight"][:53])
        if not tied:
            theirs.lm_head.weight.copy_(p["head.weight"][:53])
        theirs.model.norm.weight.copy_(p["final_norm.weight"])
        for i, layer in enumerate(theirs.model.layers):
            a = f"layers.{i}"
            layer.input_layernorm.weight.copy_(p[f"{a}.attention_norm.weight"])
            layer.post_attention_layernorm.weight.copy_(p[f"{a}.mlp_norm.weight"])
            qkv = p[f"{a}.attention.qkv.weight"]
            layer.self_attn.q_proj.weight.copy_(qkv[:, :2].flatten(0, 2))
            layer.self_attn.k_proj.weight.copy_(qkv[:, 2].flatten(0, 1))
            layer.self_attn.v_proj.weight.copy_(qkv[:, 3].flatten(0, 1))
            layer.self_attn.o_proj.weight.copy_(p[f"{a}.attention.out.weight"])
            layer.mlp.gate_proj.weight.copy_(p[f"{a}.mlp.gate_up.weight"][0])
            layer.mlp.up_proj.weight.copy_(p[f"{a}.mlp.gate_up.weight"][1])
            layer.mlp.down_proj.weight.copy_(p[f"{a}.mlp.down.weight"])
    # Its RMSNorm computes in fp32 whatever the dtype.
    check_against(theirs, ours, 2e-5)


def test_bloom_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    heads = 4
    ours = random_model(num_heads=heads, position="alibi", embedding_norm=True)
    theirs = transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=53, hidden_size=32, n_layer=2, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0
        )
    ).double()
    p = dict(ours.named_parameters())
    with torch.no_grad():
        theirs.transformer.word_embeddings.weight.copy_(p["embedding.weight"][:53])
        for kind in ("weight", "bias"):
            getattr(theirs.transformer.word_embeddings_layernorm, kind).copy_(p[f"embedding_norm.{kind}"])
            getattr(theirs.transformer.ln_f, kind).copy_(p[f"final_norm.{kind}"])
            for i, block in enumerate(theirs.transformer.h):
                a = f"layers.{i}"
                getattr(block.input_layernorm, kind).copy_(p[f"{a}.attention_norm.{kind}"])
                getattr(block.post_attention_layernorm, kind).copy_(p[f"{a}.mlp_norm.{kind}"])
                getattr(block.self_attention.query_key_value, kind).copy_(p[f"{a}.attention.qkv.{kind}"].flatten(0, 2))
                getattr(block.self_attention.dense, kind).copy_(p[f"{a}.attention.out.{kind}"])
                getattr(block.mlp.dense_h_to_4h, kind).copy_(p[f"{a}.mlp.up.{kind}"])
                getattr(block.mlp.dense_4h_to_h, kind).copy_(p[f"{a}.mlp.down.{kind}"])
    # Its GELU is the tanh formula with the constant cut to 8 digits.
    check_against(theirs, ours, 1e-6)
