#!/usr/bin/env bash
# What the pretraining scripts share: torchrun on one node or many, or the dry run. Sourced, not run: a script sets
# DESCRIPTION, CONFIG (a file in examples/configs) and DRY_RUN_WORLD_SIZE, perhaps ENTRY, then calls `launch "$@"`.
# A script with options of its own calls `start_ranks program.py ...`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    cat <<TEXT
$DESCRIPTION

usage: $0 [--dry-run [--world-size N] [--rank R]] [--dotted.key VALUE ...]

  --dry-run       build one rank of the mesh without memory or other ranks and print the layout, the bytes a rank
                  needs and the pipeline's bubble (world size $DRY_RUN_WORLD_SIZE unless given here or by NNODES and GPUS_PER_NODE);
                  with --layouts, compare every mesh of these ranks and ZeRO stage (--gpu-gb N: memory of a GPU)
  --dotted.key    any setting of examples/configs/$CONFIG, e.g. --data.prefix corpus/text_document --mesh.tp 4;
                  all of them: python examples/${ENTRY:-pretrain_gpt.py} --help

environment (run the same command on every node, with its own NODE_RANK):
  GPUS_PER_NODE   ranks a node                              (default: its GPUs; 1 where there is none)
  NNODES          number of nodes                           (default: 1)
  NODE_RANK       this node, from 0                         (default: 0, on one node alone)
  MASTER_ADDR     address of node 0                         (default: localhost, on one node alone)
  MASTER_PORT     a free port of node 0                     (default: 29500)
  PYTHON          the Python that has torch and megatron_ds (default: .venv/bin/python of this checkout)
TEXT
}

launch() {
    local python dry_run=false passed=()
    python="$(find_python)"
    local dry_world="$DRY_RUN_WORLD_SIZE"
    if [[ -n "${GPUS_PER_NODE:-}" ]]; then
        dry_world=$((${NNODES:-1} * GPUS_PER_NODE))
    fi
    local world_size="" rank=""
    while (($#)); do
        case "$1" in
            -h | --help)
                usage
                exit 0
                ;;
            --dry-run) dry_run=true ;;
            --world-size | --rank)
                if (($# < 2)); then
                    echo "error: $1 needs a number" >&2
                    exit 2
                fi
                if [[ "$1" == --rank ]]; then rank="$2"; else world_size="$2"; fi
                shift
                ;;
            --world-size=*) world_size="${1#*=}" ;;
            --rank=*) rank="${1#*=}" ;;
            *) passed+=("$1") ;;
        esac
        shift
    done
    local entry=("$ROOT/examples/${ENTRY:-pretrain_gpt.py}" --config "$ROOT/examples/configs/$CONFIG")
    if $dry_run; then
        exec "$python" "${entry[@]}" --dry-run --world-size "${world_size:-$dry_world}" --rank "${rank:-0}" "${passed[@]}"
    fi
    if [[ -n "$world_size$rank" ]]; then
        echo "error: --world-size and --rank belong to --dry-run; a real run takes NNODES, NODE_RANK and GPUS_PER_NODE" >&2
        exit 2
    fi

    start_ranks "${entry[@]}" "${passed[@]}"
}

# The Python that runs everything.
find_python() {
    local python="${PYTHON:-$ROOT/.venv/bin/python}"
    if ! command -v "$python" >/dev/null; then
        echo "error: no $python; run 'make install' in $ROOT, or set PYTHON" >&2
        exit 2
    fi
    echo "$python"
}

# A program and its arguments on every rank of this node.
start_ranks() {
    local python name
    python="$(find_python)"
    # Their defaults are right for one node; on several, launchers would wait for each other, each at its own localhost.
    for name in NODE_RANK MASTER_ADDR; do
        if [[ "${NNODES:-1}" != 1 && -z "${!name:-}" ]]; then
            echo "error: NNODES=$NNODES needs $name on each node: NODE_RANK counts them from 0, MASTER_ADDR is that of node 0" >&2
            exit 2
        fi
    done
    # torchrun, of the same installation as $python, which leaves SIGTERM and Ctrl-C to its ranks: they save and exit 0.
    exec "$python" -m megatron_ds.train.torchrun \
        --nnodes "${NNODES:-1}" \
        --node-rank "${NODE_RANK:-0}" \
        --nproc-per-node "${GPUS_PER_NODE:-$(count_gpus)}" \
        --master-addr "${MASTER_ADDR:-localhost}" \
        --master-port "${MASTER_PORT:-29500}" \
        "$@"
}

count_gpus() {
    local count=0
    if command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi --list-gpus 2>/dev/null | grep --count '^GPU ')" || true
    fi
    echo "$((count > 0 ? count : 1))"
}
