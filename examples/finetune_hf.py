"""Fine-tune a causal language model of transformers with ZeRO, on one process or many.

    python examples/finetune_hf.py --output runs/finetuned
    torchrun --nproc-per-node 2 examples/finetune_hf.py --stage 3 --model path/to/folder --text book.txt

The model comes from a local folder (--model: config.json, weights, tokenizer), or is a small Llama made from a
configuration, whose tokens are bytes. The text is a file, or the Python standard library's own source. Afterwards the
output is a folder that from_pretrained loads. What ZeRO does is in one dictionary below, or in --config, a DeepSpeed
JSON or a TOML file.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import megatron_ds
from megatron_ds.deepspeed_json import auto_values
from megatron_ds.train.launch import RankInfo, run_main


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with its weights; default: a small Llama from scratch")
    parser.add_argument("--text", help="text file to train on; default: the standard library's source")
    parser.add_argument("--output", default="runs/finetuned", help="folder for the model; %(default)s")
    parser.add_argument("--config", help="DeepSpeed JSON or TOML file; default: made from the options below")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage, 0 to 3; %(default)s")
    parser.add_argument("--offload", default="none", help="none or cpu: optimizer state in host memory; %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps; %(default)s")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a forward pass; %(default)s")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches a step; %(default)s")
    parser.add_argument("--sequence", type=int, default=128, help="tokens a sequence; %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate; %(default)s")
    return parser.parse_args()


def tokens_of(args: argparse.Namespace) -> torch.Tensor:
    files = [Path(args.text)] if args.text else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(file.read_text(errors="replace") for file in files)[:2_000_000]
    if args.model is None:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return torch.tensor(AutoTokenizer.from_pretrained(args.model)(text)["input_ids"])


def make_model(args: argparse.Namespace) -> Any:
    """Without memory for its parameters: at stage 3 no rank ever holds all of them."""
    with megatron_ds.empty_parameters():
        if args.model:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_hidden_layers": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=args.sequence, **sizes))


def main(place: RankInfo) -> int:
    args = options()
    model = make_model(args)
    zero = {"stage": args.stage, "offload_optimizer": {"device": args.offload}}
    config = args.config or {"zero": zero, "accumulation": args.accumulation, "log": {"every": 10}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    auto = auto_values(hidden_size=model.config.hidden_size, micro_batch=args.micro_batch, clip_norm=1.0)
    engine = megatron_ds.initialize(model, config, optimizer, scheduler, weights=args.model, auto=auto)
    if engine.mesh.rank == 0:
        print(engine.bytes_table(), flush=True)

    tokens = tokens_of(args)
    # Every rank draws the same places and takes its own of them: the batch does not depend on the number of ranks.
    places, replicas = torch.Generator().manual_seed(0), engine.mesh.data
    first = last = None
    engine.train()
    for _ in range(args.steps * engine.sizes.accumulation):
        starts = torch.randint(len(tokens) - args.sequence, (replicas.size, args.micro_batch), generator=places)
        batch = torch.stack([tokens[start : start + args.sequence] for start in starts[replicas.rank].tolist()])
        batch = batch.to(engine.mesh.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        if result := engine.step():
            first, last = first or result.loss, result.loss
    engine.save_pretrained(args.output)
    if engine.mesh.rank == 0 and first is not None:
        if args.model:
            AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
        print(f"loss {first:.3f} -> {last:.3f}; AutoModelForCausalLM.from_pretrained({args.output!r}) loads the model")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
