"""What the keys inside DeepSpeed's sections mean there, of sections that are one value here; see ``reference``."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ds.deepspeed_json.meaning import B, F, I, L, Meaning, O, S

_M = Meaning


def _under(section: str, rows: Mapping[str, Meaning]) -> dict[str, Meaning]:
    return {f"{section}.{name}": row for name, row in rows.items()}


_AIO = {
    "block_size": _M(I, 1_048_576, "Bytes of a request."),
    "queue_depth": _M(I, 8, "Requests under way at a time."),
    "intra_op_parallelism": _M(I, 1, "Threads of one transfer."),
    "single_submit": _M(B, False, "Submit requests one by one."),
    "overlap_events": _M(B, True, "Submit while waiting for completions."),
    "use_gds": _M(B, False, "Read into the GPU's memory directly."),
}
_PROFILER = {
    "enabled": _M(B, False, "Print the profile."),
    "recompute_fwd_factor": _M(F, 0.0, "Forward passes that recomputation adds."),
    "profile_step": _M(I, 1, "The step that is profiled."),
    "module_depth": _M(I, -1, "Depth of modules that is printed; -1 for the innermost."),
    "top_modules": _M(I, 1, "Modules printed at each depth."),
    "detailed": _M(B, True, "Print every module."),
    "output_file": _M(S, None, "File instead of the standard output."),
}
_COMMS = {
    "enabled": _M(B, False, "Log collectives."),
    "verbose": _M(B, False, "A line for each."),
    "prof_all": _M(B, True, "All kinds of them."),
    "prof_ops": _M(L, [], "Or these kinds alone."),
    "debug": _M(B, False, "Name the caller."),
}
_THROUGHPUT = {
    "enabled": _M(B, True, "Measure samples a second."),
    "synchronized": _M(B, True, "Wait for the device to do so."),
}
_TENSORBOARD = {
    "enabled": _M(B, False, "Write metrics."),
    "output_path": _M(S, "", "Folder of its files."),
    "job_name": _M(S, "DeepSpeedJobName", "Folder inside it."),
}
_WANDB = {
    "enabled": _M(B, False, "Send metrics."),
    "group": _M(S, None, "Group of runs."),
    "team": _M(S, None, "Owner of the run."),
    "project": _M(S, "deepspeed", "Project of the run."),
}
_COMET = {
    "enabled": _M(B, False, "Send metrics."),
    "samples_log_interval": _M(I, 100, "Samples between two points."),
    "project": _M(S, None, "Project of the run."),
    "workspace": _M(S, None, "Owner of the run."),
    "api_key": _M(S, None, "Key of the account."),
    "experiment_name": _M(S, None, "Name of the run."),
    "experiment_key": _M(S, None, "Run to go on with."),
    "online": _M(B, None, "Send now, or keep for later."),
    "mode": _M(S, None, "Start a run, take up one, or either."),
}
_AUTOTUNING = {
    "enabled": _M(B, False, "Search for settings."),
    "fast": _M(B, True, "Try micro-batches of the best stage alone."),
    "results_dir": _M(S, "autotuning_results", "Folder of the results."),
    "exps_dir": _M(S, "autotuning_exps", "Folder of the trials."),
    "overwrite": _M(B, True, "Run trials again that have been run."),
    "start_profile_step": _M(I, 3, "First step measured."),
    "end_profile_step": _M(I, 5, "Last step measured."),
    "metric": _M(S, "throughput", "throughput, latency or flops."),
    "metric_path": _M(S, None, "File with the metric of a trial."),
    "tuner_type": _M(S, "gridsearch", "gridsearch, random or model_based."),
    "tuner_early_stopping": _M(I, 5, "Trials without a better one."),
    "tuner_num_trials": _M(I, 50, "Trials at most."),
    "arg_mappings": _M(O, None, "Arguments of the script, by key."),
    "model_info": _M(O, None, "Parameters and activations of the model."),
    "model_info_path": _M(S, None, "The same in a file."),
    "mp_size": _M(I, 1, "Ranks that share a model."),
    "max_train_batch_size": _M(I, None, "Largest batch tried."),
    "min_train_batch_size": _M(I, 1, "Smallest batch tried."),
    "max_train_micro_batch_size_per_gpu": _M(I, 1024, "Largest micro-batch tried."),
    "min_train_micro_batch_size_per_gpu": _M(I, 1, "Smallest micro-batch tried."),
    "num_tuning_micro_batch_sizes": _M(I, 3, "Micro-batches tried."),
}
_HYBRID = {
    "enabled": _M(B, False, "Generate with inference kernels."),
    "max_out_tokens": _M(I, 512, "Longest sequence."),
    "inference_tp_size": _M(I, 1, "Ranks that share a model while it generates."),
    "release_inference_cache": _M(B, False, "Give the cache back after it."),
    "pin_parameters": _M(B, True, "Keep gathered parameters."),
    "tp_gather_partition_size": _M(I, 8, "Layers gathered at a time."),
    "enable_cuda_graph": _M(B, False, "Capture CUDA graphs."),
}
_AUTOCAST = {
    "enabled": _M(B, False, "Run forward in torch.autocast."),
    "dtype": _M(S, None, "Dtype that it computes in."),
    "lower_precision_safe_modules": _M(L, None, "Modules whose gradients are sent in it."),
}
_TENSOR_PARALLEL = {
    "autotp_size": _M(I, 0, "Ranks that share a layer; 0 for none."),
    "dtype": _M(S, "fp16", "Dtype of the model."),
    "tp_overlap_comm": _M(B, False, "Overlap their sums with computing."),
    "vocab_parallel_lm_head": _M(B, None, "Split the output head over the vocabulary."),
    "vocab_parallel_ce_backend": _M(S, "torch", "Its cross entropy: torch or liger."),
    "tp.tp_size": _M(I, 1, "Ranks that share a layer."),
    "tp.tp_grain_size": _M(I, 1, "Multiple to which layers are cut."),
    "tp.mpu": _M(O, None, "Object that knows the ranks."),
    "tp.tp_group": _M(O, None, "Their process group."),
    "injection_policy_tuple": _M(L, None, "Layers whose outputs are summed."),
    "partition_config": _M(O, None, "Which layers are cut, and how."),
    "preset_model": _M(S, None, "Such rules by the model's name."),
    "keep_module_on_host": _M(B, False, "Cut layers in the host's memory."),
    "kernel_inject": _M(B, False, "Use fused kernels."),
}
_EXPERT_PARALLEL = {
    "enabled": _M(B, False, "Split experts over ranks."),
    "autoep_size": _M(I, 1, "Ranks that share the experts."),
    "expert_tensor_parallel_size": _M(I, 1, "Ranks that share one."),
    "validate_folding_routing": _M(B, False, "Check that such ranks route alike."),
    "async_split_plan": _M(B, False, "Send sizes without waiting."),
    "preset_model": _M(S, None, "Names of a known model's parts."),
    "moe_layer_pattern": _M(S, None, "Expression that finds the layers."),
    "expert_pattern": _M(S, None, "The experts."),
    "router_pattern": _M(S, None, "The router."),
    "use_grouped_mm": _M(B, True, "Compute experts in one product."),
    "disable_triton_grouped_mm": _M(B, False, "Not by Triton."),
    "route_norm": _M(B, None, "Scale the chosen scores to a sum of 1."),
    "route_scale": _M(F, 1.0, "Factor of the scores."),
    "score_apply": _M(S, "auto", "Scale inputs (pre) or outputs (post) of experts."),
    "combine_impl": _M(S, "auto", "How outputs are summed."),
    "row_weighting_impl": _M(S, "auto", "How rows are scaled."),
    "gate_up_impl": _M(S, "separate", "Two products, or one."),
    "comm_backend": _M(S, "comm", "What sends tokens: comm or deepep."),
    "comm_num_sm": _M(I, 12, "Multiprocessors for it."),
    "comm_qp_margin": _M(I, 4, "Spare queue pairs."),
    "comm_max_tokens_per_rank": _M(I, 0, "Size of its buffers; 0 for as needed."),
    "num_expert_groups": _M(I, None, "Groups of experts."),
    "num_limited_groups": _M(I, None, "Groups that a token may choose from."),
    "score_func": _M(S, "auto", "softmax or sigmoid."),
    "top_k": _M(I, "auto", "Experts of a token."),
    "load_balance_coeff": _M(F, None, "Rate of the bias that balances experts."),
    "routed_scaling_factor": _M(F, "auto", "Factor of routed outputs."),
    "expert_w1": _M(S, None, "Name of an expert's gate."),
    "expert_w2": _M(S, None, "Of its output."),
    "expert_w3": _M(S, None, "Of its input."),
    "num_experts_attr": _M(S, None, "Attribute with the number of experts."),
    "top_k_attr": _M(S, None, "With the experts of a token."),
    "has_shared_experts": _M(B, None, "Some experts get every token."),
    "shared_experts_pattern": _M(S, None, "Expression that finds them."),
    "shared_experts_gate_pattern": _M(S, None, "And their gate."),
    "expert_activation": _M(S, None, "Activation of an expert."),
}
_PIPELINE = {
    "stages": _M(I, "auto", "Stages; PipelineModule says so itself."),
    "partition": _M(S, "best", "How layers are shared out; PipelineModule says so itself."),
    "seed_layers": _M(B, False, "PipelineModule says so itself."),
    "activation_checkpoint_interval": _M(I, 0, "Layers that are recomputed as one."),
    "pipe_partitioned": _M(B, True, "Divide activations over model-parallel ranks when they are sent."),
    "grad_partitioned": _M(B, True, "And gradients."),
}
_CHECKPOINT = {
    "tag_validation": _M(S, "WARN", "Ranks with different tags: IGNORE, WARN or FAIL."),
    "load_universal": _M(B, False, "Load a universal checkpoint."),
    "use_node_local_storage": _M(B, False, "Each node has a folder of its own."),
    "parallel_write.pipeline_stage": _M(B, False, "Data-parallel ranks share the layers of a stage."),
    "checkpoint_serialization": _M(B, True, "Write as torch.save does."),
    "writer": _M(O, None, "Another writer."),
}
_DATASTATES = {
    "enabled": _M(B, False, "Write with DataStates."),
    "config": _M(O, None, "Its settings."),
}
_SAMPLING = {
    "enabled": _M(B, False, "DeepSpeed draws the samples."),
    "num_epochs": _M(I, 1000, "Epochs at most."),
    "num_workers": _M(I, 0, "Processes that load."),
    "pin_memory": _M(B, False, "Load into pinned memory."),
    "curriculum_learning.enabled": _M(B, False, "Easy samples first."),
    "curriculum_learning.data_cluster_path": _M(S, None, "Folder for lists of samples."),
    "curriculum_learning.curriculum_metrics": _M(O, None, "What makes a sample hard, and the schedule of each."),
    "dynamic_batching.enabled": _M(B, False, "Batches of about as many tokens."),
    "dynamic_batching.metrics_path": _M(S, None, "Folder with the samples' lengths."),
    "dynamic_batching.lr_scaling_method": _M(S, "linear", "Learning rate by batch size: linear, sqrt or none."),
    "dynamic_batching.min_batch_size": _M(I, 1, "Fewest samples."),
    "dynamic_batching.max_batch_size": _M(I, None, "Most samples."),
    "dynamic_batching.sequence_picking_order": _M(S, "dataloader", "dataloader, random or seqlen."),
    "dynamic_batching.max_tokens": _M(I, None, "Tokens of a batch."),
    "dynamic_batching.verbose": _M(B, False, "Log the batches."),
}
_LTD = {
    "enabled": _M(B, False, "Leave tokens out of middle layers."),
    "total_layer_num": _M(I, None, "Layers of the model."),
    "random_ltd_layer_num": _M(I, None, "Layers that leave some out."),
    "random_ltd_layer_id": _M(L, None, "Which layers drop tokens."),
    "model_mask_name": _M(S, None, "Argument with the attention mask."),
    "model_type": _M(S, None, "decoder or encoder."),
    "hidden_state_order": _M(S, None, "Order of the hidden state's dims."),
    "random_ltd_schedule": _M(O, None, "How many tokens are kept, by step."),
    "layer_token_lr_schedule.enabled": _M(B, False, "A learning rate by tokens seen."),
}
_COMPILE = {
    "deepcompile": _M(B, False, "Compile the model with communication in its graph."),
    "passes": _M(L, None, "Passes of that compiler."),
    "autoep_non_moe": _M(B, False, "Compile layers without experts."),
    "free_activation": _M(B, False, "Free activations early."),
    "free_activation_threshold": _M(I, 10_485_760, "Elements from which on."),
    "offload_activation": _M(B, False, "Move activations to the host."),
    "offload_activation_pin_memory": _M(B, True, "To pinned memory."),
    "offload_opt_states": _M(B, False, "Move optimizer state to the host."),
    "offload_parameters": _M(B, False, "And parameters."),
    "double_buffer": _M(B, True, "Two buffers for gradients."),
    "symmetric_memory": _M(B, False, "Communicate through symmetric memory."),
    "debug_log": _M(B, False, "Log what the compiler does."),
    "sync_before_reduce": _M(B, False, "Wait before gradients are reduced."),
    "sync_after_reduce": _M(B, False, "Wait after it."),
    "sync_before_allgather": _M(B, False, "Wait before parameters are gathered."),
    "sync_after_allgather": _M(B, False, "Wait after it."),
    "keep_int_input_tensors": _M(B, True, "Keep whole-number inputs."),
    "keep_all_input_tensors": _M(B, False, "Keep all inputs."),
}
SECTION_MEANINGS: Mapping[str, Meaning] = {
    **_under("aio", _AIO),
    **_under("flops_profiler", _PROFILER),
    **_under("comms_logger", _COMMS),
    **_under("timers.throughput", _THROUGHPUT),
    **_under("tensorboard", _TENSORBOARD),
    **_under("csv_monitor", _TENSORBOARD),
    **_under("wandb", _WANDB),
    **_under("comet", _COMET),
    **_under("autotuning", _AUTOTUNING),
    **_under("hybrid_engine", _HYBRID),
    **_under("torch_autocast", _AUTOCAST),
    **_under("tensor_parallel", _TENSOR_PARALLEL),
    **_under("expert_parallel", _EXPERT_PARALLEL),
    **_under("compile", _COMPILE),
    **_under("pipeline", _PIPELINE),
    **_under("checkpoint", _CHECKPOINT),
    **_under("datastates_ckpt", _DATASTATES),
    "data_efficiency.enabled": _M(B, False, "Either of the two that follow."),
    "data_efficiency.seed": _M(I, 1234, "Of what is drawn."),
    **_under("data_efficiency.data_sampling", _SAMPLING),
    "data_efficiency.data_routing.enabled": _M(B, False, "Random layer-token dropping."),
    **_under("data_efficiency.data_routing.random_ltd", _LTD),
}
