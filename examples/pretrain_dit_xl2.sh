#!/usr/bin/env bash
# Pretrain DiT-XL/2 at 256 x 256 pixels, or with --pixels 512 first at 512 x 512; data parallel (ZeRO-1): from 1 rank.
# Try without a GPU: examples/pretrain_dit_xl2.sh --dry-run. All options: --help.
set -euo pipefail

CONFIG=diffusion/dit-xl2-256.toml
if [[ "${1:-}" == --pixels ]]; then
    case "${2:-}" in
        256 | 512) CONFIG="diffusion/dit-xl2-$2.toml" ;;
        *)
            echo "error: --pixels ${2:-} has no configuration; use 256 or 512" >&2
            exit 2
            ;;
    esac
    shift 2
fi
DESCRIPTION="Pretrain DiT-XL/2 at 256 x 256 pixels, or with --pixels 512 (given first) at 512 x 512: from 1 rank."
ENTRY=pretrain_dit.py
DRY_RUN_WORLD_SIZE=8
# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
