"""Write a model in fewer bits, in the form of compressed-tensors, and say what that changes on a text.

python tools/quantize.py runs/mine/hf runs/mine/int8 --scheme int8 --text README.md

python tools/quantize.py ~/models/Llama-3.2-1B ~/models/Llama-3.2-1B-fp8 --scheme fp8

`megatron-ds serve` and transformers (with compressed-tensors installed) read the folder as it is; transformers not that
of a Falcon, whose linear layers there know no quantised weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_ds.data.cli import run
from megatron_ds.data.tokenizers import load_tokenizer
from megatron_ds.errors import ConfigError
from megatron_ds.inference.quantized_export import Difference, compare, export_quantized
from megatron_ds.inference.serving_options import Scheme


@dataclass(frozen=True)
class Quantize:
    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """The folder with config.json and the weights, as transformers has it (of a checkpoint: convert.py to-hf)."""
    output: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUTPUT")]]
    """The folder to make; it must not exist or be empty."""
    scheme: Scheme = "int8"
    """int8 and int4 (groups of 32): weights alone. w8a8 (int8) and fp8: each token's inputs too, as it comes."""
    text: Path | None = None
    """Compare both models on this text."""
    tokenizer: str | None = None
    """With --text: the tokenizer, if not the one in the folder."""
    window: int = 512
    """With --text: tokens that are read together."""
    max_windows: int = 32
    """With --text: how many such."""


def main(options: Quantize) -> None:
    windows = None if options.text is None else _windows(options, options.text)
    written = export_quantized(options.model, options.output, options.scheme, progress=True)
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (options.model, written)]
    print(f"{written}: {sizes[1] / 1e6:,.1f} MB of weights" + (f" ({sizes[0] / 1e6:,.1f})" if sizes[0] else ""))
    if windows is not None:
        print(_told(compare(options.model, written, windows, progress=True)))


def _windows(options: Quantize, text: Path) -> list[list[int]]:
    if options.window < 2 or options.max_windows < 1:
        raise ConfigError(f"--window {options.window} --max-windows {options.max_windows}: use 2 and 1 at least")
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    ids = [int(token) for token in tokenizer.encode_batch([text.read_text(encoding="utf-8")])[0]]
    starts = range(0, len(ids) - 1, options.window)[: options.max_windows]
    if not starts:
        raise ConfigError(f"--text {text} has {len(ids)} tokens; it takes 2 to predict one")
    return [window for start in starts if len(window := ids[start : start + options.window]) > 1]


def _told(d: Difference) -> str:
    before, after = d.perplexities
    return (
        f"on {d.tokens:,} tokens\n"
        f"perplexity      {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.2f}%)\n"
        f"logits          {100 * d.logit:.2f}% off (root mean square), {d.largest:.3f} at most\n"
        f"KL divergence   {d.kl:.2e} nats a token\n"
        f"likeliest token the same for {100 * d.agreement:.2f}%"
    )


if __name__ == "__main__":
    run(main, Quantize, __doc__)
