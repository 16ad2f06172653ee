"""A pretraining run from its configuration to its last checkpoint, on whatever ranks it was started on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_ds.advice.run_advice import RunAdvice, known_beforehand
from megatron_ds.checkpoint.directory import resolve
from megatron_ds.checkpoint.last_good import last_good
from megatron_ds.config import BaseRunConfig, validate
from megatron_ds.convert.carried_files import keep_texts_files, take_along
from megatron_ds.data.loader import BatchLoader, MicroBatch, evaluation_batches
from megatron_ds.data.samples import SampleSource, Sources
from megatron_ds.errors import MegatronDSError
from megatron_ds.files import print_line
from megatron_ds.kernels import registry
from megatron_ds.kernels.cpu.allocator import keep_freed_memory, map_large_tensors
from megatron_ds.mesh import Mesh, MeshShape
from megatron_ds.pipeline.schedules import activation_bound
from megatron_ds.train.alike import CHECKPOINT, DATA, DEVICE, SETTINGS, VERSIONS, versions
from megatron_ds.train.build import (
    DTYPES,
    RankRuntime,
    batch_ramp,
    build,
    low_precision,
    num_micro_batches,
    schedule_of,
    spans_of,
)
from megatron_ds.train.callbacks import AdviceCallback, Callback, default_callbacks
from megatron_ds.train.initial_weights import check_latents, check_model, load_weights
from megatron_ds.train.launch import RankInfo, job, set_threads
from megatron_ds.train.loop import Evaluation, Loop
from megatron_ds.train.metrics import Speedometer, peak_tflops
from megatron_ds.train.output import LAST_GOOD, Output, content_of
from megatron_ds.train.task import Task, largest_activations


def pretrain(config: BaseRunConfig, place: RankInfo, task: Task) -> bool:
    """Train; True when all steps are done, False when asked to stop before that (everything is saved).

    All that can be wrong with the input is found before the process group exists, for every rank alike.
    """
    output = Output(config.output)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(job(place, config.timeout))
        facts: dict[str, Any] = {SETTINGS: config.to_dict(), VERSIONS: versions()}
        with ranks.checking(facts):
            device = place.device(config.device)
            source = output.resume_path(config)
            facts |= {DEVICE: device.type, CHECKPOINT: None if source is None else str(source)}
            # First: the settings lack those of a checkpoint that cannot be read, and would be found fault with.
            differs = [] if source is not None else check_model(config)
            shape = validate(config, place.world_size)
            stack.enter_context(registry.use(config.kernels))
            registry.check_runnable(device, DTYPES[config.precision.dtype])
            changes = output.check(config)
            sources = task.open_sources()
            facts[DATA] = content_of(sources.identity)
            differs += [] if source is not None else check_latents(config, sources.identity)
            notes = [_steps(config, task, shape, sources), *sources.notes, *low_precision(config, shape, task, device)]
            if config.train.eval_every and sources.valid is None:
                every = config.train.eval_every
                notes.append(f"train.eval_every={every} evaluates nothing: no data is kept apart for it")
        set_threads(place, config.threads)
        map_large_tensors()
        ranks.start(device)
        mesh = Mesh.create(shape, device, ranks.group_timeout(device))
        if mesh.rank == 0:
            stack.enter_context(output.owned(config))
            print_line("\n".join([str(mesh), *notes]))
            if device.type == "cuda" or config.kernels != "auto":
                kernels = registry.report(device, DTYPES[config.precision.dtype])
                print_line("\n  ".join(["kernels:", *map(str, kernels)]))
        runtime = build(config, mesh, task)
        runtime.step.after_first = keep_freed_memory
        callbacks = default_callbacks(config, mesh, runtime.executor, output)
        callbacks.append(_advice(config, place, mesh, task, runtime, callbacks))
        loop = _loop(config, mesh, task, runtime, output, sources, callbacks)
        ranks.describe(loop.where)
        if source is not None:
            if config.checkpoint.resume_from == LAST_GOOD:
                source, damaged = last_good(source, mesh.world)
                changes = [*changes, *(f"passed over: {problem}" for problem in damaged)]
            changes = [*changes, *loop.resume(None if source == output.checkpoints else source)]
        elif config.checkpoint.init_from:
            load_weights(config, task.tables, runtime.optimizer, mesh)
        loop.check_disk_space()
        if mesh.rank == 0:
            # Only now: whatever failed until here has left the directory as it was.
            for note in output.prepare(config, loop.step):
                print_line(note)
            if config.checkpoint.resume or source is not None:
                print_line(_resumed(loop.step, config, changes))
            _keep_files(config, output, sources.identity, source is None)
            if config.checkpoint.init_from and source is None:
                print_line("\n  ".join([f"weights from {config.checkpoint.init_from}", *differs]))
        return loop.run()


def _steps(config: BaseRunConfig, task: Task, shape: MeshShape, sources: Sources) -> str:
    """How much a run trains, and how often it reads its data."""
    train, epoch = config.train, len(sources.train)
    batches, tokens = num_micro_batches(config, shape), train.global_batch * task.tokens_per_sample
    ramp = "" if train.batch_ramp is None else " at the end"
    read = "at most " * (train.batch_ramp is not None) + f"{train.steps * train.global_batch / epoch:.3g}"
    return (
        f"{train.steps:,} steps of {train.global_batch:,} samples{ramp} (dp {shape.dp} x micro-batch "
        f"{train.micro_batch} x {batches} micro-batches), {tokens:,} tokens a step; "
        f"{read} epochs of {epoch:,} samples"
    )


def _keep_files(config: BaseRunConfig, output: Output, data: Mapping[str, Any], starts: bool) -> None:
    """Lay beside the checkpoints what came with the weights that a run starts from, and what its texts were made with.

    A run does not end where the latter cannot be copied.
    """
    if config.checkpoint.init_from and starts:
        take_along(resolve(config.checkpoint.init_from).parent, output.checkpoints)
    if hasattr(config.data, "tokenizer"):
        prefixes = [dataset["prefix"] for dataset in data.get("datasets", ())]
        vocab_size = config.model.resolved["vocab_size"]
        try:
            keep_texts_files(
                config.data.tokenizer, prefixes, bool(data.get("conversations")), output.checkpoints, vocab_size
            )
        except MegatronDSError as error:
            print_line(f"the tokenizer does not go along with the checkpoints, name it where they are used: {error}")


def _loop(
    config: BaseRunConfig,
    mesh: Mesh,
    task: Task,
    runtime: RankRuntime,
    output: Output,
    sources: Sources,
    callbacks: list[Callback],
) -> Loop:
    loader = BatchLoader(
        sources.train,
        batch_ramp(config),
        config.train.micro_batch,
        mesh.dp.rank,
        mesh.dp.size,
        prefetch=config.data.prefetch,
        pin_memory=mesh.device.type == "cuda",
    )
    speedometer = Speedometer(
        task.flops_per_token,
        mesh.world.size,
        config.log.peak_tflops or peak_tflops(mesh.device),
        task.tokens,
    )
    evaluation = _evaluation(config, mesh, task, sources.valid)
    return Loop(config, mesh, runtime, loader, output, speedometer, evaluation, callbacks, sources.identity)


def _resumed(step: int, config: BaseRunConfig, changes: Sequence[str]) -> str:
    if step == 0:
        return f"checkpoint.resume: no checkpoint in {config.output}, so this run starts from the beginning"
    changed = "; ".join(filter(None, dict.fromkeys(changes)))
    text = f"resumed from step {step} of {config.train.steps}"
    if step >= config.train.steps:
        text = f"nothing to do: the run in {config.output} is at step {step}, and train.steps={config.train.steps}"
    return f"{text}, with other settings than before: {changed}" if changed else text


def _advice(
    config: BaseRunConfig, place: RankInfo, mesh: Mesh, task: Task, runtime: RankRuntime, callbacks: Sequence[Callback]
) -> AdviceCallback:
    """Says on rank 0, through the other callbacks, what the settings cost more than they need to."""

    def message(text: str) -> None:
        for callback in callbacks:
            callback.on_message(text)

    micro_batches, pp = num_micro_batches(config, mesh.shape), mesh.pp
    spans = spans_of(config.pipeline, task, pp.size)
    schedule = schedule_of(config.pipeline, pp.size, micro_batches)
    known = known_beforehand(
        runtime.optimizer,
        micro_batches,
        activation_bound(config.pipeline.schedule, schedule)[pp.rank],
        largest_activations(task, [spans[stage] for stage in runtime.stages], mesh.tp.size, mesh.device.type),
        task.flops_per_token * config.train.global_batch * task.tokens_per_sample / mesh.world.size,
        config.log.peak_tflops or peak_tflops(mesh.device),
        place.local_world_size,
    )
    return AdviceCallback(RunAdvice(runtime.optimizer, runtime.scaler, mesh, micro_batches, message), known)


def _evaluation(config: BaseRunConfig, mesh: Mesh, task: Task, valid: SampleSource | None) -> Evaluation | None:
    """Makes the validation batches, cut into portions of a training step's micro-batches."""
    if valid is None or not config.train.eval_every:
        return None

    def batches() -> Iterator[Sequence[MicroBatch]]:
        samples = config.train.eval_batches * config.train.global_batch
        stream = evaluation_batches(
            valid,
            samples,
            config.train.micro_batch,
            task.leave_out,
            mesh.dp.rank,
            mesh.dp.size,
            mesh.device.type == "cuda",
        )
        while portion := list(itertools.islice(stream, num_micro_batches(config, mesh.shape))):
            yield portion

    return batches
