"""What settings are called elsewhere: a mistyped option may be one that Megatron-LM, transformers or DeepSpeed has.

Names of options and of keys, in lower case with hyphens and without their section, to the setting here, with a value
where the name alone says one.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_ds.errors import nearest

OTHER_NAMES = {
    # Parallelism
    "tensor-model-parallel-size": "mesh.tp",
    "tensor-parallel-size": "mesh.tp",
    "pipeline-model-parallel-size": "mesh.pp",
    "pipeline-parallel-size": "mesh.pp",
    "context-parallel-size": "mesh.cp",
    "data-parallel-size": "mesh.dp",
    "num-layers-per-virtual-pipeline-stage": "pipeline.chunks",
    "zero-stage": "zero.stage",
    "use-distributed-optimizer": "zero.stage 1",
    "fsdp": "zero.stage",
    "cpu-offload": "zero.offload-optimizer.device cpu",
    "optimizer-cpu-offload": "zero.offload-optimizer.device cpu",
    "offload-param": "zero.offload-parameters.device",
    "distributed-timeout-minutes": "timeout",
    # Model
    "num-attention-heads": "model.num-heads",
    "num-query-groups": "model.kv-heads",
    "num-key-value-heads": "model.kv-heads",
    "num-hidden-layers": "model.num-layers",
    "intermediate-size": "model.ffn-hidden-size",
    "max-position-embeddings": "model.max-positions",
    "position-embedding-type": "model.position",
    "rotary-base": "model.rope-theta",
    "kv-channels": "model.head-dim",
    "normalization": "model.norm",
    "rms-norm-eps": "model.norm-eps",
    "swiglu": "model.activation swiglu",
    "disable-bias-linear": "model.bias",
    "untie-embeddings-and-output-weights": "model.tied-embeddings",
    "padded-vocab-size": "model.vocab-size",
    "make-vocab-size-divisible-by": "model.vocab-multiple",
    "initializer-range": "model.init-std",
    "init-method-std": "model.init-std",
    "sliding-window": "model.window",
    # Batches and steps
    "micro-batch-size": "train.micro-batch",
    "per-device-train-batch-size": "train.micro-batch",
    "train-micro-batch-size-per-gpu": "train.micro-batch",
    "batch-size": "train.global-batch",
    "global-batch-size": "train.global-batch",
    "train-batch-size": "train.global-batch",
    "gradient-accumulation-steps": "train.global-batch",  # over (train.micro-batch x dp)
    "rampup-batch-size": "train.batch-ramp",
    "train-iters": "train.steps",
    "max-steps": "train.steps",
    "train-samples": "train.steps",
    "num-train-epochs": "train.steps",
    "epochs": "train.steps",
    "seq-length": "train.sequence-length",
    "seq-len": "train.sequence-length",
    "max-seq-length": "train.sequence-length",
    "block-size": "train.sequence-length",
    "eval-interval": "train.eval-every",
    "eval-steps": "train.eval-every",
    "eval-iters": "train.eval-batches",
    # Optimizer
    "learning-rate": "optimizer.lr",
    "lr-decay-style": "optimizer.schedule",
    "lr-scheduler-type": "optimizer.schedule",
    "lr-warmup-iters": "optimizer.warmup-steps",
    "lr-decay-iters": "optimizer.decay-steps",
    "adam-beta1": "optimizer.beta1",
    "adam-beta2": "optimizer.beta2",
    "adam-eps": "optimizer.eps",
    "adam-epsilon": "optimizer.eps",
    "clip-grad": "optimizer.clip-norm",
    "max-grad-norm": "optimizer.clip-norm",
    "gradient-clipping": "optimizer.clip-norm",
    # Numbers and memory
    "bf16": "precision.dtype bf16",
    "fp16": "precision.dtype fp16",
    "mixed-precision": "precision.dtype",
    "fp8-format": "precision.fp8",
    "initial-scale-power": "precision.initial-loss-scale",
    "recompute-activations": "recompute.mode",
    "recompute-granularity": "recompute.mode",
    "gradient-checkpointing": "recompute.mode full",
    "activation-checkpointing": "recompute.mode",
    # Data, files, logs
    "data-path": "data.prefix",
    "train-data-path": "data.train-blend",
    "valid-data-path": "data.valid-blend",
    "tokenizer-model": "data.tokenizer",
    "tokenizer-name-or-path": "data.tokenizer",
    "reset-attention-mask": "data.document-masking",
    "save": "output",
    "output-dir": "output",
    "load": "checkpoint.resume",
    "resume-from-checkpoint": "checkpoint.resume",
    "pretrained-checkpoint": "checkpoint.init-from",
    "model-name-or-path": "checkpoint.init-from",
    "save-interval": "checkpoint.save-every",
    "save-steps": "checkpoint.save-every",
    "save-total-limit": "checkpoint.keep-last",
    "log-interval": "log.every",
    "logging-steps": "log.every",
    "tensorboard-dir": "log.tensorboard",
}


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` for an unknown setting, or an empty string when nothing is close.

    By what other libraries call it; else by its last part, where few settings have that; else by its letters.

    Args:
        known: dotted settings, written as ``name`` is.
        prefix: of a name in the answer, such as ``--``.
    """
    keys = {key.replace("_", "-"): key for key in known}
    last = name.casefold().replace("_", "-").rpartition(".")[2]
    meant, _, value = OTHER_NAMES.get(last, "").partition(" ")
    if meant in keys:
        return f"; did you mean '{prefix}{keys[meant]}{' ' * bool(value)}{value}'?"
    found = [key for short, key in keys.items() if short.endswith(f".{last}")]
    if 1 <= len(found) <= 3:
        return "; did you mean " + " or ".join(f"'{prefix}{key}'" for key in sorted(found)) + "?"
    return nearest(name, keys.values()).replace("'", f"'{prefix}", 1)
