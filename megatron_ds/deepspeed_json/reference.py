"""What DeepSpeed's keys mean there: type, default and meaning of each, as of DeepSpeed 0.19.8.

``python -m megatron_ds.deepspeed_json.reference`` prints the table of ``README.md`` beside this file. The defaults are
compared with DeepSpeed's own by ``tools/benchmark/deepspeed_defaults.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_ds.deepspeed_json.keys import ALIASES, CPU_OFFLOAD, KEYS, Becomes, Noted, Refused
from megatron_ds.deepspeed_json.meaning import B, F, I, L, Meaning, O, S
from megatron_ds.deepspeed_json.sections import SECTION_MEANINGS

_M = Meaning
_TOP: Mapping[str, Meaning] = {
    "train_batch_size": _M(I, None, "Samples of an update: micro-batch x accumulation x ranks."),
    "train_micro_batch_size_per_gpu": _M(I, None, "Samples of a forward pass on one rank."),
    "gradient_accumulation_steps": _M(I, None, "Micro-batches of an update."),
    "gradient_clipping": _M(F, 1.0, "Largest norm of the gradients; 0 for any."),
    "steps_per_print": _M(I, None, "Updates between two lines of the log."),
    "wall_clock_breakdown": _M(B, False, "Log the time of forward, backward and step."),
    "zero_allow_untested_optimizer": _M(B, False, "Take optimizers that were not tried with ZeRO."),
    "zero_force_ds_cpu_optimizer": _M(B, True, "Demand the CPU Adam where optimizer state is offloaded."),
    "prescale_gradients": _M(B, False, "Divide gradients before they are summed over ranks."),
    "gradient_predivide_factor": _M(F, 1.0, "The part of the division that comes before the sum."),
    "gradient_allreduce_op": _M(S, "mean", "Average or sum gradients over the ranks."),
    "managed_gradient_accumulation": _M(B, True, "The engine counts micro-batches; else each step() updates."),
    "communication_data_type": _M(S, None, "Dtype in which gradients are sent."),
    "seq_parallel_communication_data_type": _M(S, "fp32", "The same over ranks that share a sequence."),
    "disable_allgather": _M(B, False, "Broadcast updated parameters instead of gathering them."),
    "disable_python_gc": _M(B, False, "Collect garbage at chosen moments only."),
    "dump_state": _M(B, False, "Print the engine's settings when it is made."),
    "memory_breakdown": _M(B, False, "Log the memory in use."),
    "dataloader_drop_last": _M(B, False, "Leave out an incomplete last batch of training_data."),
    "use_data_before_expert_parallelism": _M(B, False, "Order of the ranks of data and expert parallelism."),
    "vocabulary_size": _M(I, None, "Size to be warned of where it does not suit the hardware."),
    "log_level": _M(S, None, "Level of DeepSpeed's logger."),
    "data_parallel_size": _M(I, None, "Ranks that are data-parallel, of a mesh with sequence_parallel_size."),
    "sequence_parallel_size": _M(I, None, "Ranks that share a sequence."),
}
_PRECISION: Mapping[str, Meaning] = {
    "bf16.enabled": _M(B, False, "Train in bfloat16 with fp32 master weights."),
    "bf16.immediate_grad_update": _M(B, False, "Add a gradient to its fp32 sum when it comes."),
    "bf16.check_grad_overflow": _M(B, True, "Skip an update whose gradients are not finite."),
    "bf16.bf16_master_weights_and_grads": _M(B, False, "Keep master weights and gradients in bfloat16."),
    "bf16.bf16_optimizer_states": _M(B, False, "Keep optimizer state in bfloat16."),
    "fp16.enabled": _M(B, False, "Train in float16 with fp32 master weights and a scaled loss."),
    "fp16.auto_cast": _M(B, False, "Cast floating-point inputs of forward."),
    "fp16.loss_scale": _M(F, 0.0, "A fixed loss scale; 0 for one that adapts."),
    "fp16.initial_scale_power": _M(I, 16, "The first scale is 2 to this power."),
    "fp16.loss_scale_window": _M(I, 1000, "Updates without overflow before the scale doubles."),
    "fp16.hysteresis": _M(I, 2, "Overflows before the scale halves."),
    "fp16.consecutive_hysteresis": _M(B, False, "An update without overflow restores the hysteresis."),
    "fp16.min_loss_scale": _M(I, 1, "The scale does not fall below."),
    "fp16.fp16_master_weights_and_grads": _M(B, False, "Keep master weights and gradients in float16."),
    "data_types.grad_accum_dtype": _M(S, None, "Dtype in which gradients add up."),
    "data_types.param_dtype": _M(S, None, "Dtype of the parameters."),
    "data_types.buffer_dtype": _M(S, None, "Dtype of the buffers."),
    "data_types.keep_in_fp32_modules": _M(L, "auto", "Buffers that stay in fp32, by name."),
}
_Z = "zero_optimization"
_ZERO: Mapping[str, Meaning] = {
    f"{_Z}.stage": _M(I, 0, "What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too."),
    f"{_Z}.contiguous_gradients": _M(B, True, "Copy gradients into one buffer as they come."),
    f"{_Z}.reduce_scatter": _M(B, True, "Reduce a gradient to its owner alone."),
    f"{_Z}.reduce_bucket_size": _M(I, 500_000_000, "Elements that are reduced at a time."),
    f"{_Z}.use_multi_rank_bucket_allreduce": _M(B, True, "Reduce a bucket of several owners at once."),
    f"{_Z}.allgather_partitions": _M(B, True, "Gather updated parameters instead of broadcasting them."),
    f"{_Z}.allgather_bucket_size": _M(I, 500_000_000, "Elements that are gathered at a time."),
    f"{_Z}.overlap_comm": _M(B, None, "Reduce during the backward pass."),
    f"{_Z}.compute_grad_norm": _M(B, True, "Compute the norm of the gradients."),
    f"{_Z}.load_from_fp32_weights": _M(B, True, "Take master weights from a checkpoint, not their rounded copy."),
    f"{_Z}.elastic_checkpoint": _M(B, False, "Write checkpoints for another number of ranks."),
    f"{_Z}.zenflow": _M(O, None, "Update important gradients at once and the rest later."),
    f"{_Z}.sub_group_size": _M(I, 1_000_000_000, "Elements that are updated at a time."),
    f"{_Z}.stage3_prefetch_bucket_size": _M(I, 50_000_000, "Elements gathered ahead of their use."),
    f"{_Z}.stage3_param_persistence_threshold": _M(I, 100_000, "Smaller parameters are not sharded."),
    f"{_Z}.stage3_model_persistence_threshold": _M(I, 2**63 - 1, "Elements of a model that may stay whole so."),
    f"{_Z}.stage3_max_live_parameters": _M(I, 1_000_000_000, "Elements that may be whole at a time."),
    f"{_Z}.stage3_max_reuse_distance": _M(I, 1_000_000_000, "A parameter used again this soon stays whole."),
    f"{_Z}.stage3_gather_16bit_weights_on_model_save": _M(B, False, "save_16bit_model() gathers the weights."),
    f"{_Z}.stage3_gather_fp16_weights_on_model_save": _M(B, False, "An older name of the key before."),
    f"{_Z}.stage3_module_granularity_threshold": _M(I, 0, "Modules with fewer elements are gathered as one."),
    f"{_Z}.stage3_use_all_reduce_for_fetch_params": _M(B, False, "Gather by an all-reduce."),
    f"{_Z}.stage3_allgather_sequential": _M(B, False, "Gather parameters one by one."),
    f"{_Z}.log_trace_cache_warnings": _M(B, False, "Log where the order of the modules changes."),
    f"{_Z}.ignore_unused_parameters": _M(B, True, "Let parameters have no gradient."),
    f"{_Z}.legacy_stage1": _M(B, False, "Use the first implementation of stage 1."),
    f"{_Z}.round_robin_gradients": _M(B, False, "Spread gradients over the ranks for copies in parallel."),
    f"{_Z}.parameter_alignment": _M(B, False, "Align each parameter in its buffer."),
    f"{_Z}.zero_hpz_partition_size": _M(I, 1, "Ranks of a second shard of the parameters, inside a node."),
    f"{_Z}.zero_quantized_weights": _M(B, False, "Gather parameters in INT8."),
    f"{_Z}.zero_quantized_nontrainable_weights": _M(B, False, "Gather frozen parameters in INT8."),
    f"{_Z}.zero_quantized_gradients": _M(B, False, "Reduce gradients in INT4."),
    f"{_Z}.memory_efficient_linear": _M(B, True, "Keep no gathered weights of linear layers for the backward."),
    f"{_Z}.pipeline_loading_checkpoint": _M(B, False, "Overlap reading a checkpoint with its use."),
    f"{_Z}.override_module_apply": _M(B, True, "Gather parameters in module.apply()."),
    f"{_Z}.enable_sanity_checks": _M(B, False, "Compare what ranks do."),
    f"{_Z}.save_muon_momentum_buffer_in_memory": _M(B, False, "Keep Muon's momentum off the disk."),
    f"{_Z}.leaf_module.classes": _M(L, None, "Classes of modules that are gathered as one."),
    f"{_Z}.leaf_module.names": _M(L, [], "The same by name."),
    f"{_Z}.leaf_module.name_suffixes": _M(L, [], "The same by the end of the name."),
    f"{_Z}.cpu_offload_use_pin_memory": _M(B, None, "An older name of offload_*.pin_memory."),
    f"{_Z}.offload_optimizer.device": _M(S, "none", "Where optimizer state is kept: none, cpu or nvme."),
    f"{_Z}.offload_optimizer.nvme_path": _M(S, None, "Folder for device nvme."),
    f"{_Z}.offload_optimizer.buffer_count": _M(I, 4, "Buffers for the transfer."),
    f"{_Z}.offload_optimizer.pin_memory": _M(B, True, "Keep it in pinned memory."),
    f"{_Z}.offload_optimizer.pipeline_read": _M(B, False, "Read ahead of the update."),
    f"{_Z}.offload_optimizer.pipeline_write": _M(B, False, "Write behind the update."),
    f"{_Z}.offload_optimizer.fast_init": _M(B, False, "Write the first state faster."),
    f"{_Z}.offload_optimizer.ratio": _M(F, 1.0, "The part that is offloaded, at stage 3."),
    f"{_Z}.offload_optimizer.super_offload": _M(B, False, "Overlap for hosts with a fast link."),
    f"{_Z}.offload_optimizer.cpuadam_cores_perc": _M(F, 0.8, "The part of the cores that super_offload takes."),
    f"{_Z}.offload_param.device": _M(S, "none", "Where parameters are kept: none, cpu or nvme; at stage 3."),
    f"{_Z}.offload_param.nvme_path": _M(S, None, "Folder for device nvme."),
    f"{_Z}.offload_param.buffer_count": _M(I, 5, "Buffers for the transfer."),
    f"{_Z}.offload_param.buffer_size": _M(I, 100_000_000, "Elements of a buffer."),
    f"{_Z}.offload_param.max_in_cpu": _M(I, 1_000_000_000, "Elements that stay in memory with device nvme."),
    f"{_Z}.offload_param.pin_memory": _M(B, True, "Keep them in pinned memory."),
}
_AC = "activation_checkpointing"
_SECTIONS: Mapping[str, Meaning] = {
    f"{_AC}.partition_activations": _M(B, False, "Divide kept activations over model-parallel ranks."),
    f"{_AC}.cpu_checkpointing": _M(B, False, "Keep them in the host's memory."),
    f"{_AC}.contiguous_memory_optimization": _M(B, False, "Keep them in one buffer."),
    f"{_AC}.number_checkpoints": _M(I, None, "How many the buffer holds."),
    f"{_AC}.synchronize_checkpoint_boundary": _M(B, False, "Wait for the device at each."),
    f"{_AC}.profile": _M(B, False, "Log the time of each."),
    "aio": _M(O, None, "Asynchronous I/O with swap files: sizes, depth, threads."),
    "flops_profiler": _M(O, None, "Print FLOPs and times of a step's modules."),
    "comms_logger": _M(O, None, "Log collectives."),
    "tensorboard": _M(O, None, "Write metrics for TensorBoard."),
    "wandb": _M(O, None, "Send metrics to Weights & Biases."),
    "comet": _M(O, None, "Send metrics to Comet."),
    "csv_monitor": _M(O, None, "Write metrics as CSV."),
    "timers": _M(O, None, "Switches of the throughput timer."),
    "autotuning": _M(O, None, "Search for stage and batch sizes."),
    "hybrid_engine": _M(O, None, "Generate with the model that is trained."),
    "torch_autocast": _M(O, None, "Run forward in torch.autocast."),
    "tensor_parallel": _M(O, None, "Split the model's layers over ranks."),
    "expert_parallel": _M(O, None, "Split experts over ranks."),
    "pipeline": _M(O, None, "Stages of a PipelineModule."),
    "datastates_ckpt": _M(O, None, "Write them with DataStates."),
    "weight_quantization": _M(O, None, "Quantise weights for inference."),
    "data_efficiency": _M(O, None, "Curriculum learning and random layer-token dropping."),
}
_O, _S = "optimizer.params", "scheduler.params"
_RULES: Mapping[str, Meaning] = {
    "optimizer.type": _M(S, None, "DeepSpeed's or torch.optim's name of an optimizer."),
    "optimizer.legacy_fusion": _M(B, False, "Use the older fused fp16 optimizer."),
    f"{_O}.lr": _M(F, 1e-3, "Learning rate."),
    f"{_O}.betas": _M(L, [0.9, 0.999], "Decay of Adam's moments."),
    f"{_O}.eps": _M(F, 1e-8, "Added to Adam's denominator."),
    f"{_O}.weight_decay": _M(F, 0.0, "Weight decay; of every parameter."),
    f"{_O}.bias_correction": _M(B, True, "Correct Adam's moments for their start at 0."),
    f"{_O}.torch_adam": _M(B, False, "torch's Adam instead of DeepSpeed's."),
    f"{_O}.adam_w_mode": _M(B, True, "Decoupled weight decay."),
    "scheduler.type": _M(S, None, "WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle or LRRangeTest."),
    f"{_S}.warmup_min_lr": _M(F, 0.0, "WarmupLR, WarmupDecayLR: start of the warm-up."),
    f"{_S}.warmup_max_lr": _M(F, None, "Its end: the optimizer's rate, 0.001 for WarmupDecayLR."),
    f"{_S}.warmup_num_steps": _M(I, 1000, "Updates of warm-up."),
    f"{_S}.warmup_type": _M(S, "log", "log or linear."),
    f"{_S}.total_num_steps": _M(I, None, "Updates of the run."),
    f"{_S}.warmup_min_ratio": _M(F, 0.0, "WarmupCosineLR: start of the warm-up, of the rate."),
    f"{_S}.cos_min_ratio": _M(F, 0.0001, "WarmupCosineLR: end of the decay, of the rate."),
    f"{_S}.cycle_min_lr": _M(F, None, "OneCycle: start and end of the cycle."),
    f"{_S}.cycle_max_lr": _M(F, None, "OneCycle: its top."),
    f"{_S}.decay_lr_rate": _M(F, 0.0, "OneCycle: the rate is divided by 1 + this, a decay."),
    f"{_S}.cycle_first_step_size": _M(I, 2000, "OneCycle: updates on the way up."),
    f"{_S}.cycle_second_step_size": _M(I, None, "OneCycle: and down; as many unless given."),
    f"{_S}.cycle_first_stair_count": _M(I, 0, "OneCycle: stairs on the way up."),
    f"{_S}.cycle_second_stair_count": _M(I, None, "OneCycle: and down; as many unless given."),
    f"{_S}.decay_step_size": _M(I, 0, "OneCycle: updates of one decay after the cycle."),
    f"{_S}.cycle_momentum": _M(B, True, "OneCycle: beta1 goes the other way."),
    f"{_S}.cycle_min_mom": _M(F, 0.8, "OneCycle: beta1 at the top."),
    f"{_S}.cycle_max_mom": _M(F, 0.9, "OneCycle: beta1 at the ends."),
    f"{_S}.decay_mom_rate": _M(F, 0.0, "OneCycle: beta1 is multiplied by 1 + this, a decay."),
    f"{_S}.lr_range_test_min_lr": _M(F, 0.001, "LRRangeTest: the first rate."),
    f"{_S}.lr_range_test_step_size": _M(I, 2000, "LRRangeTest: updates of one rise."),
    f"{_S}.lr_range_test_step_rate": _M(F, 1.0, "LRRangeTest: a rise, of the first rate."),
    f"{_S}.lr_range_test_staircase": _M(B, False, "LRRangeTest: rise at once."),
}
MEANINGS: Mapping[str, Meaning] = {**_TOP, **_PRECISION, **_ZERO, **_SECTIONS, **SECTION_MEANINGS, **_RULES}


def row_of(key: str) -> Becomes | Noted | Refused | None:
    """What a key becomes here: its own row, or that of the section around it; None: a section whose keys have rows."""
    while key and key not in KEYS:
        key = key.rpartition(".")[0]
    return KEYS.get(key)


def _here(key: str) -> str:
    if key not in KEYS:
        return "as the section"
    row = KEYS[key]
    if isinstance(row, Becomes):
        return f"`{row.to}`"
    if isinstance(row, Refused):
        return f"refused: {row.instead}"
    return row.how or "honoured"


def markdown() -> Iterator[str]:
    """The table, line by line."""
    yield "# DeepSpeed's keys"
    yield ""
    yield "Made by `python -m megatron_ds.deepspeed_json.reference`, as of DeepSpeed 0.19.8. The last column:"
    yield "the setting that a key becomes here; or why it has no effect here; or that it is refused, and what to do."
    yield ""
    yield "| key | type | default | meaning | here |"
    yield "|---|---|---|---|---|"
    for key, (kind, default, meaning) in MEANINGS.items():
        shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        yield f"| `{key}` | {kind} | {shown} | {meaning} | {_here(key)} |"
    yield ""
    yield "Other names of a key:"
    yield ""
    yield from (f"- `{name}`: `{own}`" for name, own in ALIASES.items())
    yield from (f'- `{name}: true`: `{own}: "cpu"`' for name, own in CPU_OFFLOAD.items())
    yield ""
    yield "Taken as well, though DeepSpeed 0.19.8 has them no longer or never had:"
    yield ""
    for key, row in KEYS.items():
        if key not in MEANINGS and not (isinstance(row, Noted) and not row.how):
            yield f"- `{key}`: {_here(key)}"


if __name__ == "__main__":
    print("\n".join(markdown()))
