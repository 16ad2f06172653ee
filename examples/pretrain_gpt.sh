#!/usr/bin/env bash
# Pretrain GPT-2 345M (tp 2 x pp 2, data parallel over what is left): from 4 ranks.
# Try without a GPU: examples/pretrain_gpt.sh --dry-run. All options: --help.
set -euo pipefail

DESCRIPTION="Pretrain GPT-2 345M (tp 2 x pp 2, data parallel over what is left): from 4 ranks."
CONFIG=gpt2-345m.toml
DRY_RUN_WORLD_SIZE=8
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
