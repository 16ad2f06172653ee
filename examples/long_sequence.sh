#!/usr/bin/env bash
# Train a small model on sequences of 8,192 tokens with block-sparse attention (BigBird), on a CPU: 1 process, minutes.
# Only live blocks are computed, so a step's time and memory grow with the sequence, not with its square.
# Any setting may follow, e.g. --train.sequence-length 16384 or --model.attention.sparse.mode none to compare.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
    echo "error: no $python; run 'make install' in $root, or set PYTHON" >&2
    exit 2
fi

# Random tokens unless --data.prefix names a corpus (and --data.no-synthetic): this shows the length, not the learning.
exec "$python" "$root/examples/pretrain_gpt.py" --config "$root/examples/configs/demo.toml" \
    --output runs/long-sequence \
    --mesh.tp 1 --mesh.pp 1 \
    --data.synthetic \
    --train.sequence-length 8192 --train.global-batch 1 --train.micro-batch 1 --train.steps 5 \
    --optimizer.warmup-steps 1 \
    --checkpoint.no-save-at-end \
    --model.attention.sparse.mode bigbird \
    --model.attention.sparse.different-layout-per-head \
    "$@"
