#!/usr/bin/env bash
# Pretrain GPT-3 175B (tp 8 x pp 16, data parallel over what is left): from 128 ranks.
# Try without a GPU: examples/pretrain_gpt3_175b.sh --dry-run. All options: --help.
set -euo pipefail

DESCRIPTION="Pretrain GPT-3 175B (tp 8 x pp 16, data parallel over what is left): from 128 ranks."
CONFIG=gpt3-175b.toml
DRY_RUN_WORLD_SIZE=1024
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
