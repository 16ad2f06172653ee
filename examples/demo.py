"""The whole way on this machine: text to tokens, training on 8 ranks, the trained model in `transformers`.

    python examples/demo.py [--output runs/demo] [--steps N] [dotted settings of examples/pretrain_gpt.py]

The text is the Python standard library's own source. Training runs on 8 ranks (TP 2 x PP 2 x DP 2, sequence parallel,
ZeRO-1) on the CPU, or on the machine's GPUs; then once more on one process, to show that the losses are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_ds.convert.hugging_face import export_hf
from megatron_ds.data.corpus import build_corpus
from megatron_ds.data.preprocess import PreprocessOptions, preprocess
from megatron_ds.data.tokenizer_training import train_tokenizer
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.train.demonstration import run_twice

HERE = Path(__file__).parent
SCRIPT = HERE / "pretrain_gpt.py"
PROMPT = "def __init__(self"


def prepare_data(folder: Path) -> list[str]:
    """Corpus, tokenizer and dataset, each made once; the settings that use them."""
    corpus, tokenizer, prefix = folder / "corpus.jsonl", folder / "tokenizer", folder / "corpus"
    if not corpus.exists():
        found = build_corpus(corpus, max_megabytes=8)
        print(f"corpus: {found.documents} files of this Python's own source, {found.text_bytes / 1e6:.1f} MB")
    if not tokenizer.exists():
        train_tokenizer([str(corpus)], tokenizer, vocab_size=4096, max_megabytes=3)
    if not prefix.with_suffix(".idx").exists():
        preprocess([str(corpus)], prefix, PreprocessOptions(str(tokenizer), append_eod=True))
    # No test split: a Python without its own tests has so few files that a thousandth of them is none.
    return ["--data.prefix", str(prefix), "--data.tokenizer", str(tokenizer), "--data.split", "970,30,0"]


def generate(folder: Path) -> str:
    """A sample from the exported model, by `transformers` alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory of everything it makes")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    options, overrides = parser.parse_known_args()
    start = time.perf_counter()
    root: Path = options.output
    settings = ["--config", str(HERE / "configs/demo.toml"), "--train.steps", str(options.steps)]
    settings += prepare_data(root / "data") + overrides
    runs = run_twice(SCRIPT, settings, root, "demo: the same seed on two meshes", "nats a token", start)
    exported = runs.output / "hf"
    export_hf(runs.output / "checkpoints", exported, tokenizer=load_tokenizer(root / "data/tokenizer"))
    sample = f"sample by transformers:\n---\n{generate(exported)}\n---"
    runs.report([sample], [("Hugging Face model", exported)])


if __name__ == "__main__":
    main()
