"""Serve the model that `make train` has exported, and talk to it as any OpenAI client does.

Starts `megatron-ds serve` on a free port, streams one answer through the official client, and says how fast it came.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "def main(argv):\n    "


def newest_export(root: Path) -> Path:
    """The last run's Hugging Face folder."""
    found = sorted(root.glob("*-ranks/hf/config.json"))
    if not found:
        raise SystemExit(f"{root} has no exported model; run `make train` first, or name one: --model FOLDER")
    return found[-1].parent


def start(model: Path, arguments: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The server, and the address at which it answers."""
    command = [sys.executable, "-m", "megatron_ds.inference.command", "serve", str(model), "--port", "0", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if "http://" in line:
            return server, line.split()[-1]
    raise SystemExit(server.wait())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or a checkpoint (default: the newest of runs/demo)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=128)
    options, arguments = parser.parse_known_args()
    from openai import OpenAI

    server, address = start(options.model or newest_export(Path("runs/demo")), arguments)
    try:
        client = OpenAI(base_url=address, api_key="none", timeout=600)
        name = client.models.list().data[0].id
        asked = {
            "model": name,
            "prompt": options.prompt,
            "temperature": 0.7,
            "seed": 1,
            "extra_body": {"ignore_eos": True},
        }
        client.completions.create(**asked, max_tokens=2)
        print(f"\n{options.prompt}", end="", flush=True)
        begun, first = time.perf_counter(), 0.0
        usage = None
        stream = client.completions.create(
            **asked, max_tokens=options.max_tokens, stream=True, stream_options={"include_usage": True}
        )
        for piece in stream:
            first = first or time.perf_counter() - begun
            usage = piece.usage or usage
            print(piece.choices[0].text if piece.choices else "", end="", flush=True)
        seconds = time.perf_counter() - begun
        count = usage.completion_tokens if usage is not None else 0
        rate = (count - 1) / (seconds - first)
        print(f"\n\n{count} tokens: the first after {1000 * first:.0f} ms, then {rate:.0f} tokens/s")
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    main()
