"""The one executor: it walks a rank's list of actions and runs them. A mesh of one rank is a schedule of one stage.

It knows modules, tensors and two process groups, and neither models nor schedules' reasons. A stage is any module
called as ``stage(micro_batch, hidden)`` that returns the activation for the next stage, or on the last stage the
scalar *sum* of its losses (see ``train/step.py`` for who normalises it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ds.mesh import Axis
from megatron_ds.pipeline.action import Action, Op, Schedule, num_stages_of, rank_of
from megatron_ds.pipeline.passes import add_communication, hoist_receives
from megatron_ds.pipeline.timeline import Event

MicroBatch = Mapping[str, Tensor]

# Sends in flight before the oldest is waited for. gloo cannot be asked whether a send is done, so without a bound every
# activation of a batch would stay in memory. The bound is above what 1F1B or GPipe needs to go on without waiting.
_MAX_SENDS = 8


@dataclass
class _InFlight:
    """What a stage keeps of a micro-batch between its forward and its backward."""

    hidden: Tensor | None
    output: Tensor


@dataclass
class _Run:
    """The state of one pass over the schedule."""

    micro_batches: Sequence[MicroBatch]
    seed: Tensor | None
    loss: Tensor
    in_flight: dict[tuple[int, int], _InFlight] = field(default_factory=dict)
    # Posted receives and issued sends. A send keeps its tensor alive until it is done.
    receives: dict[Action, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sends: list[tuple[dist.Work, Tensor]] = field(default_factory=list)
    # Between two stages of one rank a tensor is handed over without a transfer.
    handed_over: dict[Action, Tensor] = field(default_factory=dict)


class Executor:
    """Runs a schedule on this rank.

    Args:
        schedule: compute actions of all ranks, as ``build_schedule`` returns them (transfers are added here).
        other_sizes: the same for other numbers of micro-batches, where steps differ in it (batch ramp-up).
        stages: this rank's stages by global stage index.
        pp, pp_back: the pipeline axis with the groups that carry activations down and gradients back.
        activation_shape, dtype, device: of what flows between stages: ``[s, b, h]``, the same for every micro-batch.
        before_backward: called with a stage before each of its backwards, and whether it is its last of the run:
            gradients may then be reduced as they become final. ``after_backward``: called with the stage after it.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        *,
        pp: Axis,
        pp_back: Axis,
        activation_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        before_backward: Callable[[nn.Module, bool], None] = lambda stage, last: None,
        after_backward: Callable[[nn.Module], None] = lambda stage: None,
        other_sizes: Sequence[Schedule] = (),
    ):
        self.stages = dict(stages)
        self.pp, self.pp_back = pp, pp_back
        self.activation_shape, self.dtype, self.device = activation_shape, dtype, device
        self.before_backward, self.after_backward = before_backward, after_backward
        self.num_stages = num_stages_of(schedule)
        first = min(self.stages)
        self.actions: dict[int, list[Action]] = {}  # by the number of micro-batches
        for one in (schedule, *other_sizes):
            own = hoist_receives(add_communication(one))[pp.rank]
            self.actions[sum(a.op is Op.F and a.stage == first for a in own)] = own
        self.recorded: list[Event] | None = None
        self._doing: Action | None = None  # read by another thread when a rank hangs

    def where(self) -> str:
        """What this rank is doing, for a message; empty between two runs."""
        action = self._doing
        if action is None:
            return ""
        what = "gradient" if action.op in (Op.B, Op.RECV_B) else "activation"
        if action.op.is_receive:
            source = self.pp.ranks[rank_of(action.counterpart.stage, self.pp.size)]
            return f"{action}, waiting for the {what} of micro-batch {action.micro_batch} from rank {source}"
        verb = {Op.F: "forward", Op.B: "backward"}.get(action.op, "transfer")
        return f"{action}, {verb} of micro-batch {action.micro_batch} on stage {action.stage}"

    def run(self, micro_batches: Sequence[MicroBatch], seed: Tensor) -> Tensor:
        """Forward and backward of every micro-batch.

        Args:
            seed: 0-d gradient of the summed loss: the one place where normalisation and loss scale enter.

        Returns:
            The sum of the losses of this rank's micro-batches (0-d; zero on every stage but the last). Gradients
            are in the parameters.
        """
        actions = self.actions.get(len(micro_batches))
        if actions is None:
            raise ValueError(
                f"{len(micro_batches)} micro-batches for a schedule of {', '.join(map(str, self.actions))}; "
                "build the schedule for the number of micro-batches"
            )
        return self._execute(actions, micro_batches, seed)

    @torch.no_grad()
    def run_forward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Forward only, for evaluation, of any number of micro-batches. Returns what :meth:`run` returns."""
        forwards = [
            [Action(stage, Op.F, i) for i in range(len(micro_batches)) for stage in range(rank, self.num_stages, pp)]
            for pp in (self.pp.size,)
            for rank in range(pp)
        ]
        return self._execute(hoist_receives(add_communication(forwards))[self.pp.rank], micro_batches, None)

    def _execute(self, actions: list[Action], micro_batches: Sequence[MicroBatch], seed: Tensor | None) -> Tensor:
        last_backward = {a.stage: a for a in actions if a.op is Op.B}
        run = _Run(micro_batches, seed, torch.zeros((), dtype=torch.float64, device=self.device))
        for action in actions:
            self._doing = action
            if action.op.is_receive:
                self._post_receive(action, run)
            elif action.op.is_send:
                self._send(action, run)
            elif action.op is Op.F:
                hidden = self._take(Action(action.stage, Op.RECV_F, action.micro_batch), run)
                with self._recording(action):
                    self._forward(action, hidden, run)
            else:
                grad = self._take(Action(action.stage, Op.RECV_B, action.micro_batch), run)
                self.before_backward(self.stages[action.stage], last_backward[action.stage] == action)
                with self._recording(action):
                    self._backward(action, grad, run)
                self.after_backward(self.stages[action.stage])
        for work, _ in run.sends:
            work.wait()
        self._doing = None
        return run.loss

    def _forward(self, action: Action, hidden: Tensor | None, run: _Run) -> None:
        if hidden is not None and run.seed is not None:
            hidden.requires_grad_()
        output = self.stages[action.stage](run.micro_batches[action.micro_batch], hidden)
        if action.stage == self.num_stages - 1:
            run.loss += output.detach()
        else:
            self._hand_over(Action(action.stage, Op.SEND_F, action.micro_batch), output.detach(), run)
        if run.seed is not None:
            run.in_flight[action.stage, action.micro_batch] = _InFlight(hidden, output)

    def _backward(self, action: Action, grad: Tensor | None, run: _Run) -> None:
        kept = run.in_flight.pop((action.stage, action.micro_batch))
        if grad is None:
            assert run.seed is not None
            grad = run.seed.to(kept.output.dtype)
        torch.autograd.backward(kept.output, grad)
        if kept.hidden is not None:
            assert kept.hidden.grad is not None
            self._hand_over(Action(action.stage, Op.SEND_B, action.micro_batch), kept.hidden.grad, run)

    def _hand_over(self, send: Action, tensor: Tensor, run: _Run) -> None:
        """Keep a result for the send that follows it, or for the neighbouring stage where that is on this rank."""
        target = send.counterpart
        local = rank_of(target.stage, self.pp.size) == self.pp.rank
        run.handed_over[target if local else send] = tensor

    def _take(self, receive: Action, run: _Run) -> Tensor | None:
        """What a compute action gets from its neighbour; None at either end of the pipeline."""
        if receive in run.handed_over:
            return run.handed_over.pop(receive)
        if receive not in run.receives:
            return None
        work, tensor = run.receives.pop(receive)
        action, self._doing = self._doing, receive
        with self._recording(receive):
            work.wait()
        self._doing = action
        return tensor

    def _post_receive(self, action: Action, run: _Run) -> None:
        axis = self.pp if action.op is Op.RECV_F else self.pp_back
        source = axis.ranks[rank_of(action.counterpart.stage, axis.size)]
        buffer = torch.empty(self.activation_shape, dtype=self.dtype, device=self.device)
        work = dist.irecv(buffer, source, group=axis.group)
        assert work is not None
        run.receives[action] = (work, buffer)

    def _send(self, action: Action, run: _Run) -> None:
        axis = self.pp if action.op is Op.SEND_F else self.pp_back
        target = axis.ranks[rank_of(action.counterpart.stage, axis.size)]
        tensor = run.handed_over.pop(action).contiguous()
        if len(run.sends) >= _MAX_SENDS:
            run.sends.pop(0)[0].wait()
        with self._recording(action):
            work = dist.isend(tensor, target, group=axis.group)
        assert work is not None
        run.sends.append((work, tensor))

    def _recording(self, action: Action) -> _Stopwatch:
        return _Stopwatch(self, action)


class _Stopwatch:
    """Times an action into ``executor.recorded`` while that is a list, and costs nothing otherwise."""

    def __init__(self, executor: Executor, action: Action):
        self.executor, self.action = executor, action
        self.start = 0.0

    def __enter__(self) -> None:
        if self.executor.recorded is not None:
            self._synchronize()
            self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self.executor.recorded is not None:
            self._synchronize()
            self.executor.recorded.append(Event(self.executor.pp.rank, self.action, self.start, time.perf_counter()))

    def _synchronize(self) -> None:
        if self.executor.device.type == "cuda":
            torch.cuda.synchronize(self.executor.device)
