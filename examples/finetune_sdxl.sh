#!/usr/bin/env bash
# Fine-tune SDXL's UNet with ZeRO-2, bf16 over fp32 masters, a moving average and min-SNR weights, on this node's GPUs:
#   examples/finetune_sdxl.sh --pretrained_model_name_or_path sdxl --train_data_dir photos --output_dir runs/photos
# Which cards it fits: examples/finetune_sdxl.sh --dry_run. All options: --help. On many nodes: see examples/launch.sh.
set -euo pipefail

# shellcheck source=examples/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

program=("$ROOT/examples/finetune_sdxl.py" --mixed_precision bf16 --gradient_checkpointing --train_batch_size 4
    --use_ema --snr_gamma 5 --learning_rate 1e-5 --lr_scheduler constant_with_warmup --proportion_empty_prompts 0.1)
for argument in "$@"; do
    if [[ "$argument" =~ ^(-h|--help|--dry.run)$ ]]; then
        python="$(find_python)"
        exec "$python" "${program[@]}" "$@"
    fi
done
start_ranks "${program[@]}" "$@"
