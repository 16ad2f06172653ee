#!/usr/bin/env bash
# Serve a checkpoint or a Hugging Face folder to OpenAI clients.
#
#   MODEL=runs/llama/checkpoints TP=2 bash examples/serve.sh --api-key secret
#
# MODEL  a run's checkpoint directory, one step's, or a folder of transformers (required)
# TP     ranks that every layer's weights are split over   (default: 1)
# PP     ranks that the layers are split over              (default: 1)
# HOST, PORT   where to listen                             (default: 127.0.0.1, 8000)
# PYTHON the Python that has torch and megatron_ds         (default: .venv/bin/python of this checkout)
# Everything after that is passed on; see --help.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set -/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
    exec "$python" -m megatron_ds.inference.command serve --help
fi

exec "$python" -m megatron_ds.inference.command serve "${MODEL:?name the model: MODEL=runs/llama/checkpoints}" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
    --tensor-parallel-size "${TP:-1}" --pipeline-parallel-size "${PP:-1}" "$@"
