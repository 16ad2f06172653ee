#!/usr/bin/env bash
# Pretrain Llama 3 8B (tp 2 x pp 2, data parallel over what is left): from 4 ranks.
# Try without a GPU: examples/pretrain_llama3_8b.sh --dry-run. All options: --help.
set -euo pipefail

DESCRIPTION="Pretrain Llama 3 8B (tp 2 x pp 2, data parallel over what is left): from 4 ranks."
CONFIG=llama3-8b.toml
DRY_RUN_WORLD_SIZE=8
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
