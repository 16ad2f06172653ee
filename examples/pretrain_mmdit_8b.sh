#!/usr/bin/env bash
# Pretrain a text-to-image transformer of 8 billion parameters (tp 2 x pp 2, data parallel over what is left): from 4
# ranks, and meant for 256. Try without a GPU: examples/pretrain_mmdit_8b.sh --dry-run. All options: --help.
set -euo pipefail

DESCRIPTION="Pretrain an 8 B text-to-image transformer of joint blocks (tp 2 x pp 2, data parallel over what is left)."
CONFIG=diffusion/mmdit-8b.toml
ENTRY=pretrain_dit.py
DRY_RUN_WORLD_SIZE=256
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
