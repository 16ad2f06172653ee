#!/usr/bin/env bash
# Train the diffusion transformer of `make train-diffusion` (tp 2 x pp 2, data parallel over what is left): from 4 ranks.
# Try without a GPU: examples/pretrain_dit_demo.sh --dry-run. All options: --help.
set -euo pipefail

DESCRIPTION="Train the diffusion transformer of 'make train-diffusion' on digits (tp 2 x pp 2): from 4 ranks."
CONFIG=diffusion/digits.toml
ENTRY=pretrain_dit.py
DRY_RUN_WORLD_SIZE=8
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
